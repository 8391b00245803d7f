import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis.open.probe_pairs import PROMPTS_FILE, read_probe_pairs
from analysis.open.runs import open_run
from analysis.report.samples import compare_samples
from datamodules.tokenization import SegmentEncoder
from tests.tiny_models import make_model, make_tokenizer
from tiltmeter.errors import UserError
from tiltmeter.pairs.batch import TokenizedPair

TOKENIZER = make_tokenizer()


def entry(i: int, text: str) -> dict[str, Any]:
    prompt = f"\n\nHuman: {text}\n\nAssistant:"
    ids = [[TOKENIZER.bos_token_id, *SegmentEncoder(TOKENIZER).encode(prompt)[-200:]], [5], [6]]
    texts = {
        "pair_id": f"p/{i}",
        "source": "made up",
        "group": text,
        "prompt": prompt,
        "chosen": " yes",
        "rejected": " no",
    }
    return texts | dict(zip(TokenizedPair._fields, ids, strict=True)) | {"attributes": {"situation": "why"}}


TEXTS = ["tea", "kind rain on a blue map", "seven</s>", "tea " * 300, "never asked"]
PROMPTS = [entry(i, text) for i, text in enumerate(TEXTS)]
WRONG = ({"attributes": {"a": [1]}}, {"prompt_ids": []}, {"chosen_ids": [1.5]}, {"rejected_ids": [-1]})


def save_model(folder: Path, *, seed: int) -> None:
    tokenizer = make_tokenizer()
    make_model("llama", seed=seed, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_base_and_aligned_are_asked_the_first_four_prompts(make_run: Callable[..., Path]) -> None:
    folder = make_run(prompts=PROMPTS)
    save_model(folder / "base", seed=0)
    save_model(folder / "aligned", seed=1)
    samples = compare_samples(open_run(folder))
    assert [sample.prompt.pair_id for sample in samples.rows] == ["p/0", "p/1", "p/2", "p/3"]
    assert any(span.differs for sample in samples.rows for span in sample.base.spans)


def test_equal_models_have_nothing_marked(make_run: Callable[..., Path]) -> None:
    folder = make_run(prompts=PROMPTS[:2])
    for name in ("base", "aligned"):
        save_model(folder / name, seed=0)
    samples = compare_samples(open_run(folder))
    assert not any(span.differs for sample in samples.rows for span in (*sample.base.spans, *sample.aligned.spans))


def test_without_prompts_or_models_a_sentence_says_why(make_run: Callable[..., Path]) -> None:
    assert PROMPTS_FILE in compare_samples(open_run(make_run("a"))).note
    assert "someone/model" in compare_samples(open_run(make_run("b", prompts=PROMPTS))).note


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", '[{"pair_id": "x"}]', '{"a": 1}', "[" * 5000, *(json.dumps([PROMPTS[0] | w]) for w in WRONG)],
)
def test_a_damaged_prompts_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / PROMPTS_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"probe_prompts\.json: expected a list of objects with pair_id"):
        read_probe_pairs(tmp_path / PROMPTS_FILE)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / PROMPTS_FILE
    path.write_text(json.dumps(PROMPTS), encoding="utf-8")
    pairs = read_probe_pairs(path)
    assert [pair.as_json() for pair in pairs] == PROMPTS
    assert len(read_probe_pairs(path, n_pairs=2)) == 2


def test_token_ids_that_the_model_lacks_are_named(make_run: Callable[..., Path]) -> None:
    folder = make_run(prompts=[PROMPTS[0] | {"prompt_ids": [1, 99_999]}])
    for name in ("base", "aligned"):
        save_model(folder / name, seed=0)
    with pytest.raises(UserError, match=r"probe_prompts\.json: token id 99999"):
        compare_samples(open_run(folder))


def test_half_a_surrogate_pair_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / PROMPTS_FILE).write_text(json.dumps([PROMPTS[0] | {"prompt": "\ud800"}]), encoding="utf-8")
    assert read_probe_pairs(tmp_path / PROMPTS_FILE)[0].prompt == "?"


def test_a_damaged_model_is_named(make_run: Callable[..., Path]) -> None:
    folder = make_run(prompts=PROMPTS[:1])
    for name in ("base", "aligned"):
        save_model(folder / name, seed=0)
    weights = load_file(folder / "base" / "model.safetensors")
    save_file({name: value[:1] for name, value in weights.items()}, folder / "base" / "model.safetensors")
    with pytest.raises(UserError, match=r"base: cannot load this model"):
        compare_samples(open_run(folder))


def test_pickled_weights_are_not_loaded(make_run: Callable[..., Path]) -> None:
    folder = make_run(prompts=PROMPTS[:1])
    for name in ("base", "aligned"):
        save_model(folder / name, seed=0)
    weights = load_file(folder / "aligned" / "model.safetensors")
    (folder / "aligned" / "model.safetensors").unlink()
    torch.save(weights, folder / "aligned" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"aligned: cannot load this model"):
        compare_samples(open_run(folder))
