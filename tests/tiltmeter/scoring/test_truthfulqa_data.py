"""TruthfulQA's questions from every form of the data, the harness's prompt, and files that are neither."""

import csv
import importlib.util
import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table, parquet

from tests.tiltmeter.scoring.questions import PRESET, ROWS, stand_in_preset, write
from tiltmeter.errors import UserError
from tiltmeter.scoring import truthfulqa
from tiltmeter.scoring.truthfulqa import TruthfulQA, read_preset, read_questions


def as_on_the_hub(row: dict[str, Any]) -> dict[str, Any]:
    targets = {
        name: {"choices": list(value), "labels": list(value.values())} for name, value in row.items() if "_" in name
    }
    return {"question": row["question"]} | targets


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "mc_task.json", ROWS)


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return stand_in_preset(tmp_path, monkeypatch)


def test_every_form_of_the_data_is_read_alike(data: Path, tmp_path: Path) -> None:
    truth = read_questions(str(data))
    assert [answer.is_true for answer in truth[0].answers["mc2"]] == [False, True, True, False]
    rows = [as_on_the_hub(row) for row in ROWS]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    parquet.write_table(Table.from_pylist(rows), tmp_path / "rows.parquet")
    for path in (write(tmp_path / "hub.json", rows), lines, tmp_path / "rows.parquet"):
        assert read_questions(str(path)) == truth
    old = [{name: value for name, value in row.items() if name != "mc0_targets"} for row in ROWS]
    assert "mc0" not in read_questions(str(write(tmp_path / "v1.json", old)))[0].answers


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def of_csv(row: dict[str, Any]) -> dict[str, str]:
    true, false = ([a for a, label in row["mc2_targets"].items() if label == wanted] for wanted in (1, 0))
    (best,) = (answer for answer, label in row["mc1_targets"].items() if label == 1)
    extra = {"Best Incorrect Answer": str(list(row["mc0_targets"])[1])} if "mc0_targets" in row else {}
    texts = {"Correct Answers": "; ".join(true), "Incorrect Answers": "; ".join(false)}
    return {"Type": "Adversarial", "Question": row["question"], "Best Answer": best, **extra, **texts}


def test_the_authors_csv_has_the_answers_of_their_json(shared_data: Path, tmp_path: Path) -> None:
    for name in ("v1_mc_task.part80.json", "mc_task.part80.json"):
        rows = json.loads((shared_data / "truthfulqa" / name).read_text(encoding="utf-8"))
        plain = [row for row in rows if all(answer and ";" not in answer for answer in row["mc2_targets"])]
        truth = read_questions(str(write(tmp_path / "plain.json", plain)))
        found = read_questions(str(write_csv(tmp_path / "TruthfulQA.csv", list(map(of_csv, plain)))))
        assert len(found) > 600
        for ours, theirs in zip(found, truth, strict=True):
            assert {kind: set(some) for kind, some in ours.answers.items()} == {
                kind: set(some) for kind, some in theirs.answers.items()
            }


def test_a_csv_without_a_column_or_a_cell_is_one_line(tmp_path: Path) -> None:
    whole = of_csv(ROWS[0])
    for row in ({k: v for k, v in whole.items() if k != "Best Answer"}, whole | {"Best Answer": " "}):
        with pytest.raises(UserError, match=r"question 1: nothing under Best Answer \(columns: Type, Question"):
            read_questions(str(write_csv(tmp_path / "TruthfulQA.csv", [row])))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no questions in it"),
        ({"question": "?"}, "expected a list of questions, got dict"),
        ([7], r"question 1: expected an object with a question, .* got 7"),
        ([{"question": "  "}], "expected an object with a question"),
        ([{"question": "?"}], r"question 1: mc1_targets: expected answers labelled 0 and 1, .* got null"),
        (
            [ROWS[0], ROWS[1] | {"mc1_targets": {"a": 1, "b": 1, "c": 0}}],
            "question 2: mc1_targets: expected exactly one true",
        ),
        ([ROWS[0] | {"mc2_targets": {"a": 1}}], "question 1: mc2_targets: .* at least one of each"),
        ([ROWS[0] | {"mc2_targets": {"a": 1, "b": 0, "c": 2}}], "mc2_targets: expected answers labelled 0 and 1"),
        ([ROWS[0] | {"mc0_targets": {"choices": ["a", "b"], "labels": [1]}}], "mc0_targets: expected answers labelled"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_one_line(tmp_path: Path, rows: Any, words: str) -> None:
    path = write(tmp_path / "bad.json", rows)
    with pytest.raises(UserError, match=words) as caught:
        TruthfulQA(str(path)).start()
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_path_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "no.json", "path: cannot read .* \\(No such file"),
        (tmp_path / "no.parquet", "path: cannot read"),
        (
            tmp_path / "data.txt",
            "path: can't tell the format of .* \\(expected .json, .jsonl, .parquet, .csv or hub:",
        ),
        (
            "hub:truthfulqa/truthful_qa@main",
            "path: cannot load hub:truthfulqa/truthful_qa@main .* give a local file",
        ),
    ):
        with pytest.raises(UserError, match=words) as caught:
            TruthfulQA(str(path)).start()
        assert "\n" not in str(caught.value)
    for name in ("bad.json", "bad.jsonl", "bad.parquet"):
        (tmp_path / name).write_text("{", encoding="utf-8")
        with pytest.raises(UserError, match=f"{name}: not valid {name[4:]}"):
            read_questions(str(tmp_path / name))


def test_the_prompt_is_the_harness_own_or_none(tmp_path: Path, preset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_preset(None) is None, "lm_eval is not installed here"
    assert read_preset(str(preset)) == PRESET
    folder = tmp_path / "tasks" / "truthfulqa"
    folder.mkdir(parents=True)
    task = folder / "truthfulqa_mc1.yaml"
    lines = PRESET.replace("\n", "\\n\\\n  ")
    task.write_text(
        f"""doc_to_text: "{{% set prompt_qa = '\\\n  {lines}'%}}{{{{prompt_qa + 'Q:'}}}}"\n""", encoding="utf-8"
    )
    assert read_preset(str(task)) == PRESET
    spec = ModuleSpec("lm_eval", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert read_preset(None) == PRESET
    for text in ("Q: another\nA: prompt", "", ": ["):
        task.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"preset_file: .* is not the prompt of lm-evaluation-harness 0.4.12"):
            read_preset(None)
    with pytest.raises(UserError, match=r"preset_file: cannot read .*no.txt"):
        read_preset(str(tmp_path / "no.txt"))


def test_the_checksum_is_the_published_one() -> None:
    assert truthfulqa.PRESET_SHA256 == "5c0da5f346e8652c9a85061a6e3aca6bc82e10a8a7dad4596fe980a9c9bae543"


def test_all_questions_of_both_versions_are_read(shared_data: Path) -> None:
    folder = shared_data / "truthfulqa"
    v1 = read_questions(str(folder / "v1_mc_task.part80.json"))
    v2 = read_questions(str(folder / "mc_task.part80.json"))
    assert (len(v1), len(v2)) == (654, 635)
    assert all(len(question.answers["mc0"]) == 2 for question in v2)
    assert all(question.answers["mc1"][0].is_true for question in v1 + v2), "the file puts the true one first"
    true_after_false = [
        q for q in v1 if sorted(a.is_true for a in q.answers["mc2"])[::-1] != [a.is_true for a in q.answers["mc2"]]
    ]
    assert len(true_after_false) == 2, "so the answers before the first false one are not all the true ones"
