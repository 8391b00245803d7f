"""Malformed rows: the first is refused, or a few are left out and told."""

import json
from pathlib import Path

import pytest

from datamodules.hh import AnthropicHH
from datamodules.oasst1 import OASST1
from datamodules.records import PreferenceSource
from tests.datamodules.test_oasst1 import ask, reply
from tiltmeter.errors import UserError

BAD = ('{"chosen": "half', '{"other": 1}', "[1]", '{"chosen": null, "rejected": "x"}')


def hh_row(i: int) -> str:
    start = f"\n\nHuman: Question {i}\n\nAssistant:"
    return json.dumps({"chosen": f"{start} Yes.", "rejected": f"{start} No."})


def write(path: Path, rows: list[str], bad: dict[int, str]) -> str:
    lines = [bad.get(i, row) for i, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def oasst_row(i: int) -> str:
    root = ask(f"q{i}", reply(f"worse{i}", 1), reply(f"better{i}", 0))
    return json.dumps({"message_tree_id": f"q{i}", "tree_state": "ready_for_export", "prompt": root})


@pytest.mark.parametrize(("kind", "row"), [(AnthropicHH, hh_row), (OASST1, oasst_row)])
def test_few_malformed_rows_are_left_out_and_told_where_that_is_asked_for(
    tmp_path: Path, kind: type[PreferenceSource], row: object
) -> None:
    rows = [row(i) for i in range(200)]  # type: ignore[operator]
    whole, _ = kind(write(tmp_path / "whole.jsonl", rows, {})).load()  # type: ignore[call-arg]
    path = write(tmp_path / "few.jsonl", rows, {3: BAD[0], 150: BAD[1]})
    with pytest.raises(UserError, match=r"few\.jsonl:4:\d+: bad JSON"):
        kind(path).load()  # type: ignore[call-arg]
    pairs, (report,) = kind(path, malformed="skip").load()  # type: ignore[call-arg]
    texts = {pair.prompt_text + pair.chosen_text for pair in whole}
    assert len(pairs) == len(whole) * 198 // 200
    assert {pair.prompt_text + pair.chosen_text for pair in pairs} <= texts
    assert report.notes["malformed, left out"].startswith(f"2 ({path}:4:")
    assert len({pair.pair_id for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("bad", BAD)
def test_file_with_more_than_one_percent_malformed_rows_is_refused(tmp_path: Path, bad: str) -> None:
    path = write(tmp_path / "many.jsonl", [hh_row(i) for i in range(200)], {1: bad, 5: bad, 9: bad})
    with pytest.raises(UserError, match=r"many\.jsonl: 3 of 200 rows are malformed, more than 1%; the first: .*:2:"):
        AnthropicHH(path, malformed="skip").load()


def test_an_unknown_policy_is_refused() -> None:
    for kind in (AnthropicHH, OASST1):
        with pytest.raises(UserError, match=r"data\.malformed: expected strict or skip, got 'ignore'"):
            kind("x", malformed="ignore")  # type: ignore[arg-type]
