"""A judge behind a real HTTP server while a model trains: its scores arrive late, and whatever it does, training ends well."""

import logging
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.behaviour.generation_metrics import GenerationMetrics
from datamodules.records import PreferencePair
from tests.callbacks.watched import N_PROBE, Watched, watch
from tests.processes import HANGS
from tests.tiltmeter.scoring.asking import judge
from tests.tiltmeter.scoring.fake_judge import material
from tests.tiltmeter.scoring.stub_endpoint import (
    Fault,
    StubEndpoint,
    dropped,
    echoing_key,
    html,
    refused_url,
    slow,
    status,
    truncated,
)
from tests.tiny_models import lightning_warnings
from tiltmeter.errors import UserError
from tiltmeter.judges.judge import ChatMessage, Question
from tiltmeter.judges.judge_scorer import JudgeScorer
from tiltmeter.metric_names import SCORED_STEP
from tiltmeter.models.generation import Decoding
from tiltmeter.scoring.behaviour import FIGURES, SAMPLES, read_table
from tiltmeter.scoring.degeneration import DegenerationScorer

pytestmark = lightning_warnings
CANARY = "canary/0123456789+AbCdEf"
N_PROMPTS = 2


def says(messages: list[dict[str, str]], params: dict[str, Any]) -> str | dict[str, float]:
    """Rates a reply by its length and takes the longer of two; steps and the digit 1 for whoever asks for them."""
    question = Question(tuple(ChatMessage("user", message["content"]) for message in messages), template="")
    found = material(question)
    if "reply" in found.texts:
        return {points(found.texts["reply"]): 0.75, "x": 0.25}
    if "reply A" in found.texts:
        a, b = (len(found.texts[f"reply {name}"]) for name in "AB")
        return {"A" if a > b else "B" if b > a else "C": 1.0}
    return "1" if "digit" in found.rest else "1. Read it.\n2. Rate it."


def points(text: str) -> str:
    return str(1 + len(text) % 5)


class Judged(NamedTuple):
    """What is left of a run with a judge."""

    watched: Watched
    said: list[str]
    """Warnings, of either kind."""


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run(folder: Path, judged: JudgeScorer, *first: Callback, wait_seconds: float = HANGS) -> Judged:
    """Three steps, looked at before and after."""
    scorers = {"judge": judged, "degeneration": DegenerationScorer()}
    decoding = Decoding(max_new_tokens=6, temperature=1.0)
    asking = GenerationMetrics(scorers=scorers, decoding=decoding, n_prompts=N_PROMPTS, wait_seconds=wait_seconds)
    logging.getLogger().addHandler(heard := Heard())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched = watch(folder, [*first, asking])
        for callback in first:
            if isinstance(callback, Breaks):
                callback.stub.stop_waiting()
        asking.scoring._beside.wait(HANGS)  # no thread outlives its test
    logging.getLogger().removeHandler(heard)
    return Judged(watched, [*heard.lines, *(str(warning.message) for warning in caught)])


class Breaks(Callback):
    """The endpoint gets a fault once training has begun: the judge was in order when it was checked."""

    def __init__(self, stub: StubEndpoint, fault: Fault) -> None:
        self.stub, self.fault = stub, fault

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stub.always = self.fault


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of a run that nobody watches."""
    return watch(tmp_path_factory.mktemp("plain"), []).logger.of("train/loss")


def test_an_honest_judge_s_scores_arrive_with_the_step_they_are_about(tmp_path: Path, losses: list[float]) -> None:
    with StubEndpoint(says) as stub:
        watched, said = run(tmp_path, JudgeScorer(judge(stub)))
    samples = read_table(tmp_path / "report" / "tables" / SAMPLES)
    rows = [row for row in watched.logger.rows if "behaviour/geval_score" in row]
    assert [row[SCORED_STEP] for row in rows] == [0, 3]
    for row in rows:
        texts = samples[samples["steps_taken"] == row[SCORED_STEP]]
        for side, name in (("policy", "behaviour/geval_score"), ("base", "behaviour/geval_score/base")):
            assert row[name] == pytest.approx(texts[f"geval_score/helpfulness/{side}"].mean())
        assert row["behaviour/geval_low_mass/helpfulness"] == 0
        assert 0 <= row["behaviour/geval_win_rate"] <= 1
        assert row["judge/agreement"] == likes_length(watched.data.splits["probe"].records)
    assert rows[0]["behaviour/geval_score"] == rows[0]["behaviour/geval_score/base"], "the base against itself"
    assert rows[0]["behaviour/geval_win_rate"] == 0.5
    figures = read_table(tmp_path / "report" / "tables" / FIGURES)
    agreement = figures[figures["metric"] == "judge/agreement"]
    assert agreement["n"].tolist() == [N_PROBE] * 2
    assert (agreement["ci_low"] < agreement["value"]).all()
    judged = figures[figures["metric"] == "geval_score"]
    assert judged["n"].tolist() == [N_PROMPTS] * 4
    assert judged["scorer"].str.contains("stub@127.0.0.1").all()
    assert watched.logger.of("train/loss") == losses
    assert not [line for line in said if "judge" in line or "geval" in line], said


def likes_length(records: list[PreferencePair]) -> float:
    """Share of pairs whose chosen response is the longer one, equal ones half."""
    longer = [len(r.chosen_text.strip()) - len(r.rejected_text.strip()) for r in records]
    return sum(0.5 if not x else float(x > 0) for x in longer) / len(longer)


FAULTS: dict[str, Fault] = {
    "500": status(500),
    "401": echoing_key(401),
    "html": html(),
    "half": truncated(),
    "dropped": dropped(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_judge_that_fails_during_training_costs_its_own_scores_alone(
    fault: str, tmp_path: Path, losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", CANARY)
    with StubEndpoint(says, key=CANARY) as stub:
        asked = judge(stub, api_key_env="JUDGE_KEY", max_retries=1, cache=str(tmp_path / "judge.sqlite"))
        watched, said = run(tmp_path, JudgeScorer(asked, against=()), Breaks(stub, FAULTS[fault]))
    assert any("geval_score/helpfulness of policy: 2 of 2 missing" in line for line in said), said
    ended_well(watched, losses)
    figures = read_table(tmp_path / "report" / "tables" / FIGURES)
    judged = figures[figures["metric"] == "geval_score"]
    assert judged["n_missing"].tolist() == [N_PROMPTS] * 4
    assert no_canary(tmp_path, *said)


def ended_well(watched: Watched, losses: list[float]) -> None:
    """Trained as ever, quick scores there, the judge's missing."""
    assert watched.logger.of("train/loss") == losses
    assert len(watched.logger.of("behaviour/length")) == 2
    assert all(math.isnan(value) for value in watched.logger.of("behaviour/geval_score"))


def no_canary(folder: Path, *texts: str) -> bool:
    files = [path.read_bytes().decode("latin1") for path in folder.rglob("*") if path.is_file()]
    return bool(files) and not any("0123456789+AbCdEf" in text for text in (*files, *texts))


def test_a_judge_that_is_down_from_the_start_is_a_warning(tmp_path: Path, losses: list[float]) -> None:
    with StubEndpoint() as stub:
        down = judge(stub, base_url=refused_url(), max_retries=1)
    watched, said = run(tmp_path, JudgeScorer(down, against=()))
    assert any("did not answer" in line and "missing until it is back" in line for line in said), said
    ended_well(watched, losses)


def test_a_judge_over_its_budget_stops_asking(tmp_path: Path, losses: list[float]) -> None:
    with StubEndpoint(says) as stub:
        asked = judge(stub, max_requests=5)
        watched, said = run(tmp_path, JudgeScorer(asked, against=(), agreement_pairs=0))
        assert len(stub.requests) == 5
    assert any("geval_score/helpfulness of policy" in line and "budget" in line for line in said), said
    assert watched.logger.of("train/loss") == losses
    first, last = watched.logger.of("behaviour/geval_score")
    assert first >= 0, "what was paid for is kept; probe, steps and two texts that base and policy share"
    assert math.isnan(last)
    figures = read_table(tmp_path / "report" / "tables" / FIGURES)
    reasons = figures[figures["metric"] == "geval_score/helpfulness_missing/budget"]
    assert reasons["value"].sum() > 0


def test_a_judge_that_thinks_for_ever_holds_nobody_up(tmp_path: Path, losses: list[float]) -> None:
    with StubEndpoint(says) as stub:
        asked = judge(stub, request_timeout=HANGS)  # no answer comes before the run has ended
        watched, said = run(tmp_path, JudgeScorer(asked, against=()), Breaks(stub, slow(HANGS)), wait_seconds=0.3)
    assert any("2 sets of samples were not judged within 0 s of the end of training" in line for line in said), said
    assert watched.logger.of("train/loss") == losses
    assert len(watched.logger.of("behaviour/length")) == 2
    assert not watched.logger.of("behaviour/geval_score")


@pytest.mark.parametrize("log_probs", [False, "refused"])
def test_no_log_probs_are_said_before_training(log_probs: bool | str, tmp_path: Path) -> None:
    with StubEndpoint(says, log_probs=log_probs) as stub, pytest.raises(UserError, match="log-prob") as caught:
        run(tmp_path, JudgeScorer(judge(stub)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report").exists()


def test_a_missing_key_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with StubEndpoint(says) as stub:
        with pytest.raises(UserError, match="the environment variable JUDGE_KEY is not set"):
            run(tmp_path, JudgeScorer(judge(stub, api_key_env="JUDGE_KEY")))
        assert stub.requests == []
    assert not (tmp_path / "report").exists()
