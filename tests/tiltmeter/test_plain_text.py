"""Commands run to their end and say what they have to say where the output takes ASCII alone."""

import io
import sys
from pathlib import Path

import pytest
from rich.table import Table

from launch.configuration import prepare_overrides
from launch.screen import console
from tests.cli import TINY, run_train
from tests.processes import run_script
from tiltmeter.errors import UserError
from tiltmeter.plain_text import allow_any_encoding, plain


def ascii_output() -> None:
    """As PYTHONIOENCODING=ascii has it."""
    sys.stdout.reconfigure(encoding="ascii", errors="strict")  # type: ignore[union-attr]
    sys.stderr.reconfigure(encoding="ascii", errors="backslashreplace")  # type: ignore[union-attr]


def test_a_table_stays_straight_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    allow_any_encoding()
    table = Table("ΔH · λ", "interval")
    table.add_row("ρ₁ × v̄", "0.1 … 0.3 – ‖δ‖²")
    console().print(table)
    sys.stdout.flush()
    said = written.getvalue().decode("ascii")
    assert "r1 x v" in said
    assert "0.1 ~ 0.3 - |d|2" in said
    assert len({len(line) for line in said.splitlines()}) == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_character_can_be_printed(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    allow_any_encoding()
    sys.stdout.write("".join(map(chr, range(32, 0x3000))) + "𝄞\udcc3")
    sys.stdout.flush()
    assert written.getvalue().decode(encoding)


def test_another_letter_is_never_made_of_a_letter_in_a_path() -> None:
    assert plain("runs/ü的") == "runs/\\xfc\\u7684"


def test_bytes_that_are_no_text_are_one_line() -> None:
    with pytest.raises(UserError, match=r"these bytes are no text in this locale's encoding; set LANG=C\.UTF-8"):
        prepare_overrides(["runs_root=r\udcc3\udcbcns"], config_name="train")


@pytest.mark.parametrize("script", ["train.py", "analyze.py"])
def test_an_error_is_one_line_in_ascii(script: str) -> None:
    done = run_script(script, "fünf…=1", before=ascii_output)
    assert done.returncode == 2
    assert done.stderr.isascii()
    assert done.stderr.startswith("tiltmeter: f\\xfcnf~=1: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_run_ends_well_in_ascii(tmp_path: Path) -> None:
    short = ("trainer.max_steps=2", "trainer.val_check_interval=2", "datamodule.pairs_per_step=8")
    done = run_train(*TINY, *short, "logger=csv", f"runs_root={tmp_path}", before=ascii_output)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert "Hidden states: DH = policy - base" in done.stdout
    assert "Next: python analyze.py" in done.stdout
