"""Studies: planned, trained, found again and judged; runs that fail, differ or are damaged cost themselves alone."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml
from omegaconf import OmegaConf

from analysis.claims.claim import read_claims
from analysis.contract import Cost, of_models
from analysis.open.studies import open_study
from launch.command import run_command
from launch.configuration import CONF, prepare_overrides
from launch.studies import judging
from launch.studies.judging import verdicts_of_run
from launch.studies.matching import BROKE_OFF, Ended, Matching, Try, is_matched, nearest, next_rate
from launch.studies.running import Start, run_study, start_process, study_of
from launch.studies.study_file import Arm, runs_of
from tests.cli import TINY
from tests.launch.analyze_command import ask_exactly
from tests.processes import run_script
from tiltmeter.errors import UserError

STUDY = (
    *(
        "--multirun",
        "study=quick",
        "study.arms={dpo:2,dpo_shuffled:1}",
        *TINY,
        "callbacks=geometry",
        "trainer.max_epochs=1",
    ),
    *("logger=csv", "datamodule.probe_pairs=16"),
)


def start(words: Sequence[str]) -> tuple[int, str]:
    """A run in a process that has the libraries already."""
    done = run_script("train.py", *words)
    return done.returncode, done.stderr


def train_study(root: Path, *options: str, start: Start = start) -> Path:
    overrides = prepare_overrides([*STUDY, *options, f"runs_root={root}"], config_name="train")
    return run_study(overrides, start=start)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three runs."""
    return train_study(tmp_path_factory.mktemp("study"))


def copy_of(study: Path, tmp_path: Path) -> Path:
    """The study and its runs elsewhere, as if they had been trained there."""
    shutil.copytree(study.parent.parent, tmp_path / "runs", symlinks=True)
    copied = tmp_path / "runs" / study.parent.name / study.name
    said = (copied / "study.yaml").read_text(encoding="utf-8").replace(str(study.parent.parent), str(tmp_path / "runs"))
    (copied / "study.yaml").write_text(said, encoding="utf-8")
    return copied


def states_of(study: Path) -> dict[tuple[str, int], str]:
    said = yaml.safe_load((study / "study.yaml").read_text(encoding="utf-8"))
    return {(run["arm"], run["seed"]): run["state"] for run in said["runs"]}


@pytest.mark.slow
def test_study_has_its_runs_of_one_base_and_is_found_again_whole(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert states_of(trained) == dict.fromkeys([("dpo", 0), ("dpo_shuffled", 0), ("dpo", 1)], "finished")
    bases = {(trained.parent / run.run / "base" / "model.safetensors").read_bytes() for run in runs_of(trained)}
    assert len(bases) == 1
    again = train_study(trained.parent.parent, start=lambda words: pytest.fail(f"started {words}"))
    assert again == trained
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("found in") == 3
    assert "Next: python analyze.py runs=" in said


@pytest.mark.slow
def test_run_that_was_lost_is_trained_again_and_one_that_fails_costs_itself_alone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = copy_of(trained, tmp_path)
    shutil.rmtree(study.parent / next(run.run for run in runs_of(study) if run.arm == "dpo_shuffled"))
    asked: list[Sequence[str]] = []

    def fails(words: Sequence[str]) -> tuple[int, str]:
        asked.append(words)
        return 2, "a warning\ntiltmeter: module.loss: no such option\n"

    assert train_study(tmp_path / "runs", start=fails) == study
    assert [[word for word in words if word.startswith(("arm=", "seed="))] for words in asked] == [
        ["arm=dpo_shuffled", "seed=0"]
    ]
    assert states_of(study)["dpo_shuffled", 0] == "failed"
    assert "Failed: dpo_shuffled, seed 0: module.loss: no such option" in " ".join(capsys.readouterr().out.split())
    assert any("failed: module.loss" in line for line in open_study(study).left_out)
    train_study(tmp_path / "runs")
    assert set(states_of(study).values()) == {"finished"}


def test_launcher_gets_all_seeds_of_an_arm_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def takes(words: Sequence[str]) -> tuple[int, str]:
        asked.append([word for word in words if word.startswith(("--", "hydra", "arm", "seed"))])
        return 1, ""

    monkeypatch.setattr("launch.configuration.find_spec", lambda name: object())
    train_study(tmp_path, "hydra/launcher=joblib", start=takes)
    assert asked == [
        ["--multirun", "hydra/launcher=joblib", "arm=dpo", "seed=0,1"],
        ["--multirun", "hydra/launcher=joblib", "arm=dpo_shuffled", "seed=0"],
    ]
    (study,) = tmp_path.glob("*/study_*")
    assert set(states_of(study).values()) == {"failed"}


def test_stopped_run_stops_its_study_with_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        train_study(tmp_path, start=lambda words: (143, ""))
    assert left.value.code == 143
    (study,) = tmp_path.glob("*/study_*")
    assert set(states_of(study).values()) == {"waiting"}


def test_process_of_a_run_gives_its_code_and_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.py"
    script.write_text("import sys\nprint('tiltmeter:', *sys.argv[1:], file=sys.stderr)\nsys.exit(2)", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert start_process(["arm=dpo", "seed=0"]) == (2, "tiltmeter: arm=dpo seed=0\n")
    assert capsys.readouterr().err == "tiltmeter: arm=dpo seed=0\n"


def test_signal_reaches_a_run_once_and_the_study_waits_for_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, ready = tmp_path / "train.py", tmp_path / "ready"
    lines = [
        "import pathlib, signal, sys, time",
        "got = []",
        "signal.signal(signal.SIGINT, lambda number, frame: got.append(number))",
        f"pathlib.Path({str(ready)!r}).touch()",
        "while not got: time.sleep(0.01)",
        "time.sleep(0.5)  # the step that it is in",
        "print('tiltmeter: signals', len(got), file=sys.stderr)",
        "sys.exit(143)",
    ]
    script.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(script)])
    before = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert start_process([]) == (143, "tiltmeter: signals 1\n")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_more_seeds_are_added_to_a_study_and_fewer_take_none_away(trained: Path, tmp_path: Path) -> None:
    study, asked = copy_of(trained, tmp_path), list[Sequence[str]]()

    def fails(words: Sequence[str]) -> tuple[int, str]:
        asked.append(words)
        return 1, ""

    more = train_study(tmp_path / "runs", "study.arms={dpo:3,dpo_shuffled:1}", start=fails)
    assert more == study
    assert [[word for word in words if word.startswith(("arm=", "seed="))] for words in asked] == [
        ["arm=dpo", "seed=2"]
    ]
    train_study(tmp_path / "runs", "study.arms={dpo:1}", start=lambda words: pytest.fail(f"started {words}"))
    assert set(states_of(study)) == {("dpo", 0), ("dpo_shuffled", 0), ("dpo", 1)}
    assert {arm: len(runs) for arm, runs in open_study(study).runs.items()} == {"dpo": 2, "dpo_shuffled": 1}


@pytest.mark.slow
def test_report_says_what_is_missing_and_holds_claims_as_data(trained: Path) -> None:
    done = run_script("analyze.py", f"runs={trained}")
    assert done.returncode == 0, done.stderr
    claims = {entry["claim"]: entry for entry in json.loads((trained / "report" / "claims.json").read_text())["claims"]}
    assert {entry["verdict"] for entry in claims.values()} == {"inconclusive"}
    assert "2 of 3 seeds of dpo" in claims["K4"]["sentence"]
    checks = {check["name"]: check["passed"] for check in claims["K4"]["checks"]}
    assert checks["sft_chosen"] == "missing"
    assert set(checks.values()) == {"missing", "yes", "no"}
    assert 0.9 < claims["K4"]["t"] <= 1
    assert claims["K7"]["t"] is not None, "the ladder was asked for"
    page = (trained / "report" / "index.html").read_text(encoding="utf-8")
    for words in (
        "report of a study",
        "Which claims hold against their controls?",
        "dpo × 2, dpo_shuffled × 1",
        "seed",
    ):
        assert words in page
    assert (trained / "report" / "tables" / "vectors_of_arms.csv").is_file()


@pytest.mark.slow
def test_damaged_and_different_runs_are_named_and_the_rest_is_judged(trained: Path, tmp_path: Path) -> None:
    study = copy_of(trained, tmp_path)
    runs = {(run.arm, run.seed): study.parent / run.run for run in runs_of(study)}
    (runs["dpo_shuffled", 0] / "metrics.csv").write_text("not, a table\n1\n", encoding="utf-8")
    provenance = runs["dpo", 1] / "provenance.json"
    said = json.loads(provenance.read_text(encoding="utf-8"))
    said["files_sha256"] = dict.fromkeys(said["files_sha256"], "0" * 64)
    provenance.write_text(json.dumps(said), encoding="utf-8")
    found = open_study(study)
    assert {arm: len(ones) for arm, ones in found.runs.items()} == {"dpo": 1}
    assert any("metrics.csv" in line for line in found.left_out)
    assert any("another base than the first dpo run" in line for line in found.left_out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("seed=3",), "seed: a study sets it itself"),
        (("arm=dpo",), "arm: a study sets it itself"),
        (("++study.arms.dpoo=3",), "study.arms: there is no arm dpoo"),
        (("hydra/launcher=jobli",), "hydra/launcher=jobli: not installed; joblib and submitit_slurm come with"),
        (("study.draws=-1",), "study.draws: expected a whole number from 0, got -1"),
        (("study.arms.dpo=x",), "study.arms.dpo: expected a whole number from 0, got x"),
        (("module.beta=0.1,0.2",), "a study takes one value of each option"),
        (("study.arms.dpo=0",), "study.arms.dpo: expected at least one seed"),
        (("study=quik",), "study=quik: there is none of that name; did you mean quick?"),
    ],
)
def test_wrong_study_is_one_line_and_starts_nothing(
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = () if any(text.startswith("study=") for text in arguments) else ("study=quick",)
    monkeypatch.setattr(sys, "argv", ["train.py", "--multirun", *study, *arguments, f"runs_root={tmp_path / 'runs'}"])
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a run was started"))
    with pytest.raises(SystemExit) as left:
        run_command(lambda: None, config_name="train")
    assert left.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_what_is_no_study_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no study.yaml, so it is no study"):
        open_study(tmp_path)
    (tmp_path / "study.yaml").write_text("runs: 3", encoding="utf-8")
    with pytest.raises(UserError, match=r"study.yaml: damaged"):
        open_study(tmp_path)
    assert study_of(["--multirun", "arm=dpo,sft_chosen"]) is None


def test_configuration_of_a_study_can_be_looked_at() -> None:
    assert study_of(["study=quick"]) == "quick"
    assert study_of(["study=quick", "--cfg", "job"]) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("steering.n_prompts=3",), "steering.n_prompts: has no effect on a study"),
        (("analysis=geometry",), "analysis: has no effect on a study"),
        (("run=last",), "run: has no effect on a study"),
        (("judge=oracle",), "judge: has no effect on a study"),
        (("pairs.n_pairs=3",), "pairs: has no effect without another corpus"),
        (("data=synthetic", "ask_models=false"), "data: another corpus is read by the models"),
        (("claims_file=own.yaml", "claims.K4.at_least=0.5"), "claims: has no effect beside claims_file"),
        (("claims.K4.at_lest=0.5",), "claims.K4.at_lest"),
        ((), "has no study.yaml, so it is no study"),
    ],
)
def test_option_without_an_effect_on_a_study_is_refused(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        ask_exactly(f"runs={tmp_path}", *arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir()), "something was written"


def test_learning_rate_is_sought_between_those_that_went_less_far_and_further() -> None:
    """KL that grows with the square of the rate until training breaks off at 0.01."""
    tries: list[Try] = []
    target, first = 0.5, 1e-4
    while not (tries and is_matched(nearest(tries, target).kl, target)):
        rate = next_rate(tries, target, first=first)
        tries.append(Try(rate, math.inf if rate > 0.01 else 2e4 * rate**2))
        assert len(tries) <= 6, tries
    assert nearest(tries, target) == tries[-1]
    assert [is_matched(kl, 0.5) for kl in (0.39, 0.41, 0.59, 0.61)] == [False, True, True, False]


def test_arm_is_matched_by_tries_that_a_killed_study_finds_again(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three rates: too low, one at which training breaks off, one that fits; the study stops once and goes on."""
    study = copy_of(trained, tmp_path)
    template = next(run.run for run in runs_of(study) if run.arm == "dpo_shuffled")
    tries: list[dict[str, object]] = []
    asked: list[float] = []

    def start(run: Arm, rate: float) -> Ended:
        asked.append(rate)
        if len(asked) == 2:
            return Ended(BROKE_OFF, "loss is not finite", 0.1)
        name = f"sft_{len(asked)}"
        shutil.copytree(study.parent / template, study.parent / name, symlinks=True)
        config = study.parent / name / "config.yaml"
        said = yaml.safe_load(config.read_text(encoding="utf-8"))
        said |= {"arm": "sft_chosen", "seed": 0, "module": {**said["module"], "learning_rate": rate}}
        config.write_text(yaml.safe_dump(said), encoding="utf-8")
        if len(asked) == 3:
            raise KeyboardInterrupt  # between the end of a run and its measurement
        return Ended(0, "", 0.1)

    kl = {"sft_1": 0.01, "sft_3": 0.45}
    monkeypatch.setattr("launch.studies.matching.kl_of_run", lambda folder, pairs: kl.get(folder.name, 0.5))
    monkeypatch.setattr("launch.studies.matching.pairs_to_match", lambda config: [])
    runs = [run for run in runs_of(study) if run.arm == "dpo"]
    config = OmegaConf.create({"module": {"learning_rate": 1e-3}, "study": {"kl_tries": 6}})
    written: list[int] = []

    def matching() -> Matching:
        return Matching(study, config, tries, start, lambda: written.append(len(tries)))

    with pytest.raises(KeyboardInterrupt):
        matching().train(Arm("sft_chosen", 0), runs)
    found = matching().train(Arm("sft_chosen", 0), runs)
    assert (found.state, found.run, found.kl) == ("finished", "sft_3", (0.45, 0.5))
    assert len(asked) == 3
    assert asked[0] == 1e-3 < asked[2] < asked[1]
    assert [(one["run"], one["kl"]) for one in tries] == [("sft_1", 0.01), ("", math.inf), ("sft_3", 0.45)]
    assert written == [1, 2, 3]
    said = yaml.safe_load((study / "study.yaml").read_text(encoding="utf-8"))
    said["tries"] = tries
    said["runs"].append({"arm": "sft_chosen", "seed": 0, "state": "finished", "run": "sft_3", "kl": [0.45, 0.5]})
    (study / "study.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    opened = open_study(study)
    assert [run.folder.name for run in opened.runs["sft_chosen"]] == ["sft_3"], "tries that don't count are left out"
    assert opened.kl == {"sft_chosen": [(0.45, 0.5)]}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("study.kl_matched=[dpo]",), "study.kl_matched: expected arms of study.arms beside dpo, got dpo"),
        (("study.kl_tries=0",), "study.kl_tries: expected at least 1"),
    ],
)
def test_matching_that_can_not_be_done_is_refused(tmp_path: Path, options: Sequence[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train_study(tmp_path, *options)


@pytest.mark.slow
def test_single_run_shows_each_claim_with_its_number_and_judges_none(trained: Path) -> None:
    study = open_study(trained)
    claims = read_claims(CONF / "claims" / "dsteer.yaml")
    found = {verdict.claim.key: verdict for verdict in verdicts_of_run(claims, study.runs["dpo"][0])}
    assert {verdict.kind for verdict in found.values()} == {"inconclusive"}
    assert 0.9 < found["K4"].value.value <= 1
    assert "study=dsteer trains them" in found["K4"].sentence
    assert math.isnan(found["K10"].value.value), "no other arm"
    assert verdicts_of_run(claims, study.runs["dpo_shuffled"][0]) == [], "no claim is about a control"


class AskedOfTheBase:
    """A question whose answer is the same for every run of one base; unless it says that it isn't."""

    n_asked = 0

    def __init__(self, *, asks_base_alone: bool) -> None:
        self.asks_base_alone = asks_base_alone

    def table(self, _models: object) -> pd.DataFrame:
        type(self).n_asked += 1
        return pd.DataFrame({"asked": [self.n_asked]})

    def costs(self, _models: object) -> list[Cost]:
        return []


@pytest.mark.parametrize(("alone", "expected"), [(True, [1, 1]), (False, [1, 2])])
def test_a_table_of_the_base_alone_is_made_once_for_all_runs(
    alone: bool, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AskedOfTheBase, "n_asked", 0)
    found = of_models("asked", lambda table: SimpleNamespace(table=table, more_tables={}), node="asked")  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(judging, "ANALYSES", (found,))
    monkeypatch.setattr(judging, "_open", lambda config, run: None)
    target = f"{__name__}.{AskedOfTheBase.__name__}"
    make = judging._Tables(OmegaConf.create({"asked": {"_target_": target, "asks_base_alone": alone}}))
    runs: list[Any] = [SimpleNamespace(folder=tmp_path / name, report=tmp_path / name) for name in ("one", "two")]
    for run in runs:
        make(run, "asked")
        make(run, "training")  # nothing that models are asked
    said = [pd.read_csv(run.report / "tables" / "asked.csv")["asked"].item() for run in runs]
    assert said == expected
