"""Every kind of vector by a second way, on states read one pair at a time; norms; files and runs of others; what is refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from torch import Tensor

from analysis.open.checkpoints import Checkpoints
from analysis.open.models import LoadedModel
from analysis.steering.directions import KINDS, Kind, split_by_prompt
from analysis.steering.vectors import Vectors, Wanted, describe, estimate_vectors
from datamodules.tokenization import train_bpe_tokenizer
from tests.analysis import asked
from tests.analysis.asked import checkpoints, probe_pairs, save_model
from tests.tiny_models import make_model
from tiltmeter.errors import UserError
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM
from tiltmeter.steering.vector import (
    OWN,
    RANDOM,
    RANDOM_KINDS,
    SHUFFLED,
    V_BAR,
    V_STAR,
    SteeringVector,
    VectorId,
    load_vectors,
    save_vectors,
)

SITES = ("layer_00", FINAL_PRE_NORM, FINAL_POST_NORM)
MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def about() -> Checkpoints:
    return checkpoints(10)


def estimate(about: Checkpoints, kinds: Sequence[str] = (), **options: Any) -> Vectors:
    wanted = Wanted([Kind.of(kind) for kind in kinds], **({"n_random": 3} | options))
    return estimate_vectors(about, about.pairs, options.get("sites", SITES), wanted)


@torch.no_grad()
def states(opened: LoadedModel, ids: list[int], site: str) -> Tensor:
    """Of every token, by transformers' own option."""
    if site == FINAL_PRE_NORM:  # which that option does not give
        held: list[Tensor] = []
        handle = opened.model.model.norm.register_forward_pre_hook(lambda _m, args: held.append(args[0]))
        opened.model(torch.tensor([ids]))
        handle.remove()
        return held[0][0].double()
    hidden = opened.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return hidden[-1 if site == FINAL_POST_NORM else int(site.removeprefix("layer_")) + 1][0].double()


def rows(about: Checkpoints, side: str, site: str, position: str) -> Tensor:
    """prompt_last: a row a pair; response_mean, response_last: chosen of all pairs, then rejected."""
    opened = getattr(about, side)
    if position == "prompt_last":
        return torch.stack([states(opened, list(pair.ids.prompt_ids), site)[-1] for pair in about.pairs])
    read = []
    for name in ("chosen_ids", "rejected_ids"):
        for pair in about.pairs:
            answer = states(opened, [*pair.ids.prompt_ids, *getattr(pair.ids, name)], site)[len(pair.ids.prompt_ids) :]
            read.append(answer.mean(0) if position == "response_mean" else answer[-1])
    return torch.stack(read)


def second_way(about: Checkpoints, name: str, site: str) -> Tensor:
    """A vector of any length."""
    kind, _, position = name.partition("@")
    position = position or "prompt_last"
    if kind == V_BAR:
        weight = about.base.model.get_output_embeddings().weight.detach().double()
        means = [weight[list(p.ids.chosen_ids)].mean(0) - weight[list(p.ids.rejected_ids)].mean(0) for p in about.pairs]
        return torch.stack(means).mean(0)
    base, policy = (rows(about, side, site, position) for side in ("base", "aligned"))
    v = (policy - base).mean(0)
    if kind == V_STAR:
        return v
    n = len(about.pairs)
    if kind == "difference_of_means":
        return base[:n].mean(0) - base[n:].mean(0)
    matrix = {"singular": policy - base, "pca": base}[kind.split("_")[0]]
    if "centred" in kind:
        matrix = matrix - matrix.mean(0)
    number = int(kind.rpartition("_")[2])
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    found = vectors[:, values.argsort(descending=True)[number - 1]]
    return found * torch.sign(found @ v)


@pytest.mark.parametrize(
    "kind",
    [
        *("v*", "v_bar", "v*@response_mean", "v*@response_last", "singular_raw", "singular_centred", "pca_raw"),
        *("pca_centred", "difference_of_means", "difference_of_means@response_last", "singular_raw@response_mean"),
    ],
)
def test_a_vector_is_what_its_name_says_at_its_own_norm_or_that_of_v_star(about: Checkpoints, kind: str) -> None:
    found = estimate(about, [V_STAR, kind] if kind != V_STAR else [V_STAR], n_directions=2).by_key
    names = {name for name, _ in found} - ({V_STAR} if kind != V_STAR else set())
    assert len(names) == (2 if "_raw" in kind or "_centred" in kind else 1)
    assert {site for name, site in found if name in names} == ({FINAL_POST_NORM} if kind == V_BAR else set(SITES))
    for name in names:
        for site in {site for other, site in found if other == name}:
            vector, expected = found[name, site], second_way(about, name, site)
            cosine = float(vector.values.double() @ expected / vector.norm() / expected.norm())
            assert cosine == pytest.approx(1, abs=2e-3 if "singular" in name or "pca" in name else 1e-5), (name, site)
            has_length = "singular" not in name and "pca" not in name
            length = expected.norm() if has_length else found[V_STAR, site].norm()
            assert vector.norm() == pytest.approx(float(length), rel=1e-4 if has_length else 1e-6)
    if kind != V_BAR:
        position = kind.partition("@")[2] or ("response_mean" if kind.startswith("difference") else "prompt_last")
        assert {found[name, "layer_00"].id.position for name in names} == {position}


def test_the_probe_is_that_of_scikit_learn(about: Checkpoints) -> None:
    found = estimate(about, [V_STAR, "probe"]).by_key["probe@response_mean", "layer_00"]
    base, n = rows(about, "base", "layer_00", "response_mean"), len(about.pairs)
    differences = (base[:n] - base[n:]).numpy()
    scale = np.sqrt((differences**2).mean(0) * differences.shape[1])
    both = np.concatenate([differences, -differences]) / scale
    probe = LogisticRegression(C=0.5, fit_intercept=False, max_iter=1000).fit(
        both, np.repeat([1, 0], n)
    )  # each pair twice
    weights = torch.from_numpy(probe.coef_[0] / scale)
    assert float(found.values.double() @ weights / weights.norm() / found.norm()) == pytest.approx(1, abs=1e-3)


def test_random_controls_have_the_norm_and_are_all_different(about: Checkpoints) -> None:
    kinds = [V_STAR, *RANDOM_KINDS]
    found = estimate(about, kinds)
    assert {name for name, _ in found.drawn} == set(RANDOM_KINDS)
    everything = [v for drawn in found.drawn.values() for v in drawn]
    assert len({tuple(v.values.tolist()) for v in everything}) == len(everything) == 3 * 4 * 3
    uniform = [found.drawn[RANDOM, site][0] for site in SITES]
    a, b = (vector.values / vector.norm() for vector in uniform[:2])
    assert abs(float(a @ b)) < 0.9, "sites do not share directions"
    for site in SITES:
        drawn = [v for (_, at), vectors in found.drawn.items() if at == site for v in vectors]
        assert {round(v.norm() / found.by_key[V_STAR, site].norm(), 5) for v in drawn} == {1.0}
        base = rows(about, "base", site, "prompt_last")
        outside = torch.linalg.svd(base - base.mean(0)).Vh[len(base) - 1 :]  # where centred states never go
        for number in (1, 2, 3):
            for kind in ("random_pca", "random_covariance"):
                vector = found.drawn[kind, site][number - 1]
                assert float((outside @ vector.values.double()).norm()) < 1e-4 * vector.norm()


def test_a_shuffled_layer_is_v_star_of_another_block() -> None:
    about = checkpoints(8, num_hidden_layers=3)
    blocks = [f"layer_{i:02d}" for i in range(3)]
    sites = [*blocks, FINAL_PRE_NORM, FINAL_POST_NORM]
    found = estimate_vectors(about, about.pairs, sites, Wanted([Kind.of(V_STAR), Kind.of(SHUFFLED)])).by_key
    for site in sites:
        vector = found[SHUFFLED, site]
        cosines = {b: torch.cosine_similarity(vector.values, found[V_STAR, b].values, dim=0).item() for b in blocks}
        (giver,) = [block for block, cosine in cosines.items() if cosine > 1 - 1e-5]
        assert giver != (site if site in blocks else blocks[-1])
        assert vector.made.startswith(f"v* of {giver}")
        assert vector.norm() == pytest.approx(found[V_STAR, site].norm(), rel=1e-6)


def test_estimates_come_from_their_half_alone(about: Checkpoints) -> None:
    halves = split_by_prompt(about.pairs, seed=3)
    assert {p.group for p in halves.estimation}.isdisjoint({p.group for p in halves.test})
    assert len(halves.estimation) + len(halves.test) == len(about.pairs)
    assert split_by_prompt(about.pairs[::-1], seed=3).test == halves.test[::-1]
    kinds = [Kind.of(kind) for kind in KINDS]
    whole = estimate_vectors(about, halves.estimation, SITES, Wanted(kinds))
    other = Checkpoints(about.base, about.aligned, halves.estimation)
    assert estimate_vectors(other, halves.estimation, SITES, Wanted(kinds)).fingerprint == whole.fingerprint
    assert estimate_vectors(about, halves.test, SITES, Wanted(kinds)).fingerprint != whole.fingerprint
    assert estimate_vectors(about, halves.estimation, SITES, Wanted(kinds, seed=1)).fingerprint != whole.fingerprint


def test_vectors_are_written_with_all_that_is_known_and_read_again(about: Checkpoints, tmp_path: Path) -> None:
    found = estimate(about, [V_STAR, "probe"], seed=7)
    path = tmp_path / "own.safetensors"
    save_vectors(path, {f"{site}/{name}": vector for (name, site), vector in found.by_key.items()})
    read = load_vectors(path)["layer_00/probe@response_mean"]
    assert read.id == VectorId("probe", "layer_00", "response_mean")
    assert read.made.startswith("logistic probe on h_base of chosen less rejected responses at response_mean, at norm ")
    assert {"base", "aligned", "pairs", "seed", "tokenizer_sha256"} == set(read.provenance)
    again = estimate(about, [V_STAR], files=[path])
    name = "own:layer_00/probe@response_mean"
    assert again.by_key[name, "layer_00"].id == VectorId(OWN, "layer_00", "response_mean", source="own.safetensors")
    assert torch.equal(again.by_key[name, "layer_00"].values, read.values)
    table = describe(again).set_index(["vector", "site"])
    assert table.loc[("own:layer_00/v*", "layer_00"), "cosine_with_v_star"] == pytest.approx(1)


def test_a_file_keeps_its_norm_unless_it_is_asked_to_match(about: Checkpoints, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    values = {
        site: SteeringVector(VectorId(OWN, site), torch.arange(32.0), made="by hand")
        for site in ("layer_00", "layer_01")
    }
    save_vectors(path, values)
    found = estimate(about, [V_STAR], files=[path])
    assert torch.equal(found.by_key["mine:layer_00", "layer_00"].values, torch.arange(32.0))
    assert found.notes == [f"{path}: 1 of 2 vectors are swept; 1 are at other sites."]
    matched = estimate(about, [V_STAR], files=[path], norm="matched").by_key
    assert matched["mine:layer_00", "layer_00"].norm() == pytest.approx(matched[V_STAR, "layer_00"].norm(), rel=1e-6)


def bad_file(tmp_path: Path, what: str) -> Path:
    path = tmp_path / "mine.safetensors"
    site, width = {"site": ("layer_01", 32), "block": ("layer_09", 32), "width": ("layer_00", 16)}.get(
        what, ("layer_00", 32)
    )
    values = torch.zeros(width) if what == "zeros" else torch.ones(width)
    save_vectors(path, {"a": SteeringVector(VectorId(OWN, site), values, made="by hand")})
    if what == "damaged":
        path.write_bytes(path.read_bytes()[:20])
    return tmp_path / "none.safetensors" if what == "missing" else path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("site", r"expected vectors of the sites that are swept, layer_00, .*got layer_01; set steering\.sites"),
        ("block", "this model has 2 blocks"),
        ("width", "expected width 32"),
        ("zeros", "a is a vector of zeros"),
        ("damaged", "damaged or no safetensors file"),
        ("missing", "no such file"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(about: Checkpoints, tmp_path: Path, what: str, message: str) -> None:
    path = bad_file(tmp_path, what)
    with pytest.raises(UserError, match=rf"{path.name}: .*{message}|{path.name}: {message}") as caught:
        estimate(about, [V_STAR], files=[path])
    assert "\n" not in str(caught.value)


def finished_run(make_run: MakeRun, *, seed: int = 2, arm: str | None = "sft_chosen", **options: Any) -> Path:
    run = make_run(prompts=[pair.as_json() for pair in probe_pairs(4)], config={"arm": arm}, **options)
    save_model(run / "base", seed=0)
    save_model(run / "aligned", seed=seed)
    return run


def test_v_star_of_other_runs_is_read_on_the_same_pairs(about: Checkpoints, make_run: MakeRun) -> None:
    runs = [
        finished_run(make_run),
        finished_run(make_run, seed=3, stamp="2026-01-31_13-00-00"),
        finished_run(make_run, seed=1, arm="x; rm", stamp="2026-01-31_14-00-00"),
    ]
    found = estimate(about, [V_STAR], runs=runs).by_key
    assert {name for name, _ in found} == {V_STAR, "v*_of_sft_chosen", "v*_of_sft_chosen_2", "v*_of_run"}
    other = Checkpoints(asked.opened(0), asked.opened(2), about.pairs)
    for site in SITES:
        expected = second_way(other, V_STAR, site)
        vector = found["v*_of_sft_chosen", site]
        assert vector.id == VectorId(V_STAR, site, "prompt_last", source="sft_chosen")
        assert float(vector.values.double() @ expected / expected.norm() / vector.norm()) == pytest.approx(1, abs=1e-5)
        assert vector.norm() == pytest.approx(float(expected.norm()), rel=1e-4)
        assert torch.allclose(found["v*_of_run", site].values, found[V_STAR, site].values, atol=1e-5), "the same models"


@pytest.mark.parametrize("what", ["missing", "shape", "tokenizer"])
def test_a_run_that_does_not_fit_is_one_line(about: Checkpoints, make_run: MakeRun, what: str, tmp_path: Path) -> None:
    run = finished_run(make_run)
    if what == "shape":
        make_model("llama", vocab_size=len(asked.TOKENIZER), num_hidden_layers=3).save_pretrained(run / "aligned")
    elif what == "tokenizer":
        other = train_bpe_tokenizer(["other words entirely " * 20], vocab_size=270)
        other.save_pretrained(run / "base")
    message = {
        "missing": r"^steering\.controls: run: no such folder",
        "shape": r"^steering\.controls: .*expected models of 2 blocks of width 32, .*, got 3 blocks of width 32",
        "tokenizer": r"^steering\.controls: .*its tokenizer is another",
    }[what]
    with pytest.raises(UserError, match=message) as caught:
        estimate(about, [V_STAR], runs=[tmp_path / "nowhere" if what == "missing" else run])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v", r"v: expected a file of vectors \(\.safetensors\) or one of v\*, v_bar"),
        ("v*@response_all", "got position 'response_all'"),
        ("probe@prompt_last", "expected probe, probe@response_mean, probe@response_last"),
        ("v_bar@diverge", "expected v_bar, got position 'diverge'"),
    ],
)
def test_a_kind_that_there_is_not_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^steering\.vectors: .*{message}"):
        Kind.of(text)


def test_what_cannot_be_made_is_one_line(about: Checkpoints) -> None:
    with pytest.raises(
        UserError, match=r"^steering\.vectors: singular_raw at layer_00: cannot be made .*1 to 10 directions"
    ):
        estimate(about, [V_STAR, "singular_raw"], n_directions=11)
    flat = checkpoints(6, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"^steering\.vectors: shuffled_layer at layer_00: .*at least two sites"):
        estimate_vectors(flat, flat.pairs, ["layer_00"], Wanted([Kind.of(SHUFFLED)]))


def test_what_is_said_of_vectors_is_plain(about: Checkpoints) -> None:
    json.dumps(estimate(about, list(KINDS)).made)
