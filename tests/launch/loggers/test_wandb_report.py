"""The report of a run on W&B, read back from the offline file and the files that would be uploaded."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml

from analysis.claims.claim import read_claims
from analysis.claims.evidence import judge_all
from analysis.claims.section import claims_section
from analysis.figures.training import training_section, training_table
from analysis.open.runs import Run, open_run
from analysis.open.studies import Study
from analysis.open.subject import subject_of_run
from analysis.report.page import Section, write_report
from analysis.report.samples import Samples
from benchmarks.verdicts import CLAIMS, study_of
from launch.loggers import wandb_report as module
from launch.loggers.wandb_report import (
    check_upload,
    copy_without_paths,
    upload_report,
    upload_study,
    without_paths,
)
from tests.analysis.conftest import CONFIG, dpo_rows
from tests.wandb_file import history_rows, read_records, wait_until_written
from tiltmeter.errors import UserError

ID = "a1b2c3d4"
CANARY = "sk-canary-0123456789abcdef"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    folder = tmp_path / "runs" / "fake" / "2026-01-31_12-00-00"
    (folder / "aligned").mkdir(parents=True)
    (folder / "aligned" / "config.json").write_text("{}", encoding="utf-8")
    data = CONFIG["data"] | {"path": str(tmp_path / "secret" / "data.jsonl")}
    config = CONFIG | {"data": data, "logger": {"project": "mine", "entity": "../evil"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    pd.DataFrame(dpo_rows()).to_csv(folder / "metrics.csv", index=False)
    (folder / "wandb" / f"offline-run-20260131_120000-{ID}").mkdir(parents=True)
    return open_run(folder)


def written(run: Run) -> tuple[Path, list[Section]]:
    sections = [training_section(training_table(run))]
    page = write_report(subject_of_run(run), sections, Samples([], f"Because of {run.folder}/probe.json."))
    (run.report / "tables" / "sweep.json").write_text(json.dumps({"judge": str(run.folder / "judge")}), "utf-8")
    (run.report / "judge_cache.sqlite").write_text(CANARY, encoding="utf-8")
    return page, sections


def test_the_report_reaches_the_run_that_training_logged_to(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MY_API_KEY", CANARY)
    assert check_upload(run) == ID
    said = upload_report(run, *written(run))
    (file,) = run.folder.glob(f"wandb/offline-run-*/run-{ID}.wandb")
    wait_until_written(file)
    assert said.endswith(f"wandb sync {run.folder / 'wandb'}/*run-*-{ID}")
    (opened,) = [record.run for record in read_records(file) if record.WhichOneof("record_type") == "run"]
    assert (opened.run_id, opened.project, opened.entity) == (ID, "mine", "")
    (row,) = [row for row in history_rows(file) if "report/training/path" in row]
    assert row["trainer/global_step"] == 9
    assert row["_step"] == 10 * len(run.metrics), "behind all that training logged"
    picture = file.parent / "files" / row["report/training/path"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    (artifact,) = [r.artifact for r in read_records(file) if r.WhichOneof("record_type") == "artifact"]
    assert (artifact.type, artifact.name) == ("report", f"report-{ID}")
    contents = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert {"index.html", "tables/training.csv", "figures/training.png", "figures/training.pdf"} <= set(contents)
    assert "judge_cache.sqlite" not in contents
    page = contents["index.html"].read_text(encoding="utf-8")
    assert "run=…/2026-01-31_12-00-00" in page
    assert contents["figures/training.png"].read_bytes() == (run.report / "figures" / "training.png").read_bytes()
    sent = [*contents.values(), *(path for path in (file.parent / "files").rglob("*") if path.is_file())]
    for path in sent:
        assert str(tmp_path).encode() not in path.read_bytes(), path
    for path in [*sent, file]:
        assert CANARY.encode() not in path.read_bytes()
    assert not list((file.parent / "files").glob("wandb-metadata.json"))


def test_pictures_inside_the_page_are_left_as_they_are(run: Run, tmp_path: Path) -> None:
    page, _ = written(run)
    copy_without_paths(page.parent, tmp_path / "copy")
    before, after = (path.read_text("utf-8") for path in (page, tmp_path / "copy" / "index.html"))
    pictures = [text.split("data:image/png;base64,")[1].split('"')[0] for text in (before, after)]
    assert pictures[0] == pictures[1]
    assert after.count("</") == before.count("</")


def test_paths_lose_their_folders() -> None:
    assert without_paths('"/home/a b/c"') == '"…/a b/c"'
    assert without_paths("(path=/data/hh/x.jsonl, k=1)") == "(path=…/x.jsonl, k=1)"
    assert without_paths("and/or 1/2/3 <a href=tables/x.csv></a></b>") == "and/or 1/2/3 <a href=tables/x.csv></a></b>"


def test_a_run_that_w_and_b_does_not_know(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(UserError, match=r"^upload: W&B is disabled by WANDB_MODE"):
        check_upload(run)
    (run.folder / "wandb" / f"offline-run-20260131_120000-{ID}").rmdir()
    with pytest.raises(UserError, match=r"^upload: .* has no wandb/ folder, so W&B has no such run"):
        check_upload(run)


def test_what_goes_wrong_there_is_a_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("quota\nexceeded")

    monkeypatch.setattr(module, "_upload", broken)
    page = run.report / "index.html"
    assert upload_report(run, page, []) == f"W&B: the report could not be sent (quota exceeded); it is in {run.report}"


def test_a_studys_report_is_a_run_of_its_own_in_the_group_of_its_arms(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = run.folder.parent / "study_2026-01-31_12-00-00"
    study = Study(folder, "fake", {"dpo": [run]}, [], 5, {"dpo": 3})
    section = claims_section(judge_all(read_claims(CLAIMS), study_of("pure shift", 0)))
    subject = replace(subject_of_run(run), report=study.report)
    page = write_report(subject, [section], Samples([], "none"))
    said = upload_study(study, page, [section])
    (file,) = folder.glob("wandb/offline-run-*/run-study-*.wandb")
    wait_until_written(file)
    assert said.startswith("W&B: the report is kept offline; upload it with: wandb sync ")
    (opened,) = [record.run for record in read_records(file) if record.WhichOneof("record_type") == "run"]
    assert (opened.run_group, opened.job_type, opened.project) == (folder.name, "study", "mine")
    (row,) = [row for row in history_rows(file) if "report/claims/path" in row]
    assert row["report/claims_table/nrows"] == len(section.table)
