from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tests import stories260k
from tests.tiny_models import ARCHITECTURES, FAMILIES, LAYERS, WIDTH, make_model, padded_left, random_pairs
from tiltmeter.errors import UserError
from tiltmeter.models.layers import all_sites, backbone, decoder_blocks, final_norm, unembedding
from tiltmeter.pairs.batch import PAD, Layout, PreferenceBatch, TokenizedPair, collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.states.capture import (
    HiddenStates,
    ReadPoint,
    capture,
    capture_gradients,
    join_hidden_states,
    read_hidden_states,
)
from tiltmeter.states.positions import POSITIONS, Position, Readings, content_tokens, readings

EVERYWHERE = (*all_sites(LAYERS), f"layer_{LAYERS - 1:02d}")
LAYOUTS: tuple[Layout, ...] = ("shared_prefix", "concatenated")


def batch_of(n: int = 3, layout: Layout = "concatenated", **options: Any) -> PreferenceBatch:
    return collate_pairs(random_pairs(n, **options), pair_index=range(n), layout=layout)


def every_row(batch: PreferenceBatch) -> Readings:
    """All real tokens, in order."""
    rows = (batch.segments.flatten() != PAD).nonzero()[:, 0]
    zeros = torch.zeros_like(rows)
    return Readings(rows, None, zeros, zeros, zeros, (batch.input_ids.shape[0], batch.input_ids.shape[1]))


def plain_forward(model: PreTrainedModel, batch: PreferenceBatch, **options: Any) -> Any:
    mask = (batch.segments != PAD).long()
    return backbone(model)(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False, **options
    )


def hooks(model: PreTrainedModel) -> int:
    modules = [*decoder_blocks(model), final_norm(model)]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


@pytest.fixture
def llama() -> Iterator[PreTrainedModel]:
    model = make_model("llama")
    yield model
    assert hooks(model) == 0


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("left", [False, True])
def test_sites_are_hidden_states_of_hugging_face_at_real_tokens(family: str, left: bool) -> None:
    model = make_model(family, attn="eager")
    batch = padded_left(batch_of()) if left else batch_of()
    wanted = every_row(batch)
    with torch.no_grad():
        expected = plain_forward(model, batch, output_hidden_states=True).hidden_states
        attached = hooks(model)  # Hugging Face leaves its own behind
        with capture(model, EVERYWHERE, {"response_all": wanted}) as captured:
            model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=(batch.segments != PAD).long(),
            )
    assert hooks(model) == attached
    at = {point.site: rows for point, rows in captured.items()}
    assert len(expected) == LAYERS + 1

    def picked(hidden: Tensor) -> Tensor:
        return hidden.flatten(0, 1)[wanted.rows]

    for layer in range(LAYERS - 1):
        assert_close(at[f"layer_{layer:02d}"], picked(expected[layer + 1]), rtol=0, atol=0)
    assert_close(at["final_post_norm"], picked(expected[-1]), rtol=0, atol=0)
    assert torch.equal(at["final_pre_norm"], at[f"layer_{LAYERS - 1:02d}"])
    assert not torch.equal(at["final_pre_norm"], at["final_post_norm"])
    with torch.no_grad():
        assert_close(final_norm(model)(at["final_pre_norm"]), at["final_post_norm"])


@pytest.mark.parametrize("family", FAMILIES)
def test_readings_do_not_depend_on_layout_padding_or_batch(family: str) -> None:
    model = make_model(family, torch.float64, "eager")
    pairs = random_pairs(4, seed=3)
    content = content_tokens([pair.prompt_ids for pair in pairs])

    def read(chosen: Sequence[TokenizedPair], layout: Layout) -> dict[ReadPoint, Tensor]:
        batch = collate_pairs(chosen, pair_index=[pairs.index(pair) for pair in chosen], layout=layout)
        found = read_hidden_states(model, batch, sites="all", positions=POSITIONS, content=content)
        return {point: states.rows for point, states in found.items()}

    shared = read(pairs, "shared_prefix")
    assert set(shared) == {ReadPoint(site, position) for site in all_sites(LAYERS) for position in POSITIONS}
    concatenated = read(pairs, "concatenated")
    alone = [read([pair], "shared_prefix") for pair in pairs]
    for point, rows in shared.items():
        tolerance = {"rtol": 1e-4, "atol": 1e-4}  # some families normalise in float32 whatever their weights
        assert_close(rows, concatenated[point], **tolerance)
        assert_close(rows, torch.cat([one[point] for one in alone]), **tolerance)


def test_joined_batches_give_the_same_rows_however_they_were_cut(llama: PreTrainedModel) -> None:
    pairs = random_pairs(5, seed=1)
    content = content_tokens([pair.prompt_ids for pair in pairs])

    def read(order: list[int]) -> dict[ReadPoint, HiddenStates]:
        batch = collate_pairs([pairs[i] for i in order], pair_index=order)
        return read_hidden_states(llama, batch, sites="all", positions=POSITIONS, content=content)

    whole = join_hidden_states([read([0, 1, 2, 3, 4])])
    pieces = join_hidden_states([read([3, 1]), read([4]), read([2, 0])])
    assert list(whole) == list(pieces)
    for point, states in whole.items():
        assert_close(pieces[point].rows, states.rows)
        assert torch.equal(pieces[point].pair_index, states.pair_index)
        assert torch.equal(pieces[point].sides, states.sides)
    with pytest.raises(ValueError, match="at least one batch"):
        join_hidden_states([])


def test_prompt_and_divergence_are_read_where_the_unembedding_predicts_from(llama: PreTrainedModel) -> None:
    pairs = [TokenizedPair([4, 5, 6], [7, 8, 2], [7, 9, 2])]
    batch = collate_pairs(pairs, pair_index=[9])
    found = read_hidden_states(llama, batch, sites="final_post_norm", positions=["prompt_last", "diverge"])
    logits = llama(input_ids=torch.tensor([[4, 5, 6, 7]])).logits[0]
    weight = unembedding(llama).weight
    assert_close(found[ReadPoint("final_post_norm", "prompt_last")].rows[0] @ weight.T, logits[2])
    assert_close(found[ReadPoint("final_post_norm", "diverge")].rows[0] @ weight.T, logits[3])
    assert found[ReadPoint("final_post_norm", "diverge")].pair_index.tolist() == [9]


def test_what_is_kept_is_a_small_detached_copy_in_the_dtype_asked_for(llama: PreTrainedModel) -> None:
    batch = batch_of()
    wanted = {"prompt_last": readings(batch, "prompt_last")}
    with capture(llama, "layer_00", wanted, dtype=torch.bfloat16) as captured:
        plain_forward(llama, batch)
    (rows,) = captured.values()
    assert rows.dtype == torch.bfloat16
    assert not rows.requires_grad
    assert rows.untyped_storage().nbytes() == 3 * WIDTH * 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_recomputed_in_the_backward_pass_are_not_recorded_again(family: str, reentrant: bool) -> None:
    model = make_model(family)
    batch = batch_of()
    expected = read_hidden_states(model, batch, sites="all", positions=["prompt_last"])
    embedded = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    ran: list[int] = []
    received: list[Tensor] = []

    def forward(inputs_embeds: Tensor) -> Tensor:
        return backbone(model)(inputs_embeds=inputs_embeds, position_ids=batch.position_ids).last_hidden_state

    wanted = {"prompt_last": readings(batch, "prompt_last")}
    handle = decoder_blocks(model)[0].register_forward_hook(lambda *_: ran.append(1))
    with capture(model, "all", wanted) as captured, capture_gradients(model, received.append):
        checkpoint(forward, embedded, use_reentrant=reentrant).sum().backward()
    handle.remove()
    assert len(ran) == 2, "this test is about blocks that run twice"
    assert len(captured) == len(expected)
    for point, rows in captured.items():
        assert_close(rows, expected[point].rows)
    assert len(received) == 1
    assert_close(received[0], torch.ones_like(received[0]))


def test_hooks_are_gone_after_an_exception(llama: PreTrainedModel) -> None:
    batch = batch_of()
    wanted = {"prompt_last": readings(batch, "prompt_last")}
    with pytest.raises(RuntimeError, match="boom"), capture(llama, "all", wanted):
        raise RuntimeError("boom")
    with pytest.raises(UserError, match="layer_09"), capture(llama, ["layer_00", "layer_09"], wanted):
        pass
    assert hooks(llama) == 0
    with capture(llama, "all", wanted):
        plain_forward(llama, batch)
        with pytest.raises(ValueError, match="a second forward pass at layer_00"):
            plain_forward(llama, batch)
    with pytest.raises(ValueError, match="one forward pass on that batch"), capture(llama, "all", wanted):
        plain_forward(llama, batch_of(4))
    llama.model.norm = None
    with pytest.raises(UserError, match="final norm"), capture(llama, ["layer_00", "final_pre_norm"], wanted):
        pass
    assert not any(block._forward_hooks for block in decoder_blocks(llama))
    llama.model.norm = nn.Identity()


@pytest.mark.parametrize("scope", ["blocks", "model"])
def test_a_compiled_model_is_read_also_when_it_ran_before(llama: PreTrainedModel, scope: str) -> None:
    batch = batch_of()
    expected = read_hidden_states(llama, batch, sites="all", positions=["response_mean"])
    for module in decoder_blocks(llama) if scope == "blocks" else [backbone(llama)]:
        module.compile(backend="eager")
    with torch.no_grad():
        plain_forward(llama, batch)
        found = read_hidden_states(llama, batch, sites="all", positions=["response_mean"])
    assert set(found) == set(expected)
    for point, states in found.items():
        assert_close(states.rows, expected[point].rows)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_adapters_change_what_is_read_and_leave_the_blocks_in_place(llama: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    batch = batch_of()
    options: dict[str, Any] = {"sites": "all", "positions": ["prompt_last"]}
    before = read_hidden_states(llama, batch, **options)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=2)
    wrapped = peft.get_peft_model(llama, config)
    model = wrapped.get_base_model()
    after = read_hidden_states(model, batch, **options)
    with wrapped.disable_adapter():
        disabled = read_hidden_states(model, batch, **options)
    for point, states in before.items():
        assert_close(disabled[point].rows, states.rows)
        assert not torch.allclose(after[point].rows, states.rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_a_training_step_are_those_of_autograd_and_zero_where_no_loss_reads(
    llama: PreTrainedModel, layout: Layout
) -> None:
    batch = batch_of(layout=layout)
    received: list[Tensor] = []
    with capture_gradients(llama, received.append):
        with torch.no_grad():
            sequence_log_probs(llama, batch)
        (-sequence_log_probs(llama, batch)).sum().backward()
    assert len(received) == 1
    gradient = received[0].flatten(0, 1)
    read = torch.zeros(len(gradient), dtype=torch.bool)
    read[batch.target_rows] = True
    assert bool((gradient[~read] == 0).all())
    assert bool((gradient[read].norm(dim=1) > 0).all())


def test_a_real_model_gives_the_hidden_states_of_hugging_face(shared_data: Path) -> None:
    model = stories260k.read_model(shared_data / "models" / "stories260K" / "stories260K.bin")
    layers = model.config.num_hidden_layers
    batch = batch_of(4, longest=30)
    position: Position = "response_mean"
    found = read_hidden_states(model, batch, sites="all", positions=[position])
    assert len(found) == layers + 1
    with torch.no_grad():
        expected = plain_forward(model, batch, output_hidden_states=True).hidden_states
    wanted = readings(batch, position)
    for layer in range(layers - 1):
        assert_close(found[ReadPoint(f"layer_{layer:02d}", position)].rows, wanted.gather(expected[layer + 1]))
    assert_close(found[ReadPoint("final_post_norm", position)].rows, wanted.gather(expected[-1]))
