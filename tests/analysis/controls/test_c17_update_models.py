"""Models of the update on states read a second way, a planted shift, and options that are refused."""

import pytest
import torch
from torch import Tensor

from analysis.controls.c17_update_models import UpdateModelsControl, update_models_section
from analysis.open.checkpoints import Checkpoints
from tests.analysis.asked import checkpoints
from tests.analysis.legible import assert_legible
from tiltmeter.errors import UserError
from tiltmeter.geometry.update_models import UpdateModels
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM


@pytest.fixture(scope="module")
def about() -> Checkpoints:
    return checkpoints(24)


@torch.no_grad()
def last_of_prompts(about: Checkpoints, side: str) -> Tensor:
    """States after the first block, by transformers' own option."""
    model = getattr(about, side).model
    read = [
        model(torch.tensor([list(p.ids.prompt_ids)]), output_hidden_states=True).hidden_states[1] for p in about.pairs
    ]
    return torch.stack([hidden[0, -1] for hidden in read])


def test_scores_are_those_of_the_states_of_each_prompt(about: Checkpoints) -> None:
    table = UpdateModelsControl(sites=["layer_00", FINAL_POST_NORM], positions=["prompt_last"], seed=3).table(about)
    models = UpdateModels(32, seed=3)
    models.update(*(last_of_prompts(about, side) for side in ("base", "aligned")), [p.group for p in about.pairs])
    expected = {score.model: score.r_squared for score in models.scores()}
    rows = table[table["site"] == "layer_00"].set_index("model")
    assert rows["r_squared"].to_dict() == pytest.approx(expected, abs=1e-4)
    assert rows["gained"].to_dict() == pytest.approx(
        {k: x - expected["constant"] for k, x in expected.items()}, abs=2e-4
    )
    assert (rows["lowest_fold"] <= rows["r_squared"]).all()
    assert (rows["r_squared"] <= rows["highest_fold"]).all()
    assert set(table["n"]) == {24}


def test_planted_shift_is_no_function_of_the_state() -> None:
    planted = checkpoints(24, aligned=0)
    shift = 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    planted.aligned.model.model.norm.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + shift,))
    section = update_models_section(
        UpdateModelsControl(sites=[FINAL_PRE_NORM], positions=["prompt_last", "diverge"]).table(planted)
    )
    assert_legible(section)
    assert section.table.query("model == 'constant'")["r_squared"].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert section.headlines[0].value == "2 of 2"
    assert "explains 1.00 of the update, a constant 1.00 (the last layer)" in section.sentences[0]


def test_update_that_follows_the_state_is_told_from_a_shift() -> None:
    planted = checkpoints(60, aligned=0)
    along, weights = (torch.randn(32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    planted.aligned.model.model.norm.register_forward_pre_hook(
        lambda _module, inputs: (inputs[0] + (inputs[0] - inputs[0].mean()) @ weights[:, None] * along,)
    )
    section = update_models_section(
        UpdateModelsControl(sites=[FINAL_PRE_NORM], positions=["content"], ranks=[1]).table(planted)
    )
    rows = section.table.set_index("model")["r_squared"]
    assert rows["own_rank_1"] == pytest.approx(1, abs=1e-4), "one direction, of a length that depends on the state"
    assert rows["affine"] > rows["constant"] + 0.05
    assert section.headlines[0].value == "0 of 1"


def test_bad_option_or_too_few_prompts_is_one_line() -> None:
    for options, said in (
        ({"n_folds": 2}, r"update_models\.n_folds: expected at least 3, got 2"),
        ({"ranks": [0]}, r"update_models\.ranks: expected at least 1, got 0"),
        ({"positions": ["response_all"]}, r"update_models\.positions: expected one of .*got response_all"),
    ):
        with pytest.raises(UserError, match=said):
            UpdateModelsControl(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"pairs: layer_00, prompt_last: .*at least 3 folds.*pairs.n_pairs"):
        UpdateModelsControl(sites="layer_00", positions=["prompt_last"]).table(checkpoints(2))
