"""Files of sparse autoencoders: every published format with its real names and shapes, our own again, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.tiltmeter.sparse.dictionaries import (
    D_MODEL,
    WIDTH,
    gemma_1,
    gemma_2,
    jump_relu_by_hand,
    noise,
    published,
    saelens,
)
from tiltmeter.errors import UserError
from tiltmeter.sparse.autoencoder import JumpReLU, SaeId, TopK
from tiltmeter.sparse.files import load_sae, save_sae

X = noise(5, D_MODEL, seed=4)
V6 = {"architecture": "jumprelu", "d_in": D_MODEL, "d_sae": WIDTH, "dtype": "float32", "device": "cpu",
      "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
      "metadata": {"sae_lens_version": "6.54.0", "model_name": "gemma-2-2b", "hook_name": "blocks.12.hook_resid_post",
                   "hook_head_index": None, "prepend_bos": True}}  # fmt: skip
"""cfg.json as SAELens 6 writes it."""
V5 = {"architecture": "standard", "d_in": D_MODEL, "d_sae": WIDTH, "dtype": "torch.float32", "device": "cpu",
      "model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre", "activation_fn_str": "relu",
      "activation_fn_kwargs": {}, "apply_b_dec_to_input": True, "finetuning_scaling_factor": False,
      "normalize_activations": False, "prepend_bos": True, "context_size": 128}  # fmt: skip
"""cfg.json of before version 6."""


def check_by_hand(folder: Path, weights: dict[str, torch.Tensor], *, like: torch.Tensor = X, **options: Any) -> None:
    """What is read computes what the weights say, and again after it is written as ours."""
    features, made = jump_relu_by_hand(weights, like)
    sae = load_sae(folder, **options)
    assert (features > 0).any()
    for each in (sae, again(sae, folder.parent / f"{folder.name}-ours")):
        torch.testing.assert_close(each.encode(like).double(), features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(each(like).double(), made, rtol=1e-5, atol=1e-5)
        assert each.id == sae.id
        assert not any(parameter.requires_grad for parameter in each.parameters())


def again(sae: Any, folder: Path) -> Any:
    save_sae(sae, folder, about={"made": "in a test"})
    return load_sae(folder)


def test_gemma_scope_1_is_read_by_its_path(tmp_path: Path) -> None:
    folder = gemma_1(tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82", published())
    check_by_hand(folder, published())
    assert load_sae(folder).id == SaeId("layer_12")
    root = tmp_path / "gemma-scope-2b-pt-res"
    assert load_sae(root, "layer_12/width_16k/average_l0_82").site == "layer_12"
    assert load_sae(folder).published_l0 == 82


def test_gemma_scope_2_is_read_with_and_without_its_config(tmp_path: Path) -> None:
    name = Path("resid_post") / "layer_12_width_16k_l0_medium"
    bare = gemma_2(tmp_path / "bare" / name, published())
    check_by_hand(bare, published())
    assert load_sae(bare).id == SaeId("layer_12")
    config = {"architecture": "jump_relu", "model_name": "google/gemma-3-270m-it", "type": "sae", "l0": 60,
              "hf_hook_point_in": "model.layers.5.output", "hf_hook_point_out": "model.layers.5.output",
              "width": WIDTH, "affine_connection": False}  # fmt: skip
    said = gemma_2(tmp_path / "anywhere", published(), config)
    check_by_hand(said, published())
    assert load_sae(said).id == SaeId("layer_05", "google/gemma-3-270m-it")
    described = "10 features (jumprelu) of layer_05, width 6 of google/gemma-3-270m-it, states as they are, L0 60"
    assert load_sae(said).describe() == described


def test_gemma_scope_in_a_folder_of_another_name_needs_its_site(tmp_path: Path) -> None:
    folder = gemma_2(tmp_path / "downloaded", published())
    with pytest.raises(UserError, match="site: neither file nor path says where it reads; give site=layer_NN"):
        load_sae(folder)
    assert load_sae(folder, site="layer_03").site == "layer_03"
    with pytest.raises(UserError, match="mean_norm: Gemma Scope reads states as they are"):
        load_sae(folder, site="layer_03", mean_norm=2.0)


@pytest.mark.parametrize("key", ["threshold", "log_threshold"])
def test_saelens_6_is_read_whatever_its_threshold_is_called(key: str, tmp_path: Path) -> None:
    weights = published()
    stored = {**weights, key: weights["threshold"] if key == "threshold" else weights["threshold"].log()}
    stored = {name: stored[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", key)}
    check_by_hand(saelens(tmp_path / "sae", stored, **V6), weights)
    assert load_sae(tmp_path / "sae").id == SaeId("layer_12", "gemma-2-2b")


def test_saelens_5_is_a_relu_that_takes_the_bias_off_first(tmp_path: Path) -> None:
    weights = published()
    stored = {name: tensor for name, tensor in weights.items() if name != "threshold"}
    folder = saelens(tmp_path / "sae", stored | {"scaling_factor": torch.ones(WIDTH)}, **V5)
    by_hand = weights | {"b_enc": weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]}
    check_by_hand(folder, by_hand | {"threshold": torch.zeros(WIDTH)})
    assert load_sae(folder).id == SaeId("layer_07", "gpt2-small")


def test_matrices_that_lie_the_other_way_round_are_turned(tmp_path: Path) -> None:
    weights = published()
    turned = {name: tensor.t().contiguous() if "W_" in name else tensor for name, tensor in weights.items()}
    check_by_hand(saelens(tmp_path / "sae", turned, **V6), weights)


def test_a_square_one_is_read_as_its_format_has_it(tmp_path: Path) -> None:
    weights = published(width=D_MODEL)
    check_by_hand(saelens(tmp_path / "sae", weights, **V6 | {"d_sae": D_MODEL}), weights)


@pytest.mark.parametrize("rescale", [False, True])
def test_topk_of_both_versions_keeps_its_k_and_its_decoders_lengths(rescale: bool, tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in published().items() if name != "threshold"}
    config = V6 | {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": rescale}
    new = load_sae(saelens(tmp_path / "new", weights, **config))
    pre = X.double() @ weights["W_enc"].double() + weights["b_enc"].double()
    pre = pre * weights["W_dec"].double().norm(dim=1) if rescale else pre
    kept = torch.zeros_like(pre)
    for n, row in enumerate(pre):
        for j in row.argsort(descending=True)[:3]:
            kept[n, j] = max(float(row[j]), 0.0)
    torch.testing.assert_close(new.encode(X).double(), kept, rtol=1e-5, atol=1e-5)
    rows = weights["W_dec"].double()
    rows = rows / rows.norm(dim=1, keepdim=True) if rescale else rows
    torch.testing.assert_close(new(X).double(), kept @ rows + weights["b_dec"].double(), rtol=1e-5, atol=1e-5)
    if not rescale:
        old = V5 | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "apply_b_dec_to_input": False}
        assert torch.equal(load_sae(saelens(tmp_path / "old", weights, **old)).encode(X), new.encode(X))


def test_states_rescaled_to_a_mean_length_need_it_and_it_goes_into_the_weights(tmp_path: Path) -> None:
    weights, mean = published(), 3.0
    folder = saelens(tmp_path / "sae", weights, **V6 | {"normalize_activations": "expected_average_only_in"})
    with pytest.raises(UserError, match="give mean_norm, that of the states"):
        load_sae(folder)
    factor = math.sqrt(D_MODEL) / mean
    features, made = jump_relu_by_hand(weights, X * factor)
    sae = load_sae(folder, mean_norm=mean)
    torch.testing.assert_close(sae.encode(X).double(), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(X).double(), made / factor, rtol=1e-5, atol=1e-5)
    plain = saelens(tmp_path / "plain", weights, **V6)
    with pytest.raises(UserError, match="mean_norm: only for normalize_activations=expected_average_only_in"):
        load_sae(plain, mean_norm=mean)


def test_norm_and_bias_of_ours_are_kept_and_so_are_their_numbers(tmp_path: Path) -> None:
    sae = TopK(SaeId("final_pre_norm", "toy", "ab" * 32), D_MODEL, WIDTH, k=2, norm="layer_norm", subtracts_bias=True)
    with torch.no_grad():
        for i, parameter in enumerate(sae.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=i))
    read = again(sae, tmp_path / "ours")
    assert (read.id, read.norm, read.subtracts_bias, read.options()) == (sae.id, "layer_norm", True, {"k": 2})
    assert torch.equal(read(X), sae(X))
    assert read.describe() == "10 features (topk k=2) of final_pre_norm, width 6 of toy, states by layer_norm"
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"cfg.json", "sae_weights.safetensors"}


def test_16_bit_files_are_float32_once_read(tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in published().items()}
    check_by_hand(saelens(tmp_path / "sae", weights, **V6), {name: tensor.float() for name, tensor in weights.items()})


def test_pickled_files_are_refused_without_being_read(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "ae.pt")
    with pytest.raises(UserError, match=r"ae.pt is pickled, which could run code and is never read"):
        load_sae(tmp_path)
    inside = gemma_1(tmp_path / "resid_post" / "layer_01", published())
    np.savez(inside / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="damaged, or pickled inside, which is never read"):
        load_sae(inside)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architecture": "gated"}, "architecture: expected standard, jumprelu or topk, got gated"),
        ({"architecture": "topk"}, "k: expected the number of features that topk keeps, found none"),
        ({"hook_name": "blocks.3.hook_mlp_out", "metadata": {}}, "reads blocks.3.hook_mlp_out, expected the residual"),
        ({"hook_name": "blocks.0.hook_resid_pre", "metadata": {}}, "reads blocks.0.hook_resid_pre, expected"),
        ({"normalize_activations": "batch"}, "norm: expected one of none, .* got 'batch'"),
    ],
)
def test_saelens_of_another_kind_is_refused_by_name(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = saelens(tmp_path / "sae", published(), **V6 | config)
    with pytest.raises(UserError, match=words) as raised:
        load_sae(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b_enc": None}, "b_enc is missing"),
        ({"r_mag": torch.zeros(WIDTH)}, "r_mag is unknown"),
        ({"scaling_factor": torch.full((WIDTH,), 2.0)}, "scaling_factor .* fold it into W_dec first"),
        ({"W_enc": torch.zeros(D_MODEL, WIDTH + 1)}, "W_enc: expected 10 × 6, by b_enc and b_dec, got 6 × 11"),
        ({"threshold": torch.zeros(WIDTH + 1)}, "weights of sizes that don't go together"),
        ({"b_dec": torch.full((D_MODEL,), math.nan)}, "decoder_bias: expected finite numbers"),
    ],
)
def test_weights_that_do_not_belong_together_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in (published() | change).items() if tensor is not None}
    with pytest.raises(UserError, match=words):
        load_sae(saelens(tmp_path / "sae", weights, **V6))


def test_missing_damaged_and_contradicting_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_sae(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no sparse autoencoder is here"):
        load_sae(tmp_path)
    folder = saelens(tmp_path / "sae", published(), **V6)
    with pytest.raises(UserError, match="site: expected layer_12, where it was trained, got layer_03"):
        load_sae(folder, site="layer_03")
    (folder / "cfg.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(UserError, match=r"cfg\.json: expected settings by name"):
        load_sae(folder)
    (folder / "sae_weights.safetensors").write_bytes(b"\x00" * 50)
    (folder / "cfg.json").write_text(json.dumps(V6), encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        load_sae(folder)


def test_hub_is_asked_for_the_files_that_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    gemma_2(tmp_path / "resid_post" / "layer_02_width_16k_l0_medium", published())

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("tiltmeter.sparse.files.snapshot_download", download)
    sae = load_sae("google/gemma-scope-2-270m-it", "resid_post/layer_02_width_16k_l0_medium", revision="abc")
    assert (sae.site, asked["name"], asked["revision"]) == ("layer_02", "google/gemma-scope-2-270m-it", "abc")
    assert all(
        p.startswith("resid_post/layer_02") and p.endswith((".npz", ".safetensors", ".json"))
        for p in asked["allow_patterns"]
    )

    def fail(name: str, **options: Any) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr("tiltmeter.sparse.files.snapshot_download", fail)
    with pytest.raises(UserError, match="cannot be read from the Hugging Face hub") as raised:
        load_sae("google/gemma-scope-2-270m-it", "resid_post/layer_02")
    assert "\n" not in str(raised.value)


def test_a_jump_relu_with_a_threshold_below_0_is_a_relu() -> None:
    sae = JumpReLU(SaeId("layer_00"), D_MODEL, WIDTH)
    with torch.no_grad():
        sae.encoder_weight.copy_(noise(WIDTH, D_MODEL))
        sae.threshold.fill_(-1.0)
    torch.testing.assert_close(sae.encode(X), (X @ sae.encoder_weight.t()).relu())


def test_files_of_one_kind_alone_are_needed(tmp_path: Path) -> None:
    save_file(published(), tmp_path / "sae_weights.safetensors")
    with pytest.raises(UserError, match=r"cfg\.json: expected a JSON file beside it"):
        load_sae(tmp_path)
