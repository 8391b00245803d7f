"""Depth of two models against passes written out in float64, and on models whose change is planted in early or late tokens."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch

from analysis.belief.depth import CHANGE, CHOSEN, EVEN, FIRST, LATER, LEFT, OWN, SHARE, Depth, depth_section
from analysis.open.checkpoints import Checkpoints
from analysis.open.models import LoadedModel
from analysis.open.pair_log_probs import compare_on_pairs, tokens_of_pairs
from analysis.open.probe_pairs import ProbePair
from analysis.steering.directions import split_by_prompt
from datamodules.synthetic import SyntheticWorld
from tests.analysis import asked
from tests.analysis.legible import assert_legible
from tiltmeter.errors import UserError
from tiltmeter.models.layers import final_norm
from tiltmeter.pairs.batch import TokenizedPair

PROMPT, LENGTH = 6, 24


def of_one_length(n: int) -> list[ProbePair]:
    """Pairs whose prompts have 6 tokens and whose responses have 24, so that a position says which token of a response it is."""
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(8, len(asked.TOKENIZER), (length,), generator=draw).tolist()

    tokens = [TokenizedPair(ids(PROMPT), ids(LENGTH), ids(LENGTH)) for _ in range(n)]
    return [replace(pair, ids=of) for pair, of in zip(asked.probe_pairs(n), tokens, strict=True)]


def planted(where: Callable[[torch.Tensor], torch.Tensor], *, strength: float = 3.0) -> Checkpoints:
    """An aligned model that is the base but for a shift where some tokens of a response are predicted, before its final norm."""
    pairs, base, aligned = of_one_length(16), asked.opened(0), asked.opened(0)
    shift = strength * torch.randn(32, generator=torch.Generator().manual_seed(1))
    positions: list[torch.Tensor] = []

    def keep(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        positions[:] = [kwargs["position_ids"]]

    def move(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        token = positions[0] - PROMPT + 2  # token of the response that is predicted there, from 1
        return (inputs[0] + where(token)[..., None] * shift,)

    aligned.model.model.register_forward_pre_hook(keep, with_kwargs=True)
    final_norm(aligned.model).register_forward_pre_hook(move)
    return Checkpoints(base, aligned, pairs)


def known(table: pd.DataFrame) -> pd.Series:
    return table.set_index(["measure", "response", "at"])["value"]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    about = replace(asked.checkpoints(16), pairs=of_one_length(16))
    return Depth(max_new_tokens=8, forced=[1, 5, 99]).table(about)


def test_every_token_has_the_log_probs_and_divergence_of_a_straight_computation() -> None:
    two = [LoadedModel(asked.opened(seed).model.double(), asked.TOKENIZER) for seed in (0, 1)]
    pairs = [pair.ids for pair in asked.probe_pairs(5)]
    move = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = compare_on_pairs(*two, pairs, move=move)
    for of, base, aligned in zip(found, *(tokens_of_pairs(model, pairs) for model in two), strict=True):
        for side in ("chosen", "rejected"):
            assert getattr(of, side).base.tolist() == pytest.approx(getattr(base, side).tolist(), abs=1e-9)
            assert getattr(of, side).aligned.tolist() == pytest.approx(getattr(aligned, side).tolist(), abs=1e-9)
    ids = torch.tensor([[*pairs[0].prompt_ids, *pairs[0].rejected_ids]])
    first = len(pairs[0].prompt_ids) - 1
    with torch.no_grad():
        start, aim = (model.model(input_ids=ids, use_cache=False).logits[0, first:-1].log_softmax(-1) for model in two)
        hidden = two[0].model.model(input_ids=ids, use_cache=False).last_hidden_state[0, first:-1] + move
        moved = two[0].model.lm_head(hidden).log_softmax(-1)
    assert found[0].rejected.kl.tolist() == pytest.approx((aim.exp() * (aim - start)).sum(-1).tolist(), abs=1e-9)
    assert found[0].rejected.kl_moved.tolist() == pytest.approx((aim.exp() * (aim - moved)).sum(-1).tolist(), abs=1e-9)


def test_change_of_the_first_three_tokens_is_shallow_and_one_of_late_tokens_is_not() -> None:
    early = known(Depth(max_new_tokens=LENGTH).table(planted(lambda token: (token >= 1) & (token <= 3))))
    for response in (OWN, CHOSEN):
        assert early[SHARE, response, 5] >= 0.8 > 0.3 > early[EVEN, response, 5]
    assert abs(early[CHANGE, "", 0]) > 0.1
    assert early[CHANGE, "", 3] == pytest.approx(0, abs=1e-4), "three forced tokens undo all of it"
    both = planted(lambda token: (token >= 1) & (token <= 3) | (token >= 10), strength=1.0)
    late = known(Depth(max_new_tokens=LENGTH).table(both))
    assert max(late[SHARE, response, 5] for response in (OWN, CHOSEN)) < 0.5
    assert abs(late[CHANGE, "", 3]) > 0.1


def test_shift_of_every_token_is_recovered_at_every_token() -> None:
    about = asked.checkpoints(12, aligned=0)
    shift = torch.randn(32, generator=torch.Generator().manual_seed(0))
    final_norm(about.aligned.model).register_forward_hook(lambda _, __, out: out + shift)
    found = known(Depth(max_new_tokens=8, forced=[1]).table(about))
    assert [found[name, CHOSEN, 5] for name in (FIRST, LATER)] == pytest.approx([1.0, 1.0], abs=1e-4)


def test_odds_after_forced_tokens_are_those_of_pairs_that_begin_with_them(table: pd.DataFrame) -> None:
    about = replace(asked.checkpoints(16), pairs=of_one_length(16))
    test = [pair.ids for pair in split_by_prompt(about.pairs, seed=0).test]
    changes = {}
    for k in (0, 5):
        begun = [TokenizedPair([*p.prompt_ids, *p.rejected_ids[:k]], p.chosen_ids, p.rejected_ids[k:]) for p in test]
        said = [tokens_of_pairs(model, begun) for model in (about.base, about.aligned)]
        odds = [torch.stack([of.chosen.sum() - of.rejected.sum() for of in pairs]) for pairs in said]
        changes[k] = odds[1] - odds[0]
        assert known(table)[CHANGE, "", k] == pytest.approx(float(changes[k].mean()), rel=1e-5)
    assert (CHANGE, "", 99) not in known(table).index, "no rejected response is so long"
    left = known(table)[LEFT, "", 5]
    assert left != left or left == pytest.approx(float(changes[5].sum() / changes[0].sum()), rel=1e-4)


def test_depth_section_is_legible_and_its_title_has_the_number(table: pd.DataFrame) -> None:
    section = depth_section(table)
    assert_legible(section)
    share = known(table)[SHARE, OWN, 5]
    assert f"hold {100 * share:.0f}\xa0%" in section.sentences[0]
    assert section.headlines[0].value == f"{100 * share:.0f}\xa0%"


def test_oracle_judges_what_follows_forced_tokens_in_a_synthetic_world() -> None:
    world = SyntheticWorld(n_prompts=40)
    about = asked.checkpoints(8)
    attributes = world.load()[0][0].attributes
    pairs = [replace(pair, attributes=attributes, rejected=pair.rejected) for pair in about.pairs]
    found = Depth(max_new_tokens=4, forced=[2]).table(replace(about, pairs=pairs, world=world))
    rates = found[found["measure"] == "oracle_preference_rate"]
    assert rates["at"].tolist() == [0, 2]
    assert rates["value"].between(0, 1).all()
    assert_legible(depth_section(found))


def test_bad_depth_option_is_one_line() -> None:
    for options, said in (
        ({"forced": [-1]}, r"depth\.forced: expected at least 0, got -1"),
        ({"max_new_tokens": 0}, r"depth\.max_new_tokens: expected at least 1"),
        ({"n_prompts": 0}, r"depth\.n_prompts: expected at least 1"),
        ({"dtype": "int8"}, r"depth\.dtype: expected one of"),
    ):
        with pytest.raises(UserError, match=said):
            Depth(**options)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"depth\.max_new_tokens: 5000 tokens behind their prompts leave fewer than two pairs"
    ):
        Depth(max_new_tokens=5000).costs(asked.checkpoints(8))
    with pytest.raises(UserError, match="there is no v\\*"):
        Depth().table(asked.checkpoints(8, aligned=0))
