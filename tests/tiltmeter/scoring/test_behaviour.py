"""What generation has in common during training and afterwards: shares of prompts, pairs of answers, scorers beside, tables."""

import math
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.processes import HANGS
from tests.tiltmeter.models.test_generation import make_prompts, spelling
from tests.tiny_models import make_model
from tiltmeter.errors import UserError
from tiltmeter.models.generation import Completion, Decoding
from tiltmeter.scoring.behaviour import BehaviourTables, Prompt, ScoringBeside, complete, pair_up, read_table, score_all
from tiltmeter.scoring.scorer import Figure, Sample, Scores, as_metrics, mean_figure

SAID = Completion("yes", 1, is_cut=False)


def sample(pair_id: str, text: str = "yes", index: int = 0) -> Sample:
    return Sample(pair_id, "why?", "because", SAID, Completion(text, 1, is_cut=False), pair_id, index)


def figure(name: str, value: float, of: str = "policy") -> Figure:
    return Figure(name, of, value, value - 1, value + 1, 2, 0, "by hand")  # type: ignore[arg-type]


@dataclass
class Waits:
    """A slow scorer that answers when it is let."""

    name: str = "slow"
    is_slow: bool = True
    go: threading.Event = field(default_factory=threading.Event)
    seen: list[int] = field(default_factory=list)

    def start(self) -> None: ...

    def score(self, samples: Sequence[Sample]) -> Scores:
        self.go.wait(HANGS)
        self.seen.append(len(samples))
        return Scores([figure("slow", float(len(samples)))])


class Breaks(Waits):
    def score(self, samples: Sequence[Sample]) -> Scores:
        raise OSError("the judge is out")


def test_the_shares_of_all_ranks_are_what_one_process_says() -> None:
    model, ids = make_model("llama", torch.float64), make_prompts(7)
    prompts = [Prompt(f"p{i}", "", row, "", f"p{i}") for i, row in enumerate(ids)]
    decoding = Decoding(max_new_tokens=5, temperature=1.0, n_samples=2)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))

    def share(rank: int, world_size: int) -> dict[str, list[Completion]]:
        calls.clear()
        return complete(model, spelling(), prompts, decoding, rank=rank, world_size=world_size, tokens_per_batch=60)

    whole = share(0, 1)
    shares, counts = [], []
    for rank in range(3):
        shares.append(share(rank, 3))
        counts.append(len(calls))
    assert {key: said for part in shares for key, said in part.items()} == whole
    assert sum(len(part) for part in shares) == len(prompts)
    assert len({-(-n // 5) for n in counts}) == 1, "every rank makes as many batches as the others"


def test_answers_are_paired_by_prompt_and_sample() -> None:
    prompt = Prompt("a", "why?", [1], "because", "g", {"situation": "why"})
    b, c = Completion("b", 1, False), Completion("c", 1, True)
    samples = pair_up([prompt], {"a": [SAID, b]}, {"a": [b, c], "other": []})
    assert [(s.base, s.policy, s.index) for s in samples] == [(SAID, b, 0), (b, c, 1)]
    assert samples[1].attributes == {"situation": "why"}
    with pytest.raises(ValueError, match="a"):
        pair_up([prompt], {"a": [SAID]}, {"a": [b, c]})


def test_a_scorer_that_breaks_is_reported_and_the_others_go_on() -> None:
    calm = Waits()
    calm.go.set()
    with pytest.warns(UserWarning, match="judge is out"):
        scores = score_all({"bad": Breaks(), "good": calm}, [sample("a")])
    assert [f.name for f in scores.figures] == ["slow"]


def test_slow_scorers_answer_in_order_and_never_hold_anyone_up() -> None:
    slow = Waits()
    beside = ScoringBeside({"slow": slow})
    beside.submit(0, 0, [sample("a")])
    beside.submit(9, 1, [sample("a"), sample("b")])
    assert beside.take() == []
    assert beside.wait(0.05) == 2
    slow.go.set()
    assert beside.wait(HANGS) == 0
    assert [(s.step, s.scores.figures[0].value) for s in beside.take()] == [(0, 1.0), (9, 2.0)]
    assert beside.take() == []


def test_what_slow_scorers_have_to_say_is_heard_whatever_others_silence_meanwhile(
    caplog: pytest.LogCaptureFixture,
) -> None:
    beside = ScoringBeside({"bad": Breaks()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as libraries do around calls of their own
        beside.submit(0, 0, [sample("a")])
        assert beside.wait(HANGS) == 0
        beside.take()
    assert "judge is out" in caplog.text


def test_tables_take_figures_and_columns_when_they_come(tmp_path: Path) -> None:
    tables = BehaviourTables(tmp_path / "report" / "tables")
    samples = [sample("a", "=SUM(A1)"), sample("a", "NA", 1), sample("b", "he said “no”,\n\x1b[31mtwice")]
    tables.add(0, 0, samples, Scores([figure("bleu", 1.0)], {"bleu/policy": [0.5, math.nan, 1.0]}))
    tables.add(7, 1, samples, Scores([figure("bleu", 2.0), figure("bleu", math.nan, "base")]))
    tables.add(0, 0, samples, Scores([figure("slow", 3.0), figure("bleu", 1.5)], {"win": [1.0, 0.5, 0.0]}))
    found = read_table(tables.folder / "behaviour_by_step.csv")
    assert found[["steps_taken", "metric", "of", "value"]].to_numpy().tolist()[:3] == [
        [0, "bleu", "policy", 1.5],
        [7, "bleu", "policy", 2.0],
        [7, "bleu", "base", pytest.approx(math.nan, nan_ok=True)],
    ]
    assert found["scorer"].tolist() == ["by hand"] * 4
    texts = read_table(tables.folder / "samples.csv")
    assert texts["policy"].tolist()[:3] == ["'=SUM(A1)", "NA", "he said “no”,\n[31mtwice"]
    assert texts["win"].tolist()[:3] == [1.0, 0.5, 0.0]
    assert texts["bleu/policy"].isna().tolist() == [False, True, False, True, True, True]
    assert texts["sample"].tolist() == [0, 1, 0, 0, 1, 0]
    tables.forget_after(0)
    assert set(read_table(tables.folder / "behaviour_by_step.csv")["steps_taken"]) == {0}
    assert len(read_table(tables.folder / "samples.csv")) == 3


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "behaviour_by_step.csv"
    assert read_table(path).empty
    path.write_text("metric,value\nbleu,1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"behaviour_by_step\.csv: expected a column steps_taken"):
        read_table(path)
    path.write_text("steps_taken,value\n0,abc\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"behaviour_by_step\.csv: cannot be read"):
        read_table(path)


def test_too_much_missing_is_no_number() -> None:
    samples = [sample(str(i)) for i in range(40)]
    values = [1.0] * 20 + [0.0] * 18 + [math.nan] * 2
    kept = mean_figure("x", "policy", values, samples, scorer="by hand")
    assert (kept.value, kept.n, kept.n_missing) == (pytest.approx(20 / 38), 38, 2)
    assert kept.low < kept.value < kept.high
    lost = mean_figure("x", "policy", [math.nan, *values[1:]], samples, scorer="by hand")
    assert math.isnan(lost.value)
    assert (lost.n, lost.n_missing) == (37, 3)
    assert as_metrics([kept, lost._replace(of="base")]).keys() == {"behaviour/x", "behaviour/x/base"}
    assert pd.isna(as_metrics([lost])["behaviour/x"])
