"""``python analyze.py analysis=steering_sweep`` on tiny models: a run, two checkpoints, a dry run, what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from launch.analyzing import analyze
from launch.configuration import CONF, prepare_overrides
from tests.analysis import asked
from tests.analysis.conftest import CONFIG, dpo_rows
from tests.cli import ROOT
from tiltmeter.errors import UserError

SWEEP = (
    "analysis=steering_sweep",
    "steering.lambdas=[1.0]",
    "steering.vectors=[v*,v_bar]",
    "steering.n_random=1",
    "steering.n_generated=2",
    "steering.sites=final_post_norm",
    "decoding.max_new_tokens=4",
)


@pytest.fixture(autouse=True)
def no_config_left() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "fake" / "2026-01-31_12-00-00"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    pd.DataFrame(dpo_rows()).to_csv(folder / "metrics.csv", index=False)
    pairs = [pair.as_json() for pair in asked.probe_pairs(8)]
    (folder / "probe_prompts.json").write_text(json.dumps(pairs), encoding="utf-8")
    for i, name in enumerate(("base", "aligned")):
        asked.save_model(folder / name, seed=i)
    return folder


def ask(tmp_path: Path, *arguments: str) -> Path | None:
    """As ``analyze.py`` does, in this process."""
    overrides = prepare_overrides([*arguments, f"runs_root={tmp_path / 'runs'}"], config_name="analyze")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("analyze", overrides=overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return analyze(config)


def test_a_run_is_swept_and_its_report_shows_the_sweep(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ask(tmp_path, "run=last", *SWEEP)
    assert page == run / "report" / "index.html"
    text = page.read_text(encoding="utf-8")
    assert "steering sweeps;" not in text, "it is there, so it is not missing"
    assert "steering.sites=final_post_norm decoding.max_new_tokens=4" in text
    assert "0 was missing and is added" in " ".join(capsys.readouterr().out.split())
    table = run / "report" / "tables" / "sweep.csv"
    before = table.read_bytes()
    assert {0.0, 1.0} == set(pd.read_csv(table)["lambda"])
    ask(tmp_path, "run=last", *SWEEP)
    assert table.read_bytes() == before
    assert "going on, 14 of 14 parts" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match=r"sweep\.csv: was begun with seed=0, now it is 1"):
        ask(tmp_path, "run=last", *SWEEP, "steering.seed=1")
    assert table.read_bytes() == before
    whole = ask(tmp_path, "run=last")
    assert whole is not None
    assert "into the aligned model, and back?" in whole.read_text(encoding="utf-8")


def test_a_dry_run_says_the_cost_and_writes_nothing(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert ask(tmp_path, "run=last", *SWEEP, "steering.dry_run=true") is None
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    # 2 passes of the goals, and one a direction and vector (v*, v̄, a random one)
    assert "teacher-forced │ 8.0 │" in " ".join(capsys.readouterr().out.split())


def test_two_checkpoints_are_swept(tmp_path: Path) -> None:
    two = [f"{name}={asked.save_model(tmp_path / name, seed=i)}" for i, name in enumerate(("base", "aligned"))]
    data = ("data=synthetic", "judge=none", "data.n_prompts=30", "pairs.n_pairs=6", f"out={tmp_path / 'here'}")
    assert ask(tmp_path, *two, *data, *SWEEP) == tmp_path / "here" / "index.html"
    table = pd.read_csv(tmp_path / "here" / "tables" / "sweep.csv")
    assert set(table["direction"]) == {"interpolation", "inversion"}
    assert set(table[table["metric"] == "recovery"]["n"]) == {3}


def test_options_without_effect_are_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match=r"steering\.seed: has no effect here; it is for analysis=steering_sweep"):
        ask(tmp_path, "run=last", "analysis=training", "steering.seed=1")
    with pytest.raises(UserError, match=r"behaviour\.beta: has no effect here; it is for analysis=behaviour"):
        ask(tmp_path, "run=last", "analysis=steering_sweep", "behaviour.beta=1")


@pytest.mark.slow
def test_from_the_command_line(run: Path) -> None:
    command = [sys.executable, str(ROOT / "analyze.py"), f"run={run}", *SWEEP]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Steering" in done.stdout
    assert f"Report: {run / 'report' / 'index.html'}" in done.stdout
    (run / "report" / "tables" / "sweep.csv").write_text("nonsense\n")
    broken = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert broken.returncode == 2
    assert broken.stderr.startswith(f"tiltmeter: {run / 'report' / 'tables' / 'sweep.csv'}: ")
    assert broken.stderr.count("\n") == 1
