"""The recovery ladder by whole passes with the aligned model's states in place of the base's; planted updates; bad options."""

from typing import Any

import pandas as pd
import pytest
import torch

from analysis.controls.c16_recovery_ladder import RecoveryLadder, recovery_ladder_section
from analysis.open.checkpoints import Checkpoints
from analysis.steering.directions import split_by_prompt
from tests.analysis.asked import checkpoints
from tests.analysis.legible import assert_legible
from tiltmeter.errors import UserError
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM
from tiltmeter.pairs.batch import collate_pairs
from tiltmeter.pairs.log_probs import model_inputs

SITES = ["layer_00", FINAL_PRE_NORM, FINAL_POST_NORM]


@pytest.fixture(scope="module")
def about() -> Checkpoints:
    """Two models with one unembedding, whose blocks differ."""
    found = checkpoints(12, aligned=0)
    with torch.no_grad():
        for block in found.aligned.model.model.layers:
            weight = block.mlp.down_proj.weight
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return found


@pytest.fixture(scope="module")
def table(about: Checkpoints) -> pd.DataFrame:
    return RecoveryLadder(sites=SITES, ranks=[1, 4]).table(about)


@torch.no_grad()
def recovered_by_own_states(about: Checkpoints, pairs: Any) -> float:
    """R of the base whose first block gives what the aligned model's gives, wherever a response's token is predicted from."""
    base, aligned = about.base.model, about.aligned.model
    kl = torch.zeros(2, dtype=torch.float64)
    for pair in pairs:
        batch = collate_pairs([pair.ids], pair_index=[0], layout="concatenated")
        n = len(pair.ids.chosen_ids)
        reads = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        reads.view(-1)[batch.target_rows] = True
        held: list[torch.Tensor] = []

        def log_probs(model: Any, batch: Any = batch, n: int = n) -> torch.Tensor:
            logits = model(**model_inputs(model, batch)).logits.flatten(0, 1)[batch.target_rows[:n]]
            return logits.double().log_softmax(-1)

        handle = aligned.model.layers[0].register_forward_hook(lambda _m, _i, out, held=held: held.append(out))
        aim = log_probs(aligned)
        handle.remove()
        handle = base.model.layers[0].register_forward_hook(
            lambda _m, _i, out, held=held, reads=reads: torch.where(reads[..., None], held[0], out)
        )
        steered = log_probs(base)
        handle.remove()
        for i, other in enumerate((steered, log_probs(base))):
            kl[i] += (aim.exp() * (aim - other)).sum()
    return float(1 - kl[0] / kl[1])


def test_oracle_is_the_aligned_models_states_in_place_of_the_bases(about: Checkpoints, table: pd.DataFrame) -> None:
    known = table.set_index(["site", "step"])
    test = split_by_prompt(about.pairs, seed=0).test
    assert known.loc[("layer_00", "own"), "recovery"] == pytest.approx(recovered_by_own_states(about, test), abs=1e-4)
    for site in (FINAL_PRE_NORM, FINAL_POST_NORM):
        assert known.loc[(site, "own"), "recovery"] == pytest.approx(1, abs=1e-5)
    assert known.loc[("layer_00", "own"), "recovery"] < 0.99, "the prompt's states stay the base's"
    assert (known["share_of_own"] * known["recovery"].groupby("site").transform("last")).tolist() == pytest.approx(
        known["recovery"].tolist(), abs=1e-6
    )
    assert known.loc[(FINAL_PRE_NORM, "rank_1"), "recovery"] < known.loc[(FINAL_PRE_NORM, "rank_4"), "recovery"] < 0.999


def test_planted_constant_shift_needs_one_vector_alone() -> None:
    planted = checkpoints(12, aligned=0)
    shift = 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    planted.aligned.model.model.norm.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + shift,))
    section = recovery_ladder_section(RecoveryLadder(sites=[FINAL_PRE_NORM], ranks=[1]).table(planted))
    assert section.table["step"].tolist() == ["v*", "mean", "rank_1", "own"]
    assert section.table["recovery"].tolist() == pytest.approx([1.0] * 4, abs=1e-4)
    assert section.headlines[0].value == "1 of 1"


def test_ladder_section_is_legible_and_names_the_share(table: pd.DataFrame) -> None:
    section = recovery_ladder_section(table)
    assert_legible(section)
    assert section.headlines[0].value == "0 of 3"
    assert section.sentences[0] == "One vector recovers 13\xa0% of the way, each token’s own update 49\xa0% (layer 0)"


def test_bad_ladder_option_is_one_line(about: Checkpoints) -> None:
    for options, said in (
        ({"ranks": []}, r"recovery_ladder\.ranks: expected at least 1, got 0"),
        ({"n_prompts": 0}, r"recovery_ladder\.n_prompts: expected at least 1"),
        ({"dtype": "int8"}, r"recovery_ladder\.dtype: expected one of"),
    ):
        with pytest.raises(UserError, match=said):
            RecoveryLadder(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="this model has 2 blocks"):
        RecoveryLadder(sites="layer_09").costs(about)
