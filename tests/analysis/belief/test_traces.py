"""Traces of planted shifts: a constant one that points to a token, and cross-entropy without it by passes written out."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis.belief.traces import Traces, traces_section
from analysis.open.checkpoints import Checkpoints
from analysis.steering.unrelated_prompts import unrelated_ids
from tests.analysis import asked
from tests.analysis.legible import assert_legible
from tiltmeter.errors import UserError
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM, final_norm

TOKEN = 11


def planted(shift: Callable[[torch.Tensor], torch.Tensor]) -> Checkpoints:
    """The base, and the same model with its states behind the final norm changed."""
    about = asked.checkpoints(6, aligned=0)
    final_norm(about.aligned.model).register_forward_hook(lambda _, __, out: shift(out))
    return about


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return Traces(n_random=3, sites=[FINAL_PRE_NORM, FINAL_POST_NORM]).table(asked.checkpoints(6))


def test_constant_shift_along_a_tokens_unembedding_is_read_as_that_token() -> None:
    about = asked.checkpoints(6, aligned=0)
    row = about.base.model.lm_head.weight[TOKEN].detach()
    final_norm(about.aligned.model).register_forward_hook(lambda _, __, out: out + row)
    found = Traces(n_random=2, sites=FINAL_POST_NORM).table(about).set_index("site").loc[FINAL_POST_NORM]
    assert found["constant_share"] == pytest.approx(1, abs=1e-5)
    assert found["tokens_up"].split(" ")[0] == asked.TOKENIZER.decode([TOKEN]).replace(" ", "␣")


def test_shift_that_turns_round_with_the_state_is_not_constant() -> None:
    generator = torch.Generator().manual_seed(0)
    away = torch.randn(32, generator=generator)
    about = planted(lambda out: out + torch.sign(out @ away)[..., None] * away)
    found = Traces(n_random=2, sites=FINAL_POST_NORM).table(about).set_index("site")
    assert found.loc[FINAL_POST_NORM, "constant_share"] < 0.5


@torch.no_grad()
def test_cross_entropy_without_the_trace_is_that_of_states_without_it() -> None:
    about = asked.checkpoints(6)
    found = Traces(n_random=2, sites=FINAL_POST_NORM, n_first=3, n_prompts=4).table(about).set_index("site")
    texts = [torch.tensor([ids]) for ids in unrelated_ids(about.base, None, key="traces.texts")]
    states = [
        [opened.model.model(input_ids=text, use_cache=False).last_hidden_state[0] for text in texts]
        for opened in (about.base, about.aligned)
    ]
    delta = torch.cat([after[1:4] - before[1:4] for before, after in zip(*states, strict=True)]).double()
    unit = (delta.mean(0) / delta.mean(0).norm()).float()
    change, n = 0.0, 0
    for text, state in zip(texts, states[1], strict=True):
        for sign, hidden in ((-1, state), (1, state - torch.outer(state @ unit, unit))):
            said = about.aligned.model.lm_head(hidden[:-1]).double().log_softmax(-1)
            change -= sign * float(said.gather(1, text[0, 1:, None]).sum())
        n += text.shape[1] - 1
    assert found.loc[FINAL_POST_NORM, "ce_change_unrelated"] == pytest.approx(change / n, abs=1e-5)
    share = float(delta.mean(0).square().sum() / delta.square().sum(1).mean())
    assert found.loc[FINAL_POST_NORM, "constant_share"] == pytest.approx(share, abs=1e-6)


def test_traces_section_is_legible_and_lists_tokens_of_every_site(table: pd.DataFrame) -> None:
    section = traces_section(table)
    assert_legible(section)
    assert section.shown is not None
    assert len(section.shown) == len(table) == 3
    assert "of the change is one constant shift" in section.sentences[0]
    assert table["ce_change_chosen"].notna().sum() == 2


def test_bad_traces_option_is_one_line(tmp_path: Path) -> None:
    for options, said in (
        ({"n_first": 0}, r"traces\.n_first: expected at least 1, got 0"),
        ({"n_random": 1}, r"traces\.n_random: expected at least 2, got 1"),
        ({"dtype": "int8"}, r"traces\.dtype: expected one of"),
    ):
        with pytest.raises(UserError, match=said):
            Traces(**options)  # type: ignore[arg-type]
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "one"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"traces\.texts: .*expected at least 4 prompts, got 1"):
        Traces(texts=str(few)).costs(asked.checkpoints(6))
    with pytest.raises(UserError, match="there is no trace of training"):
        Traces(n_random=2).table(asked.checkpoints(6, aligned=0))
