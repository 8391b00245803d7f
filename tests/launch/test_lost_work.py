"""Work that is done is never lost: not to a disk that fills up, to one section that fails, to another job, to bad weights."""

import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis.figures import fig1c_clouds
from launch import run_folder
from launch.run_folder import claim_folder
from lightning_modules.weight_guard import check_weights
from tests.analysis.asked import TOKENIZER, save_model
from tests.cli import TINY, only_run, run_train
from tests.launch.analyze_command import ask
from tiltmeter.errors import FailedWrite, IncompleteEvaluation, NumericalStop
from tiltmeter.files import write_atomically

ROOM = 2048
"""Bytes that a file may grow to."""
WRITERS: dict[str, Callable[[Path], object]] = {
    "torch": lambda path: torch.save({"rows": torch.zeros(4096)}, path),
    "safetensors": lambda path: save_file({"rows": torch.zeros(4096)}, path),
    "tokenizers": lambda path: TOKENIZER.save_pretrained(path),
    "pandas": lambda path: pd.DataFrame({"x": range(4096)}).to_csv(path),
    "text": lambda path: path.write_text("x" * 4096),
}
READ_NOW = (
    "analysis=[geometry,entropy,entropy_controls,singular_values,signal_rank,cosines,consistency,clouds,projection]"
)
DATA = ("data=synthetic", "data.n_prompts=30", "pairs.n_pairs=6")


@pytest.fixture
def little_room() -> Iterator[None]:
    """Every write beyond the first bytes of a file fails half-way, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_that_fails_half_way_is_one_error_for_every_library_and_keeps_the_old_file(
    writer: str, tmp_path: Path, little_room: None
) -> None:
    target = tmp_path / "kept"
    target.write_text("old")
    with pytest.raises(FailedWrite, match=r"kept: could not be written \(.*MiB are free there\)"):
        write_atomically(target, WRITERS[writer])
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert target.read_text() == "old"


def test_jobs_that_start_in_the_same_second_claim_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime(2026, 1, 31, 12)

    monkeypatch.setattr(run_folder, "datetime", Stopped)
    with ThreadPoolExecutor(8) as jobs:
        claimed = list(jobs.map(lambda _: claim_folder(tmp_path / "runs"), range(8)))
    first = "2026-01-31_12-00-00"
    assert sorted(folder.name for folder in claimed) == [first, *(f"{first}_{n}" for n in range(2, 9))]


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), 1001.0])
def test_weights_that_are_not_finite_or_exploded_are_not_kept(norm: float) -> None:
    check_weights(999.0, before=10.0, step=3)
    with pytest.raises(NumericalStop, match=r"step 3: weights are .* neither saved nor exported"):
        check_weights(norm, before=10.0, step=3)


@pytest.mark.slow
def test_numbers_that_go_wrong_in_the_last_steps_end_with_exit_code_4_and_no_model(tmp_path: Path) -> None:
    wrong = ("module.learning_rate=1e30", "trainer.max_steps=3", "callbacks=none", "logger=csv")
    done = run_train(*TINY, *wrong, f"runs_root={tmp_path}")
    assert done.returncode == 4, done.stderr
    assert not (only_run(tmp_path) / "aligned").exists()


def barely_different(folder: Path) -> tuple[str, str]:
    """Two checkpoints, the second one as after a first step at a rate of 1e-8."""
    base, aligned = (save_model(folder / name, seed=0) for name in ("base", "aligned"))
    path = folder / "aligned" / "model.safetensors"
    weights = load_file(path)
    generator = torch.Generator().manual_seed(0)
    moved = {name: w + 1e-8 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(moved, path, metadata={"format": "pt"})
    return f"base={base}", f"aligned={aligned}"


@pytest.mark.slow
def test_models_that_barely_differ_have_a_report(tmp_path: Path) -> None:
    page = ask(tmp_path, *barely_different(tmp_path), *DATA, READ_NOW)
    assert page is not None
    assert "failed:" not in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_section_that_fails_is_named_on_the_page_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("All-NaN slice")

    monkeypatch.setattr(fig1c_clouds, "draw_panels", broken)
    two = (f"base={save_model(tmp_path / 'old', seed=0)}", f"aligned={save_model(tmp_path / 'new', seed=1)}")
    with pytest.raises(IncompleteEvaluation, match="written, but clouds failed: ValueError: All-NaN slice"):
        ask(tmp_path, *two, *DATA, "analysis=[cosines,clouds,projection]")
    (page,) = tmp_path.rglob("index.html")
    assert "clouds failed: ValueError: All-NaN slice" in page.read_text(encoding="utf-8")
    assert {path.stem for path in (page.parent / "figures").glob("*.png")} == {"cosines", "projection"}
