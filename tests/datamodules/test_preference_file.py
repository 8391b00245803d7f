"""People's own preference files: every form of docs/data.md, what is left out, validation files, sources and refusals."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from trl import extract_prompt

from datamodules.files.preference_forms import FORMS, TRANSCRIPTS, common_beginning
from datamodules.preference_file import PreferenceFile
from datamodules.records import PreferencePair
from datamodules.splits import split_by_group
from tests.datamodules.preference_examples import DOC, EXAMPLES, load, shown
from tiltmeter.errors import UserError

ROWS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": " x"} for i in range(6)]


def write(path: Path, rows: Sequence[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(pairs: Sequence[PreferencePair]) -> list[tuple[object, ...]]:
    return [(p.prompt, p.chosen, p.rejected, p.prompt_text, p.chosen_text, p.rejected_text, p.group) for p in pairs]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_file_of_the_documentation_gives_the_pairs_that_stand_beside_it(tmp_path: Path, name: str) -> None:
    example = EXAMPLES[name]
    assert shown(*load(example.write(tmp_path), **example.options)) == example.result


def test_every_example_of_the_documentation_is_read_and_every_form_has_one(tmp_path: Path) -> None:
    assert len(EXAMPLES) == DOC.read_text(encoding="utf-8").count("```diff")
    forms = {load(e.write(tmp_path), **e.options)[1][0].notes["form"] for e in EXAMPLES.values()}
    assert {*FORMS.values(), TRANSCRIPTS} - forms == {
        "messages and two answers as text"
    }  # of which the next test has one


def test_two_answers_as_text_follow_messages(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}], "chosen": "Hello.", "rejected": "No."}
    ((pair,), _) = load(write(tmp_path / "a.jsonl", [row]))
    assert (pair.prompt_text, pair.chosen_text) == ("\n\nHuman: Hi\n\nAssistant:", " Hello.")


@pytest.mark.parametrize("kind", [".jsonl.gz", ".json", ".parquet"])
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.endswith("jsonl") and name != "left_out.jsonl"])
def test_other_file_formats_hold_the_same_pairs(tmp_path: Path, name: str, kind: str) -> None:
    example = EXAMPLES[name]
    rows = [json.loads(line) for line in example.text.splitlines()]
    path = tmp_path / f"other{kind}"
    if kind == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        write(path, rows)
    assert contents(load(path, **example.options)[0]) == contents(load(example.write(tmp_path), **example.options)[0])


def test_a_json_file_of_one_object_a_line_is_read(tmp_path: Path) -> None:
    assert len(load(write(tmp_path / "a.json", ROWS))[0]) == len(ROWS)


def test_saved_data_sets_are_read_with_and_without_splits(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "plain"))
    splits = {"train": table, "test": table.select(range(2))}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "split"))  # type: ignore[arg-type]
    expected = contents(load(write(tmp_path / "a.jsonl", ROWS))[0])
    assert contents(load(tmp_path / "plain")[0]) == expected
    pairs, (report,) = load(tmp_path / "split")
    assert contents(pairs) == expected
    assert report.notes["not read"] == "test"
    assert contents(load(tmp_path / "split", split="test")[0]) == expected[:2]
    assert "no split 'dev'" in refusal(tmp_path / "split", split="dev")
    assert "has no splits" in refusal(tmp_path / "plain", split="test")


def test_text_is_taken_character_by_character(tmp_path: Path) -> None:
    row = {"prompt": "  Q: why?\nA:", "chosen": " so ", "rejected": "\tno\n"}
    ((pair,), _) = load(write(tmp_path / "a.jsonl", [row]))
    assert (pair.prompt_text, pair.chosen_text, pair.rejected_text) == (row["prompt"], row["chosen"], row["rejected"])


def test_a_prompt_and_answers_of_a_transcript_are_its_turns(tmp_path: Path) -> None:
    row = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello.", "rejected": " No."}
    ((pair,), _) = load(write(tmp_path / "a.jsonl", [row]))
    assert [(turn.role, turn.content) for turn in pair.prompt] == [("user", "Hi")]
    assert (pair.prompt_text, pair.chosen_text) == (row["prompt"], row["chosen"])


@settings(max_examples=30, deadline=None)
@given(st.text("ab ", min_size=1), st.text("ab ", min_size=1), st.text("ab ", min_size=1))
def test_the_common_beginning_is_that_of_trl(prompt: str, chosen: str, rejected: str) -> None:
    chosen, rejected = f"{prompt}{chosen}x", f"{prompt}{rejected}y"
    assert common_beginning(chosen, rejected) == extract_prompt({"chosen": chosen, "rejected": rejected})["prompt"]


def side(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


ANSWERS = {"chosen": side("", "b")[1:], "rejected": side("", "c")[1:]}
TEXTS = {"prompt": "good", "chosen": "b", "rejected": "c"}
PREFIXED = {"chosen": "good b", "rejected": "good c"}
DIALOGUES = {"chosen": side("good", "b"), "rejected": side("good", "c")}
TURNS = {"prompt": side("good"), "chosen": "b", "rejected": "c"}
SYSTEM, TOOL = {"role": "system", "content": "s"}, {"role": "tool", "content": "s"}


@pytest.mark.parametrize(
    ("good", "change", "reason"),
    [
        (TEXTS, {"chosen": " "}, "empty response"),
        (TEXTS, {"prompt": " "}, "empty prompt"),
        (TEXTS, {"chosen": " c"}, "identical responses"),
        (TEXTS, {"rejected": None}, "without rejected"),
        (TEXTS, {"prompt": side("Q")}, "not in the form of the first rows"),
        (PREFIXED, {"chosen": "abc", "rejected": "xyz"}, "no common beginning"),
        (PREFIXED, {"chosen": "good c, too"}, "empty response"),
        (DIALOGUES, {"chosen": side("Q", "a")}, "prompts differ"),
        (DIALOGUES, {"chosen": side("good", "c")}, "identical responses"),
        (DIALOGUES, {"chosen": side("good", "c", "R", "b")}, "one side is the beginning of the other"),
        (DIALOGUES, {"chosen": side("good", "b", "R", "b")}, "the sides part before their last turn"),
        (DIALOGUES, {"chosen": side("Q", "a", "R"), "rejected": side("Q", "a", "S")}, "a response that is not the assistant's"),
        (TURNS, {"prompt": side("Q", "a")}, "the prompt does not end with a user's turn"),
        (TURNS, {"prompt": side("Q", "a", "R")[1:]}, "turns do not alternate"),
        (TURNS, {"prompt": [*side("Q"), *side("R")]}, "turns do not alternate"),
        (TURNS, {"prompt": [*side("Q", "a"), SYSTEM, *side("R")]}, "a system turn that is not the first"),
        (TURNS, {"prompt": [TOOL]}, "a turn of another role (tool)"),
        (TURNS, {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "a turn that is not text"),
        (TURNS, {"prompt": side("")}, "empty turn"),
        (TURNS, {"prompt": []}, "no messages"),
        ({"prompt": "good", **ANSWERS}, {"chosen": side("P", "a"), "rejected": side("P", "b")},
         "the messages do not continue the prompt"),
    ],
)  # fmt: skip
def test_rows_that_are_no_pair_are_counted_by_reason(
    tmp_path: Path, good: dict[str, Any], change: dict[str, Any], reason: str
) -> None:
    pairs, (report,) = load(write(tmp_path / "a.jsonl", [good, good, good | change]))
    assert (len(pairs), report.n_rows, report.n_kept, dict(report.dropped)) == (2, 3, 2, {reason: 1})


def test_a_file_of_which_no_row_is_left_is_refused_with_the_reasons(tmp_path: Path) -> None:
    rows = [TURNS | {"prompt": side("")}, TURNS | {"prompt": [*side("Q"), *side("R")]}]
    said = refusal(write(tmp_path / "a.jsonl", rows))
    assert "no usable pair in 2 rows" in said
    assert "1 empty turn, 1 turns do not alternate" in said


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"better": "a", "worse": "b"}], {}, ["in no known form", "columns found: better, worse", "prompt and responses as text",
                                               "Human/Assistant transcripts", "data.columns.prompt=NAME"]),
        ([{"prompt": "Q", "chosen": "a"}], {}, ["no column rejected", "found: chosen, prompt", "data.columns.rejected=NAME"]),
        ([{"prompt": "Q", "completion": "a", "label": True}], {}, ["unpaired rows", "join for each prompt"]),
        ([TEXTS], {"columns": {"prompt": "question"}}, ["data.columns.prompt=question: no such", "chosen, prompt, rejected"]),
        ([TEXTS], {"columns": {"promt": "question"}}, ["data.columns.promt=question", "did you mean prompt?"]),
        ([TEXTS], {"source_column": "domain"}, ["data.source_column=domain: no such column"]),
        ([TEXTS], {"min_margin": 1.0}, ["data.min_margin", "score_chosen and score_rejected"]),
        ([TEXTS | {"prompt": f"{i}", "id": i} for i in range(60)], {"source_column": "id"}, ["60 different values"]),
        ([TEXTS], {"split": "test"}, ["data.split", "a.jsonl"]),
        ([TEXTS], {"revision": "main"}, ["data.config, data.revision: only for data from the hub"]),
        ([TEXTS], {"name": "a/b"}, ["expected data.path=FILE_OR_FOLDER, or data.name", "got both"]),
        ([TEXTS], {"malformed": "ignore"}, ["data.malformed"]),
        ([TEXTS], {"validation_path": []}, ["data.validation_path: expected a file"]),
        ([TEXTS], {"validation_path": "nowhere.csv"}, ["data.validation_path: no such file: nowhere.csv"]),
    ],
)  # fmt: skip
def test_what_can_not_be_read_is_refused_in_one_line(
    tmp_path: Path, rows: list[Any], options: dict[str, Any], words: list[str]
) -> None:
    said = refusal(write(tmp_path / "a.jsonl", rows), **options)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"hi", "not a table by its name"),
        ("a.csv", b"", "no rows"),
        ("a.csv", b"prompt,chosen,rejected\na,b\n", "a.csv:2: expected 3 cells as in the first line, got 2"),
        ("a.csv", b'prompt,chosen,rejected\na,b,"c\n', "a.csv:2: unexpected end of data"),
        ("a.csv", b"prompt,chosen,rejected\na,b,\xff\n", "invalid UTF-8"),
        ("a.json", b"[]", "no rows"),
        ("a.json", b'[{"a": 1},\n {"a" 1}]', "a.json:2:7: bad JSON"),
        ("a.json", b'[{"a": "\xff"}]', "invalid UTF-8"),
        ("a.json", b'[{"a": "\\ud83d"}]', "half a surrogate pair"),
        ("a.json", b"[1]", "entry 1: expected a JSON object"),
        ("a.parquet", b"PAR1", "damaged or no parquet file"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert words in refusal(path)


def test_an_unreadable_row_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected\n" + "".join(f"{i},b,c\n" for i in range(200)) + "d,e\n", encoding="utf-8")
    pairs, (report,) = load(path, malformed="skip")
    assert len(pairs) == 200
    assert report.notes["malformed, left out"].startswith("1 (")


def test_a_folder_is_all_its_files_or_those_of_a_split_and_shards_are_one_source(tmp_path: Path) -> None:
    for i in (0, 1):
        write(tmp_path / f"train-0000{i}-of-00002.jsonl", [TEXTS | {"prompt": f"{i}"}])
    write(tmp_path / "test.jsonl", [TEXTS | {"prompt": "t"}])
    pairs, reports = load(tmp_path, split="train")
    assert [pair.pair_id for pair in pairs] == [f"preferences/train-0000{i}-of-00002/00000" for i in (0, 1)]
    assert {pair.source for pair in pairs} == {"preferences/train"}
    assert reports[0].notes["not read"] == "test.jsonl"
    assert {pair.source for pair in load(tmp_path)[0]} == {"preferences/train", "preferences/test"}
    assert "no file with 'dev' in its name" in refusal(tmp_path, split="dev")


def test_a_list_of_files_keeps_its_order_and_the_same_name_in_two_folders_stays_apart(tmp_path: Path) -> None:
    paths = []
    for folder in "ba":
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "x.jsonl", [TEXTS | {"prompt": folder}]))
    assert [pair.pair_id for pair in load(paths)[0]] == ["preferences/b/x/00000", "preferences/a/x/00000"]
    with pytest.raises(UserError, match="the same data twice"):
        load([paths[0], paths[0]])


def test_a_column_names_the_sources_and_rows_without_it_are_the_file_s(tmp_path: Path) -> None:
    rows = [TEXTS | {"domain": domain} for domain in ("law", "code", None)]
    assert [pair.source for pair in load(write(tmp_path / "a.jsonl", rows), source_column="domain")[0]] == [
        "law", "code", "preferences/a",
    ]  # fmt: skip


def test_margins_below_the_least_and_rows_without_scores_are_left_out(tmp_path: Path) -> None:
    scored = [
        TEXTS | {"better": a, "score_rejected": b}
        for a, b in ((3, 1), ("2", "1"), (None, 1), (float("nan"), 1), (1, 2))
    ]
    path, columns = write(tmp_path / "a.jsonl", scored), {"score_chosen": "better"}
    pairs, (report,) = load(path, columns=columns, min_margin=2)
    assert [dict(pair.attributes) for pair in pairs] == [
        {"score_chosen": 3.0, "score_rejected": 1.0, "score_margin": 2.0}
    ]
    assert report.dropped == {"without two scores": 2, "with a margin below 2": 2}
    assert (
        "1 rows whose chosen response has the lower score"
        in load(path, columns=columns)[1][0].notes["kept as they are"]
    )


def test_validation_and_probe_pairs_come_from_the_validation_file_alone(tmp_path: Path) -> None:
    shared = ROWS[0]["prompt"].upper()  # the same prompt but for case
    held_out = write(tmp_path / "val.jsonl", [TEXTS | {"prompt": p} for p in (shared, "v", "w")])
    pairs, (training, validation) = load(write(tmp_path / "a.jsonl", ROWS), validation_path=str(held_out))
    assert training.dropped == {"whose prompt is in data.validation_path too": 1}
    assert (training.n_kept, validation.n_kept) == (len(ROWS) - 1, 3)
    splits = split_by_group(pairs, sizes={"train": None, "val": 2, "probe": 1}, seed=0)
    assert {pair.pair_id for name in ("val", "probe") for pair in splits[name]} == {
        f"preferences/val/0000{i}" for i in range(3)
    }
    assert len(splits["train"]) == len(ROWS) - 1
    assert len({pair.source for pair in pairs}) == 1
    with pytest.raises(UserError, match=r"the 3 pairs of data\.validation_path are too few for val_pairs=3"):
        split_by_group(pairs, sizes={"train": None, "val": 3, "probe": 1}, seed=0)
    few = split_by_group(pairs, sizes={"train": 2, "val": 1, "probe": 1}, seed=0)
    assert not any(pair.held_out for pair in few["train"])


def hub(monkeypatch: pytest.MonkeyPatch, *, info: Any = None, rows: Any = None) -> list[Any]:
    """A hub that answers, or fails, like this; and what was asked of ``load_dataset``."""
    asked: list[Any] = []

    def answer(value: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda *_, **__: answer(info or SimpleNamespace(sha="09be8c5"))
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **named: (asked.append((args, named)), answer(rows))[1])
    return asked


def test_a_data_set_of_the_hub_is_read_by_configuration_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, rows=datasets.Dataset.from_list(ROWS))
    pairs, (report,) = PreferenceFile(name="a/b", config="c", split="test", revision="d").load()
    assert asked == [(("a/b", "c"), {"split": "test", "revision": "d"})]
    assert report.location == "hub:a/b@09be8c5 split test"
    assert pairs[0].pair_id == "preferences/b_c_test/00000"
    assert len(pairs) == len(ROWS)


@pytest.mark.parametrize(
    ("info", "rows", "words"),
    [
        (ConnectionError("no route"), None, ["data.path: can't get split train of a/b", "no network", "data.path=FILE_OR_FOLDER"]),
        (None, RuntimeError("Dataset scripts are no longer supported, but found b.py"), ["data.revision=refs/convert/parquet"]),
        (None, ValueError("Config name is missing.\nPick one"), ["data.name=a/b: Config name is missing", "data.config="]),
        (None, datasets.exceptions.DatasetGenerationError("damaged"), ["can't get split train of a/b"]),
    ],
)  # fmt: skip
def test_what_the_hub_does_not_give_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, info: Any, rows: Any, words: list[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    asked = hub(monkeypatch, info=info, rows=rows)
    with pytest.raises(UserError) as caught:
        PreferenceFile(name="a/b").load()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
    assert bool(asked) == (info is None)


def test_without_network_a_downloaded_data_set_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / "a___b").mkdir()
    hub(monkeypatch, info=ConnectionError("no route"), rows=datasets.Dataset.from_list(ROWS))
    assert len(PreferenceFile(name="a/b").load()[0]) == len(ROWS)


def test_a_folder_is_no_data_set_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"files are read by data\.path="):
        PreferenceFile(name=str(tmp_path)).load()
