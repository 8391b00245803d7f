import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.prompts import Prompt, PromptFile
from tiltmeter.errors import UserError


def write(path: Path, *rows: Any) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def test_rows_of_real_toxicity_prompts_bring_their_toxicity_where_it_is_known(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rtp.jsonl.gz",
        {"filename": "f.txt", "challenging": True, "prompt": {"text": "So if you ", "toxicity": 0.25, "insult": 0.5}},
        {"prompt": {"text": "And", "toxicity": None}, "continuation": {"text": " then"}},
    )
    first = {"filename": "f.txt", "challenging": True, "prompt_toxicity": 0.25}
    assert PromptFile(str(path)).load() == [Prompt("rtp/00000", "So if you ", first), Prompt("rtp/00001", "And", {})]


def test_plain_rows_of_several_files_have_ids_by_file_and_row(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {"prompt": "three"})
    write(tmp_path / "a.jsonl", {"prompt": "one", "topic": "x", "more": [1]}, {"prompt": "two"})
    prompts = PromptFile(str(tmp_path)).load()
    assert [(p.pair_id, p.text) for p in prompts] == [("a/00000", "one"), ("a/00001", "two"), ("b/00000", "three")]
    assert prompts[0].attributes == {"topic": "x"}
    path = write(tmp_path / "c.jsonl", {"prompt": "x", "prompt_toxicity": 1})
    assert PromptFile(str(path)).load()[0].attributes == {"prompt_toxicity": 1.0}


def test_tables_texts_and_messages_are_read_too(tmp_path: Path) -> None:
    csv = tmp_path / "some.csv"
    csv.write_text('id,prompt,prompt_toxicity\n7,"Hi, you",0.25\n8,"two\nlines",\n', encoding="utf-8")
    first, second = PromptFile(str(csv)).load()
    assert first == Prompt("some/00000", "Hi, you", {"id": "7", "prompt_toxicity": 0.25})
    assert (second.text, "prompt_toxicity" in second.attributes) == ("two\nlines", False)
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    shared = {"from": "human", "value": "Hi"}
    rows = ({"text": "Once"}, {"messages": turns}, {"prompt": turns[1:]}, {"conversations": [shared]})
    texts = [prompt.text for prompt in PromptFile(str(write(tmp_path / "m.jsonl", *rows))).load()]
    asked = "\n\nHuman: Hi\n\nAssistant:"
    assert texts == ["Once", f"\n\nSystem: Be kind.{asked}", asked, asked]


def test_max_prompts_keeps_the_first_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"prompt": str(i)} for i in range(5)))
    assert [p.text for p in PromptFile(str(path), max_prompts=2).load()] == ["0", "1"]
    assert len(PromptFile(str(path), max_prompts=9).load()) == 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r'a\.jsonl:2: expected {"prompt": TEXT}, .*, got None'),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            r"a\.jsonl:2: expected messages that end with a user's",
        ),
        ({"messages": ["x"]}, r"a\.jsonl:2: messages can't be read: no role and content"),
        ({"prompt": " "}, r"a\.jsonl:2: expected .*got ' '"),
        ({"prompt": {"toxicity": 0.1}}, r"a\.jsonl:2: expected"),
        ({"prompt": {"text": "x", "toxicity": 1.5}}, r"a\.jsonl:2: prompt\.toxicity: expected a number from 0 to 1"),
        ({"prompt": {"text": "x", "toxicity": True}}, r"prompt\.toxicity"),
        ({"prompt": "x", "prompt_toxicity": "high"}, r"prompt\.toxicity: .* got 'high'"),
    ],
)
def test_malformed_prompt_row_is_refused_by_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(UserError, match=message):
        PromptFile(str(path)).load()


def test_missing_prompt_file_and_wrong_max_prompts_are_refused() -> None:
    with pytest.raises(UserError, match=r"^prompts\.path: no such file"):
        PromptFile("no/such.jsonl").load()
    with pytest.raises(UserError, match=r"prompts\.max_prompts: expected a whole number above 0"):
        PromptFile("x", max_prompts=0)


def test_the_real_prompts_are_all_read(shared_data: Path) -> None:
    prompts = PromptFile(str(shared_data / "real-toxicity-prompts" / "rtp_quark_val5000.jsonl.gz")).load()
    known = [float(p.attributes["prompt_toxicity"]) for p in prompts if "prompt_toxicity" in p.attributes]
    assert len(prompts) == len({p.pair_id for p in prompts}) == 5000
    assert len(known) == 5000 - 19
    assert sum(toxicity >= 0.5 for toxicity in known) == 1249
    assert sum(bool(p.attributes["challenging"]) for p in prompts) == 49
