"""Row F30 of the fault list: blocks that run again in the backward pass are recorded once, and nothing of them stays."""

import gc
from collections import Counter

import pytest
from torch import Tensor
from torch.testing import assert_close

from lightning_modules.policy import checkpoint_activations
from tests.tiny_models import make_model, random_pairs
from tiltmeter.models.layers import backbone, decoder_blocks
from tiltmeter.pairs.batch import collate_pairs
from tiltmeter.states.capture import capture, capture_gradients, read_hidden_states
from tiltmeter.states.positions import readings


def numbers_alive() -> int:
    """In all tensors of this process that Python knows of, after what nobody refers to has gone."""
    gc.collect()
    return sum(one.numel() for one in gc.get_objects() if type(one) is Tensor)


@pytest.mark.slow
def test_every_block_is_recorded_once_a_step_and_two_hundred_steps_take_no_more_memory_than_twenty() -> None:
    model = make_model("llama").train()
    batch = collate_pairs(random_pairs(3), pair_index=range(3), layout="concatenated")
    expected = read_hidden_states(model, batch, sites="all", positions=["prompt_last"])
    wanted = {"prompt_last": readings(batch, "prompt_last")}
    checkpoint_activations(model)
    n_run: Counter[str] = Counter()
    for i, block in enumerate(decoder_blocks(model)):  # what lies inside: the block itself is called once
        block.mlp.register_forward_pre_hook(lambda *_, name=f"block {i}": n_run.update([name]))
    alive = []
    for step in range(1, 201):
        receive = capture_gradients(model, lambda gradient: n_run.update(["gradients"]))
        with capture(model, "all", wanted) as captured, receive:
            states = backbone(model)(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
            states.last_hidden_state.square().mean().backward()
        if step in (20, 200):
            alive.append(numbers_alive())
    assert n_run == {"block 0": 400, "block 1": 400, "gradients": 200}, "this test is about blocks that run twice"
    assert captured.keys() == expected.keys()
    for point, rows in captured.items():
        assert_close(rows, expected[point].rows)
    assert alive[0] == alive[1]
