"""Anthropic HH: exact splitting, and every anomaly of the real files pinned by row number.

Row numbers count from zero in the file, as in pair ids. The real files are read where they lie, never copied here.
"""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from datamodules import hh
from datamodules.files.jsonl import read_rows
from datamodules.hh import AnthropicHH, parse_row
from datamodules.records import Message
from tiltmeter.errors import UserError

HI = "\n\nHuman: Hi there\n\nAssistant:"
GOOD = (HI + " Hello.", HI + " Go away.")


def write_rows(path: Path, *rows: tuple[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"chosen": c, "rejected": r}) + "\n" for c, r in rows).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def test_a_row_becomes_messages_and_the_exact_text() -> None:
    parsed = parse_row(GOOD[0] + "\n", HI + "  Go away.")
    assert not isinstance(parsed, str)
    assert parsed == ((Message("user", "Hi there"),), HI, " Hello.\n", "  Go away.")


def test_the_split_is_at_the_right_most_assistant_turn() -> None:
    prompt = "\n\nHuman: One?\n\nAssistant: First.\n\nHuman:  Two?\n\nAssistant:"
    parsed = parse_row(prompt + " Same start, A", prompt + " Same start, B")
    assert not isinstance(parsed, str)
    messages, prompt_text, chosen_text, rejected_text = parsed
    assert [m.role for m in messages] == ["user", "assistant", "user"]
    assert [m.content for m in messages] == ["One?", "First.", "Two?"]
    assert (prompt_text, chosen_text, rejected_text) == (prompt, " Same start, A", " Same start, B")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (GOOD[0], GOOD[0], "identical responses"),
        (GOOD[0], GOOD[0] + " ", "identical responses"),
        (GOOD[0], HI + " ", "empty response"),
        (HI + "\n", GOOD[1], "empty response"),
        (GOOD[0], GOOD[1] + "\n\nHuman: Why?", "last turn is not the assistant's"),
        ("no turns", GOOD[1], "last turn is not the assistant's"),
        (GOOD[0], "\n\nHuman: Hi where\n\nAssistant: Go away.", "prompts differ"),
        (GOOD[0], GOOD[1] + "\n\nHuman: Why?\n\nAssistant: Because.", "prompts differ"),
        ("x" + GOOD[0], "x" + GOOD[1], "text before the first turn"),
        ("\n\nAssistant: Hm.", "\n\nAssistant: Ha.", "turns do not alternate"),
        ("\n\nHuman: A" + GOOD[0], "\n\nHuman: A" + GOOD[1], "turns do not alternate"),
        (HI + " One.\n\nAssistant: Two.", HI + " One.\n\nAssistant: Three.", "turns do not alternate"),
        ("\n\nHuman: \n\nAssistant: Yes?", "\n\nHuman: \n\nAssistant: No.", "empty turn in the prompt"),
    ],
)
def test_a_row_without_a_usable_preference_is_dropped_with_its_reason(chosen: str, rejected: str, reason: str) -> None:
    assert parse_row(chosen, rejected) == reason


def test_pairs_carry_file_row_group_and_both_forms(tmp_path: Path) -> None:
    other = ("\n\nHuman:  hi  THERE\n\nAssistant: A", "\n\nHuman:  hi  THERE\n\nAssistant: B")
    path = write_rows(tmp_path / "helpful-base_test.jsonl.gz", (GOOD[0], GOOD[0]), GOOD, other)
    pairs, reports = AnthropicHH(path=str(path)).load()
    assert [p.pair_id for p in pairs] == ["hh/helpful-base_test/00001", "hh/helpful-base_test/00002"]
    assert {p.source for p in pairs} == {"hh/helpful-base_test"}
    assert {p.group for p in pairs} == {"hi there"}
    assert pairs[0].chosen == Message("assistant", "Hello.")
    assert pairs[0].prompt_text + pairs[0].rejected_text == GOOD[1]
    [report] = reports
    assert (report.n_rows, report.n_kept, report.dropped) == (3, 2, Counter({"identical responses": 1}))
    assert report.location == str(path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": "x"}, "expected the keys chosen and rejected, got chosen"),
        ({"chosen": "x", "rejected": "y", "id": 3}, "got chosen, id, rejected"),
        ({"prompt": "x", "response": "y"}, "got prompt, response"),
        ({}, "got none"),
        ({"chosen": None, "rejected": "y"}, "chosen: expected a string, got NoneType"),
        ({"chosen": "x", "rejected": ["y"]}, "rejected: expected a string, got list"),
    ],
)
def test_rows_with_other_keys_or_types_are_refused_by_file_and_line(tmp_path: Path, row: object, words: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", GOOD)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(UserError) as caught:
        AnthropicHH(path=str(path)).load()
    assert str(caught.value).startswith(f"{path}:2: ")
    assert words in str(caught.value)


def test_a_folder_gives_one_report_per_file_and_subsets_choose_among_them(tmp_path: Path) -> None:
    for name in ("harmless-base_test.jsonl", "helpful-base_test.jsonl.gz", "helpful-base_train.jsonl"):
        write_rows(tmp_path / name, GOOD)
    pairs, reports = AnthropicHH(path=str(tmp_path)).load()
    assert [r.source for r in reports] == ["hh/harmless-base_test", "hh/helpful-base_test", "hh/helpful-base_train"]
    assert len({p.pair_id for p in pairs}) == 3
    _, reports = AnthropicHH(path=str(tmp_path), subsets=["helpful-base"], split="test").load()
    assert [r.source for r in reports] == ["hh/helpful-base_test"]
    assert reports[0].notes["not read"] == "harmless-base_test.jsonl, helpful-base_train.jsonl"


def test_a_copy_of_the_hub_repository_is_read_like_the_hub(tmp_path: Path) -> None:
    for subset in ("harmless-base", "helpful-base", "helpful-online"):
        write_rows(tmp_path / subset / "train.jsonl.gz", GOOD)
    pairs, reports = AnthropicHH(path=str(tmp_path)).load()
    assert [r.source for r in reports] == ["hh/harmless-base_train", "hh/helpful-base_train"]
    assert pairs[0].pair_id == "hh/harmless-base_train/00000"
    with pytest.raises(UserError, match=r"data\.path: no such file: .*harmless-base/test\.jsonl\.gz"):
        AnthropicHH(path=str(tmp_path), split="test").load()
    with pytest.raises(UserError, match=r"unknown subset 'helpful-onlin' .*did you mean helpful-online"):
        AnthropicHH(path=str(tmp_path), subsets=["helpful-onlin"]).load()


def test_without_a_path_the_paper_s_subsets_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def download(repo: str, filename: str, revision: str | None, key: str) -> Path:
        asked.append((repo, filename, revision))
        return write_rows(tmp_path / "snapshots" / "09be8c5" / filename, GOOD)

    monkeypatch.setattr(hh, "hub_file", download)
    pairs, reports = AnthropicHH(split="test", revision="v2").load()
    assert asked == [("Anthropic/hh-rlhf", f"{s}/test.jsonl.gz", "v2") for s in ("harmless-base", "helpful-base")]
    assert pairs[0].pair_id == "hh/harmless-base_test/00000"
    assert reports[0].location == "hub:Anthropic/hh-rlhf@09be8c5/harmless-base/test.jsonl.gz"


def test_wrong_options_are_named_by_key_with_the_nearest_match(tmp_path: Path) -> None:
    write_rows(tmp_path / "harmless-base_test.jsonl", GOOD)
    with pytest.raises(
        UserError, match=r"^data\.subsets: unknown subset 'harmles-base' .*did you mean harmless-base\?"
    ):
        AnthropicHH(subsets=["harmles-base"])
    with pytest.raises(UserError, match=r"^data\.subsets: no file with 'harmles-' .*did you mean harmless-base_test\?"):
        AnthropicHH(path=str(tmp_path), subsets=["harmless", "harmles-"]).load()
    with pytest.raises(UserError, match=r"^data\.subsets: expected a list of names"):
        AnthropicHH(subsets="harmless-base")
    with pytest.raises(UserError, match=r"^data\.subsets: expected a list of names"):
        AnthropicHH(subsets=[])
    with pytest.raises(UserError, match=r"^data\.split: expected train or test, got 'dev'"):
        AnthropicHH(split="dev")
    with pytest.raises(UserError, match=r"^data\.split: no file with 'train' in its name"):
        AnthropicHH(path=str(tmp_path), split="train").load()
    with pytest.raises(UserError, match=r"^data\.revision: only for data from the hub"):
        AnthropicHH(path=str(tmp_path), revision="main")
    with pytest.raises(UserError, match=r"^data\.path: no such file: gone"):
        AnthropicHH(path="gone").load()


def test_a_file_without_any_usable_pair_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", (GOOD[0], GOOD[0]), (GOOD[0], HI))
    with pytest.raises(UserError, match=r"no usable pair .*: 1 identical responses, 1 empty response"):
        AnthropicHH(path=str(path)).load()


# --- the real files ---------------------------------------------------------------------------------------------------

# file: rows, kept, rows dropped by reason. "prompts differ" is more than the number of rows whose rejected text does not
# start with chosen's prompt (4, 2, 0, 1): where one side's answer holds one more assistant turn, the right-most splits of
# the two sides lie at different places (for example helpful-base 168).
REAL: dict[str, tuple[int, int, dict[str, list[int]]]] = {
    "harmless-base_test.part80": (
        1850,
        1840,
        {
            "prompts differ": [995, 1350, 1569, 1570],
            "turns do not alternate": [601, 1047, 1483],
            "empty response": [413, 733, 874],
        },
    ),
    "helpful-base_test": (
        2354,
        2333,
        {
            "prompts differ": [168, 354, 567, 743, 960, 1011, 1166, 1307, 1450],
            "turns do not alternate": [355, 991, 1132, 1355, 1683, 1847],
            "empty response": [120, 740, 1214, 2063],  # 120 also has an empty turn in its prompt
            "identical responses": [721, 2168],
        },
    ),
    "helpful-online_test": (
        1137,
        1129,
        {
            "last turn is not the assistant's": [785, 1055],
            "empty response": [552, 893, 1053],
            "empty turn in the prompt": [464],
            "identical responses": [198, 736],
        },
    ),
    "helpful-rejection-sampled_test": (
        2749,
        2714,
        {
            "prompts differ": [719, 1597, 2364],
            "identical responses": [
                *(200, 237, 285, 305, 355, 382, 428, 501, 613, 690, 720, 747, 755, 872, 1164, 1271),
                *(1274, 1279, 1775, 1794, 1827, 1954, 1969, 2204, 2248, 2374, 2524, 2570, 2578, 2610, 2679, 2729),
            ],
        },
    ),
}
N_KEPT_WITH_INLINE_MARKER = {
    "harmless-base_test.part80": 31,
    "helpful-base_test": 27,
    "helpful-online_test": 3,
    "helpful-rejection-sampled_test": 24,
}


@pytest.mark.parametrize("name", REAL)
def test_each_anomalous_row_of_the_real_files_is_dropped_for_its_own_reason(shared_data: Path, name: str) -> None:
    n_rows, n_kept, dropped = REAL[name]
    path = shared_data / "hh-rlhf" / f"{name}.jsonl.gz"
    found: dict[str, list[int]] = {}
    for line_number, row in read_rows(path):
        parsed = parse_row(row["chosen"], row["rejected"])
        if isinstance(parsed, str):
            found.setdefault(parsed, []).append(line_number - 1)
    assert found == dropped

    pairs, [report] = AnthropicHH(path=str(path)).load()
    assert (report.n_rows, report.n_kept, len(pairs)) == (n_rows, n_kept, n_kept)
    assert report.dropped == Counter({reason: len(rows) for reason, rows in dropped.items()})
    assert report.notes["kept as they are"].startswith(f"{N_KEPT_WITH_INLINE_MARKER[name]} rows ")


def test_the_real_pairs_keep_their_text_to_the_letter(shared_data: Path) -> None:
    folder = shared_data / "hh-rlhf"
    pairs, reports = AnthropicHH(path=str(folder)).load()
    rows = {f"hh/{name}/{n - 1:05d}": row for name in REAL for n, row in read_rows(folder / f"{name}.jsonl.gz")}
    for pair in pairs:
        assert pair.prompt_text + pair.chosen_text == rows[pair.pair_id]["chosen"]
        assert pair.prompt_text + pair.rejected_text == rows[pair.pair_id]["rejected"]
        assert pair.prompt_text.endswith("\n\nAssistant:")
        assert (pair.chosen.content, pair.rejected.content) == (pair.chosen_text.strip(), pair.rejected_text.strip())
        assert [m.role for m in pair.prompt] == ["user", "assistant"] * (len(pair.prompt) // 2) + ["user"]
        assert all(m.content == m.content.strip() != "" for m in pair.prompt)
    assert len(pairs) == len({p.pair_id for p in pairs}) == 8016
    assert len({p.group for p in pairs}) == 7570
    assert [r.n_kept for r in reports] == [1840, 2333, 1129, 2714]


def test_groups_are_wider_than_prompts_on_real_data(shared_data: Path) -> None:
    """Rows that open with the same words share a group, whatever follows: some groups hold two or three pairs."""
    pairs, _ = AnthropicHH(path=str(shared_data / "hh-rlhf"), subsets=["harmless-base"]).load()
    sizes = Counter(Counter(p.group for p in pairs).values())
    assert sizes[1] < len({p.prompt_text for p in pairs}) == 1839
    assert set(sizes) == {1, 2, 3}
