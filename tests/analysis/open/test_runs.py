import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.open.runs import CONFIG_BYTES, find_run, open_run
from tiltmeter.errors import UserError


def test_a_finished_run_opens_as_plain_data(make_run: Callable[..., Path]) -> None:
    run = open_run(make_run())
    assert run.setting("module._target_") == "lightning_modules.dpo.DPOModule"
    assert run.setting("module") is None
    assert run.setting("no.such.thing") is None
    assert run.n_steps == 10
    assert run.started is not None
    assert run.started.isoformat() == "2026-01-31T12:00:00"
    assert len(run.metrics) == 12
    assert run.metrics["val/loss"].notna().sum() == 2


def test_last_is_the_newest_finished_run_of_any_experiment(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("b", "2026-01-01_10-00-00")
    make_run("a", "2026-01-02_10-00-00")
    newest = make_run("a", "2026-01-02_10-00-00_2")
    make_run("b", "2026-01-03_10-00-00", finished=False)
    make_run("cache", "2026-01-04_10-00-00")
    make_run("a", "renamed")
    assert find_run("last", tmp_path / "runs") == newest


def test_last_without_any_run_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run=last: no finished run below .*; train one first: python train\.py"):
        find_run("last", tmp_path / "runs")


def refuse(folder: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        open_run(folder)
    assert "\n" not in str(caught.value)


def test_what_to_type_is_quoted(make_run: Callable[..., Path], tmp_path: Path) -> None:
    unfinished = make_run(finished=False).rename(tmp_path / "it's =b")
    with pytest.raises(UserError) as caught:
        open_run(unfinished)
    (word,) = shlex.split(str(caught.value).partition("resume it with ")[2].removesuffix(" and its experiment"))
    assert word == f'ckpt_path="{unfinished}/checkpoints/last.ckpt"'


def test_a_folder_that_is_no_finished_run_is_named(make_run: Callable[..., Path], tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "run: no such folder: .*nowhere")
    run = make_run(finished=False)
    refuse(run, r"has no aligned/ model, so its training did not finish; resume it with ckpt_path=")
    refuse(run.parent, f"no config.yaml, so it is no run folder; the newest run in it is .*{run.name}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("!!python/object/apply:os.mkdir [owned]", "not a plain YAML file"),
        ("a: !!python/name:os.system", "not a plain YAML file"),
        ("a: !!timestamp nonsense", "not a plain YAML file"),
        ("a: [", "not a plain YAML file"),
        ("[" * 5000, "not a plain YAML file"),
        ("just words", "expected a mapping of settings, got str"),
        ("# " + "x" * CONFIG_BYTES, "more than any configuration has"),
    ],
)
def test_a_damaged_or_hostile_config_is_refused(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run()
    (run / "config.yaml").write_text(text, encoding="utf-8")
    refuse(run, rf"config\.yaml: .*{words}")
    assert not (tmp_path / "owned").exists()


def test_a_target_in_a_run_folder_is_only_text(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a run folder was executed")

    monkeypatch.setattr(os, "system", forbidden)
    target = {"_target_": "os.system", "command": f"touch {tmp_path / 'owned'}"}
    run = open_run(make_run(config={"module": target, "data": target, "callbacks": {"x": target}}))
    assert run.setting("module._target_") == "os.system"
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "its first line must name every column once"),
        ("step,loss,loss\n0,1,2\n", "its first line must name every column once"),
        ("step,train/loss\n", "it has no rows"),
        ("step,train/loss\n0,0.7\n1\n", "line 3 has 1 of 2 fields"),
        ("step,train/loss\n0,zero\n", "line 2: could not convert"),
        ("step,train/loss\n0.5,1\n", "column step must hold whole numbers"),
        ("step,train/loss\n,1\n", "column step must hold whole numbers"),
        ('step,train/loss\n0,"1\n', "damaged"),
    ],
)
def test_a_damaged_metrics_file_is_named_with_its_line(make_run: Callable[..., Path], text: str, words: str) -> None:
    run = make_run()
    (run / "metrics.csv").write_text(text, encoding="utf-8")
    refuse(run, rf"metrics\.csv: damaged: .*{words}" if words != "damaged" else words)


def test_bytes_that_are_no_text_are_damage(make_run: Callable[..., Path]) -> None:
    run = make_run()
    (run / "metrics.csv").write_bytes(b"step,train/loss\n\xff\xfe\x00")
    refuse(run, r"metrics\.csv: damaged")


def test_a_missing_metrics_file_is_named(make_run: Callable[..., Path]) -> None:
    run = make_run()
    (run / "metrics.csv").unlink()
    refuse(run, r"metrics\.csv: no such file")
