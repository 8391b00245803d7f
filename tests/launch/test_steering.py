"""``python analyze.py analysis=steering_sweep`` on tiny models: a run, two checkpoints, a dry run, what is refused."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from analysis.figures.fig2_steering import NAME as STEERING
from tests.analysis import asked
from tests.launch.analyze_command import ask
from tests.processes import run_script
from tiltmeter.errors import IncompleteEvaluation, UserError
from tiltmeter.scoring.degeneration import DegenerationScorer
from tiltmeter.steering.vector import OWN, V_STAR, SteeringVector, VectorId, load_vectors, save_vectors

SWEEP = (
    "analysis=steering_sweep",
    "steering.lambdas=[1.0]",
    "steering.vectors=[v*,v_bar]",
    "steering.n_random=1",
    "steering.n_generated=2",
    "steering.sites=final_post_norm",
    "decoding.max_new_tokens=4",
)


def already_saved(_: Figure, folder: Path, name: str) -> list[Path]:
    """The files of the first time: saving takes longer than the rest."""
    return [folder / f"{name}.png", folder / f"{name}.pdf"]


def test_a_run_is_swept_and_its_report_shows_the_sweep(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ask(tmp_path, "run=last", *SWEEP)
    assert page == run / "report" / "index.html"
    text = page.read_text(encoding="utf-8")
    assert "steering sweeps;" not in text, "it is there, so it is not missing"
    assert "steering.sites=final_post_norm decoding.max_new_tokens=4" in text
    assert "0 was missing and is added" in " ".join(capsys.readouterr().out.split())
    table = run / "report" / "tables" / "sweep.csv"
    before = table.read_bytes()
    rows = pd.read_csv(table)
    assert {0.0, 1.0} == set(rows[rows["vector"] != "random"]["lambda"])
    effects = pd.read_csv(table.with_name("steering_effects.csv"))
    assert set(effects["vector"]) == {"v*", "v_bar"}
    assert set(effects["equal"]) == {"norm", "kl"}
    vectors = load_vectors(run / "report" / "vectors" / "steering_sweep.safetensors")
    assert set(vectors) == {f"final_post_norm/{name}" for name in ("v*", "v_bar", "random_1")}
    assert vectors["final_post_norm/v*"].id == VectorId(V_STAR, "final_post_norm", "prompt_last")
    assert vectors["final_post_norm/random_1"].id == VectorId("random", "final_post_norm", draw=1)
    assert vectors["final_post_norm/v*"].provenance["aligned"] == str(run / "aligned")
    assert pd.read_csv(table.with_name("steering_vectors.csv"))["cosine_with_v_star"][0] == pytest.approx(1)
    monkeypatch.setattr("analysis.report.page.save_figure", already_saved)
    ask(tmp_path, "run=last", *SWEEP)
    assert table.read_bytes() == before
    assert "going on, 14 of 14 parts" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match=r"sweep\.csv: was begun with seed=0, now it is 1"):
        ask(tmp_path, "run=last", *SWEEP, "steering.seed=1")
    assert table.read_bytes() == before
    monkeypatch.setattr("launch.analyzing.chosen_analyses", lambda *_, **__: {STEERING: False})  # as of analysis=all
    whole = ask(tmp_path, "run=last")
    assert whole is not None
    assert "into the aligned model, and back?" in whole.read_text(encoding="utf-8")
    assert "here it is shown as it is" in " ".join(capsys.readouterr().out.split())
    assert table.read_bytes() == before


@pytest.mark.filterwarnings("ignore:behaviour. degeneration")
def test_a_scorer_that_is_down_ends_with_exit_code_3_and_is_asked_again(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError("down")

    page = run / "report" / "index.html"
    with monkeypatch.context() as broken:
        broken.setattr(DegenerationScorer, "score", fail)
        with pytest.raises(IncompleteEvaluation, match=r"index\.html: written, but without .*degeneration \(6 of the "):
            ask(tmp_path, "run=last", *SWEEP)
    assert page.is_file()
    page.unlink()
    capsys.readouterr()
    assert ask(tmp_path, "run=last", *SWEEP) == page
    assert "going on, 8 of 14 parts" in " ".join(capsys.readouterr().out.split())
    metrics = pd.read_csv(run / "report" / "tables" / "sweep.csv")["metric"]
    assert (metrics == "degeneration").sum() == (metrics == "toxicity_word_list").sum() == 6 * 2


def test_vectors_of_files_and_of_other_runs_are_swept(tmp_path: Path, run: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    save_vectors(mine, {"up": SteeringVector(VectorId(OWN, "final_post_norm"), torch.ones(32), made="by hand")})
    other = tmp_path / "runs" / "fake" / "2026-01-30_12-00-00"
    shutil.copytree(run, other)
    options = [f"steering.vectors=[v*@response_mean,shuffled_layer,{mine}]", f"steering.controls=[{other}]"]
    small = [text for text in SWEEP if "vectors" not in text]
    page = ask(tmp_path, f"run={run}", *small, *options, "steering.n_generated=0")
    assert page is not None
    swept = set(pd.read_csv(page.parent / "tables" / "sweep.csv")["vector"])
    assert swept == {"v*", "v*@response_mean", "shuffled_layer", "mine:up", "v*_of_dpo", "random"}
    text = page.read_text(encoding="utf-8")
    assert "v* of another layer" in text
    assert "mine:up" in text


def test_a_dry_run_says_the_cost_and_writes_nothing(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert ask(tmp_path, "run=last", *SWEEP, "dry_run=true") is None
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    said = " ".join(capsys.readouterr().out.split())
    assert "choosing │ 4.0 │" in said  # 2 passes of the goals, and v* in both directions
    assert "teacher-forced │ 8.0 │" in said  # and one a direction and vector (v*, v̄, a random one)


def test_two_checkpoints_are_swept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = [f"{name}={asked.save_model(tmp_path / name, seed=i)}" for i, name in enumerate(("base", "aligned"))]
    data = ("data=synthetic", "judge=none", "data.n_prompts=30", "pairs.n_pairs=6")
    few = [*SWEEP, "steering.vectors=[v*]", "steering.n_generated=0"]
    page = ask(tmp_path, *two, *data, *few)
    assert page is not None
    assert f"afterastop,goonwithout={page.parent}" in "".join(capsys.readouterr().out.split())
    table = pd.read_csv(page.parent / "tables" / "sweep.csv")
    assert set(table["direction"]) == {"interpolation", "inversion"}
    assert set(table[table["metric"] == "recovery"]["n"]) == {3}
    assert ask(tmp_path, *two, *data, *few, f"out={tmp_path / 'here'}") == tmp_path / "here" / "index.html"
    assert "afterastop" not in "".join(capsys.readouterr().out.split()), "the same command goes on"


def test_options_without_effect_are_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match=r"steering\.seed: has no effect here; it is for analysis=steering_sweep"):
        ask(tmp_path, "run=last", "analysis=training", "steering.seed=1")
    with pytest.raises(UserError, match=r"steering\.dry_run"):
        ask(tmp_path, "run=last", "analysis=steering_sweep", "+steering.dry_run=true")
    with pytest.raises(UserError, match=r"behaviour\.beta: has no effect here; it is for analysis=behaviour"):
        ask(tmp_path, "run=last", "analysis=steering_sweep", "behaviour.beta=1")


@pytest.mark.slow
def test_from_the_command_line(run: Path) -> None:
    done = run_script("analyze.py", f"run={run}", *SWEEP)
    assert done.returncode == 0, done.stderr
    assert "Steering" in done.stdout
    assert f"Report: {run / 'report' / 'index.html'}" in done.stdout
    (run / "report" / "tables" / "sweep.csv").write_text("nonsense\n")
    broken = run_script("analyze.py", f"run={run}", *SWEEP)
    assert broken.returncode == 2
    assert broken.stderr.startswith(f"tiltmeter: {run / 'report' / 'tables' / 'sweep.csv'}: ")
    assert broken.stderr.count("\n") == 1
