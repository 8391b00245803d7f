"""Implicit rewards of pairs against forward passes written straight down in float64, and what the section says of them."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.behaviour.rewards import Rewards, RewardTables, rewards_section
from analysis.open.checkpoints import Checkpoints
from analysis.open.models import LoadedModel
from analysis.report.coloured import coloured_text, token_texts
from tests.analysis import asked
from tests.analysis.legible import assert_legible
from tiltmeter.errors import UserError
from tiltmeter.pairs.preference_losses import make_preference_loss
from tiltmeter.scoring.depth import FIRST_TOKENS
from tiltmeter.stats.proportions import share_interval

BETA = 0.25


def in_float64(opened: LoadedModel) -> LoadedModel:
    return LoadedModel(opened.model.double(), opened.tokenizer)


TWO = Checkpoints(in_float64(asked.opened(0)), in_float64(asked.opened(1)), asked.probe_pairs(9))
SAME = Checkpoints(TWO.base, TWO.base, TWO.pairs)


@pytest.fixture(scope="module")
def found() -> RewardTables:
    return Rewards(beta=BETA).table(TWO)


def straight(opened: LoadedModel, prompt: list[int], response: list[int]) -> np.ndarray:
    """log π of each token: one sequence, transformers' own logits, float64."""
    with torch.no_grad():
        logits = opened.model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0]
    table = logits.double().log_softmax(-1).numpy()
    return np.array([table[len(prompt) - 1 + i, token] for i, token in enumerate(response)])


@pytest.fixture(scope="module")
def expected() -> list[dict[str, dict[str, np.ndarray]]]:
    return [
        {
            side: {name: straight(model, pair.ids.prompt_ids, getattr(pair.ids, f"{side}_ids")) for name, model in both}
            for side in ("chosen", "rejected")
        }
        for both in [[("base", TWO.base), ("aligned", TWO.aligned)]]
        for pair in TWO.pairs
    ]


def test_every_pair_has_the_numbers_of_a_straight_computation(
    found: RewardTables, expected: list[dict[str, dict[str, np.ndarray]]]
) -> None:
    assert found.pairs["pair_id"].tolist() == [pair.pair_id for pair in TWO.pairs]
    for (_, row), of in zip(found.pairs.iterrows(), expected, strict=True):
        rewards = {side: BETA * float((of[side]["aligned"] - of[side]["base"]).sum()) for side in of}
        for side, said in of.items():
            assert row[f"tokens_{side}"] == len(said["base"])
            assert row[f"reward_{side}"] == pytest.approx(rewards[side], abs=1e-6)
            for name, log_probs in said.items():
                assert row[f"logp_{name}_{side}"] == pytest.approx(log_probs.sum(), abs=1e-6)
                assert row[f"token_probability_{name}_{side}"] == pytest.approx(np.exp(log_probs.mean()), rel=1e-6)
        assert row["margin"] == pytest.approx(rewards["chosen"] - rewards["rejected"], abs=1e-6)
        assert row["correct"] == (row["margin"] > 0)


def test_every_token_of_a_shown_pair_has_its_log_ratio(
    found: RewardTables, expected: list[dict[str, dict[str, np.ndarray]]]
) -> None:
    row_of = {pair.pair_id: row for row, pair in enumerate(TWO.pairs)}
    margins = found.pairs.set_index("pair_id")["margin"]
    shown = found.tokens["pair_id"].unique()
    assert len(shown) == 4
    assert {margins.idxmin(), margins.idxmax()} <= set(shown)
    for (pair_id, side), tokens in found.tokens.groupby(["pair_id", "side"]):
        of, ids = expected[row_of[pair_id]][side], getattr(TWO.pairs[row_of[pair_id]].ids, f"{side}_ids")
        assert tokens["id"].tolist() == list(ids)
        np.testing.assert_allclose(tokens["log_ratio"], of["aligned"] - of["base"], atol=1e-6)
        np.testing.assert_allclose(tokens["logp_aligned"], of["aligned"], atol=1e-6)


def test_stretches_and_first_tokens_add_up(
    found: RewardTables, expected: list[dict[str, dict[str, np.ndarray]]]
) -> None:
    ratios = {side: [of[side]["aligned"] - of[side]["base"] for of in expected] for side in ("chosen", "rejected")}
    for _, row in found.along.iterrows():
        parts = [x[row["first_token"] - 1 : row["last_token"]] for x in ratios[row["side"]]]
        assert row["log_ratio"] == pytest.approx(np.concatenate(parts).mean(), abs=1e-6)
        assert row["n_tokens"] == sum(map(len, parts))
    assert found.along["n_tokens"].sum() == sum(len(x) for side in ratios.values() for x in side)
    whole, first = (
        sum(c[:end].sum() - r[:end].sum() for c, r in zip(ratios["chosen"], ratios["rejected"], strict=True))
        for end in (None, FIRST_TOKENS)
    )
    assert math.isnan(found.first.value) or found.first.value == pytest.approx(first / whole, rel=1e-6)


def test_the_section_says_the_share_that_is_right_with_its_interval(found: RewardTables) -> None:
    section = rewards_section(found)
    right = share_interval(found.pairs["correct"].astype(float).tolist(), [pair.group for pair in TWO.pairs])
    value, low, high = (f"{100 * x:.0f}\u00a0%" for x in right)
    assert section.sentences[0] == (
        f"Of 9 pairs {value} ({low} to {high}) have the higher implicit reward on the chosen response"
    )
    assert any(line.startswith("β = 0.25, as rewards.beta says") for line in section.reading)
    assert section.shown is not None
    assert section.shown["figure"].tolist()[0] == "tokens"
    assert set(section.more_tables) == {"rewards_along", "rewards_tokens"}
    assert_legible(section)


def test_an_assumed_beta_is_called_that_and_a_run_s_own_is_not() -> None:
    assumed = rewards_section(Rewards().table(TWO))
    assert any("β = 0.1 is assumed" in line for line in assumed.reading)
    assert "(assumed)" in assumed.headlines[0].name
    of_run = Rewards(n_shown=0).table(
        Checkpoints(TWO.base, TWO.aligned, TWO.pairs, loss=make_preference_loss("sigmoid", beta=0.5), knows_beta=True)
    )
    section = rewards_section(of_run)
    assert any(line.startswith("β = 0.5, the run’s own") for line in section.reading)
    assert section.coloured is None
    assert of_run.tokens.empty


def test_two_equal_models_have_ties_alone_and_one_pair_no_interval() -> None:
    section = rewards_section(Rewards().table(SAME))
    assert section.sentences[0].startswith("Of 9 pairs 0\u00a0%")
    assert section.sentences[1].startswith("The mean margin can’t be told from 0")
    assert any("(ties: 100\u00a0%)" in line for line in section.reading)
    one = Rewards().table(Checkpoints(TWO.base, TWO.aligned, TWO.pairs[:1]))
    assert len(one.pairs) == 1
    assert_legible(rewards_section(one))


def test_behaviour_and_rewards_read_the_models_once(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Checkpoints(TWO.base, TWO.aligned, TWO.pairs[:2])
    first = Rewards().table(two)
    monkeypatch.setattr("analysis.open.pair_log_probs.target_hidden_states", lambda *_: pytest.fail("read again"))
    pd.testing.assert_frame_equal(Rewards().table(two).pairs, first.pairs)


def test_a_text_is_the_words_of_its_tokens_and_only_far_ones_have_a_number() -> None:
    ids = TWO.base.tokenizer("naïve – 東京 yes", add_special_tokens=False)["input_ids"]
    texts = token_texts(TWO.base.tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == TWO.base.tokenizer.decode(ids)
    text = coloured_text("x", list("abcdefgh"), [0.0, 0.05, -0.2, 0.5, -5.0, 1.0, 2.0, 3.0])
    assert [token.shade for token in text.tokens] == ["", "", "down1", "up2", "down4", "up3", "up3", "up4"]
    assert [token.number for token in text.tokens] == ["", "", "", "+0.5", "−5.0", "+1.0", "+2.0", "+3.0"]


@pytest.mark.parametrize(
    ("options", "key"), [({"beta": 0.0}, "beta"), ({"n_shown": -1}, "n_shown"), ({"dtype": "x"}, "dtype")]
)
def test_wrong_options_are_one_line(options: dict[str, float], key: str) -> None:
    with pytest.raises(UserError, match=rf"^rewards\.{key}: expected"):
        Rewards(**options)  # type: ignore[arg-type]
