"""What base and policy say while a run trains, from the command line: the same on two processes, and with a judge over HTTP."""

import os
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.callbacks.test_judge_in_training import CANARY, no_canary, says
from tests.cli import TINY, logged, metrics_of, only_run, run_train, run_train_together
from tests.tiltmeter.scoring.stub_endpoint import StubEndpoint, slow
from tests.wandb_file import history_rows
from tiltmeter.metric_names import METRICS, find
from tiltmeter.scoring.behaviour import FIGURES, SAMPLES, read_table

pytestmark = pytest.mark.slow

# 13 pairs a step and 11 prompts: uneven shares on two processes. float64, so that two processes train the same model to the last
# digits, and completions of up to 24 tokens, drawn with temperature, are the same text.
RUN = (
    *(option for option in TINY if not option.startswith("datamodule.probe_pairs")),
    *("datamodule.probe_pairs=11", "datamodule.pairs_per_step=13", "datamodule.tokens_per_micro_batch=600"),
    *("model.dtype=float64", "module.learning_rate=3e-3", "base.max_epochs=3", "base.learning_rate=1e-2", "logger=csv"),
    *("callbacks=behaviour", "callbacks.generation.every_n_steps=4"),
    *("decoding.max_new_tokens=24", "decoding.temperature=0.8", "decoding.n_samples=2"),
    *("trainer.max_epochs=1", "trainer.val_check_interval=1.0"),
)
# six steps, and two looks after the first one: what is told of two observations is told
EARLY = (
    *(f"callbacks.{name}.every_n_steps=2" for name in ("consistency", "gradients")),
    *("datamodule.pairs_per_step=16", "callbacks.random_update.n_draws=2"),
)
TWO_PROCESSES = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")


def train(root: Path, *options: str) -> Path:
    folder = root / "tiny_synthetic"
    before = set(folder.iterdir()) if folder.exists() else set()
    launch = run_train_together if "trainer.devices=2" in options else run_train
    done = launch(*options, f"runs_root={root}")
    assert done.returncode == 0, done.stderr
    (run,) = set(folder.iterdir()) - before
    return run


def table(run: Path, name: str) -> pd.DataFrame:
    return read_table(run / "report" / "tables" / name)


@pytest.fixture(scope="module")
def questions() -> tuple[str, ...]:
    """Three real questions, where the real data is."""
    root = os.environ.get("TILTMETER_SHARED")
    if not root:
        return ()
    path = Path(root).resolve() / "data" / "truthfulqa" / "v1_mc_task.part80.json"
    return ("truthfulqa=mc", f"truthfulqa.path={path}", "truthfulqa.limit=3")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, questions: tuple[str, ...]) -> Path:
    """The run of one process; the others find its base in the cache beside it."""
    return train(tmp_path_factory.mktemp("runs"), *RUN, *questions)


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_processes_say_and_score_what_one_does(trainer: str, single: Path, questions: tuple[str, ...]) -> None:
    run = train(single.parents[1], *RUN, *questions, f"trainer={trainer}", *TWO_PROCESSES)
    theirs, ours = (table(folder, SAMPLES) for folder in (single, run))
    assert theirs["steps_taken"].unique().tolist() == [0, 4, 7]
    assert len(theirs) == 3 * 2 * 11
    assert (theirs["base"] != theirs["policy"]).mean() > 0.3, "a policy that has not moved shows nothing"
    assert 0 < theirs["cut/policy"].mean() < 1, "some completions end before the others"
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-9, atol=1e-9)
    theirs, ours = (table(folder, FIGURES) for folder in (single, run))
    assert {"bleu", "rougeL", "degeneration", "preference_accuracy", "oracle_preference_rate"} <= set(theirs["metric"])
    assert ("truthfulqa_mc2_zero_shot" in set(theirs["metric"])) == bool(questions)
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-6, atol=1e-9)
    overlap = theirs["metric"].isin(["bleu", "rouge1", "rouge2", "rougeL"])
    pd.testing.assert_frame_equal(ours[overlap], theirs[overlap], rtol=1e-9, atol=1e-9)


def test_a_judge_named_on_the_command_line_rates_while_a_run_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", CANARY)
    judge = ("judge=endpoint", "judge.judge.model=stub", "judge.judge.api_key_env=JUDGE_KEY", "judge.against=base")
    few = (*TINY, "callbacks.generation.n_prompts=3", "decoding.max_new_tokens=8", *judge)
    with StubEndpoint(says, key=CANARY) as stub:
        options = (*few, f"judge.judge.base_url={stub.base_url}", "trainer.max_epochs=1")
        run = train(tmp_path, *options, "callbacks=full", *EARLY)
        assert {request.headers["authorization"] for request in stub.requests} == {f"Bearer {CANARY}"}
        stub.faults, stub.always = [None], slow(60)  # the check before training is answered, nothing after it
        short = ("callbacks=behaviour", "datamodule.pairs_per_step=16", "logger=csv", "trainer.max_steps=1")
        short += ("callbacks.generation.wait_seconds=1", "judge.judge.cache=null")
        hurried = run_train(*options, *short, f"runs_root={tmp_path}", "seed=1", "name=slow")
    judged = table(run, FIGURES).query("metric == 'geval_score'")
    assert judged["n"].tolist() == [3] * 4
    assert logged(run, "behaviour/geval_score")
    assert logged(run, "behaviour/geval_win_rate")
    assert logged(run, "behaviour/preference_probe_accuracy/final_pre_norm"), "callbacks=full"
    found = {name: find(name) for name in metrics_of(run)[0]}
    assert [name for name, declared in found.items() if declared is None] == ["step", "epoch"], "every name is declared"
    wanted = {key for metric in METRICS if not metric.needs for key in metric.keys if "<" not in key}
    assert wanted - {declared.key for declared in found.values() if declared} == set(), "and every declared one logged"
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["callbacks"]["generation"]["scorers"]["judge"] == config["judge"]
    steps = tmp_path / "cache" / "geval_steps" / "stub.json"
    assert steps.is_file()
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    rows = history_rows(file)
    assert any("behaviour/geval_score" in row for row in rows)
    samples = [row for row in rows if "samples/path" in row]
    assert samples, "the table of samples"
    assert samples[-1]["samples/nrows"] == 3
    assert hurried.returncode == 0, hurried.stderr
    assert "were not judged within 1 s of the end of training" in hurried.stdout + hurried.stderr
    assert (only_run(tmp_path, "slow") / "aligned").is_dir()
    assert no_canary(tmp_path, hurried.stdout, hurried.stderr)


def test_a_judge_that_nobody_would_ask_is_one_line(tmp_path: Path) -> None:
    done = run_train(
        "callbacks=none", "judge=endpoint", "judge.judge.model=m", "judge.judge.base_url=http://localhost:1/v1"
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("tiltmeter: judge: nothing asks it with these callbacks")
