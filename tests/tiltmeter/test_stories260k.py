"""A real pretrained model gives the numbers that an independent implementation computed from the same weights."""

import gzip
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests import stories260k
from tiltmeter.models.causal_lm import CausalLM
from tiltmeter.pairs.batch import TokenizedPair, collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs


class Stories(NamedTuple):
    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reference: dict[str, Any]
    texts: dict[int, str]

    def ids(self, story: dict[str, Any]) -> list[int]:
        text = re.sub(r"\n\s*\n+", "\n", self.texts[story["story_id"]])
        return self.tokenizer(text, verbose=False)["input_ids"][: self.reference["max_ids"]]


@pytest.fixture(scope="module")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Stories:
    source = shared_data / "models" / "stories260K"
    folder = stories260k.convert(source, tmp_path_factory.mktemp("stories260K"))
    spec = CausalLM(name_or_path=str(folder))
    tokenizer = spec.load_tokenizer()
    with gzip.open(shared_data / "text" / "tinystories_sample.jsonl.gz", "rt") as file:
        texts = {row["id"]: row["text"] for row in map(json.loads, file)}
    reference = json.loads((source / "reference.json").read_text())
    return Stories(folder, spec.build(tokenizer), tokenizer, reference, texts)


def test_ids_of_twenty_stories_are_those_of_the_reference(stories: Stories) -> None:
    assert len(stories.reference["stories"]) == 20
    for story in stories.reference["stories"]:
        ids = stories.ids(story)
        assert len(ids) == story["n_ids"]
        assert ids[: len(story["ids_head"])] == story["ids_head"]


def test_decoding_gives_the_story_back(stories: Stories) -> None:
    for text in ["Once upon a time", 'Tom said: "Hi!"\n\nHuman: 5 €, ça va? 日本', " two leading spaces and a tab\t."]:
        ids = stories.tokenizer(text)["input_ids"]
        assert stories.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_losses_of_twenty_stories_are_those_of_the_reference(stories: Stories) -> None:
    sums = []
    for story in stories.reference["stories"]:
        ids = torch.tensor(stories.ids(story))
        with torch.no_grad():
            logits = stories.model(input_ids=ids[None]).logits[0]
        sums.append(F.cross_entropy(logits[:-1], ids[1:], reduction="sum").item())
        assert sums[-1] == pytest.approx(story["sum_nll"], abs=2e-3)
    predicted = sum(story["n_ids"] - 1 for story in stories.reference["stories"])
    assert sum(sums) / predicted == pytest.approx(stories.reference["mean_over_tokens"], abs=1e-5)


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
def test_sequence_log_probs_are_minus_those_losses(stories: Stories, layout: Any) -> None:
    chosen = stories.reference["stories"][:3]
    pairs = [TokenizedPair(ids[:1], ids[1:], ids[1:4]) for ids in map(stories.ids, chosen)]
    batch = collate_pairs(pairs, pair_index=range(3), layout=layout)
    with torch.no_grad():
        logps = sequence_log_probs(stories.model, batch, chunk_tokens=100)
    expected = torch.tensor([-story["sum_nll"] for story in chosen])
    assert_close(logps[:3], expected, rtol=0, atol=2e-3)


def test_sixty_four_greedy_tokens_are_those_of_the_reference(stories: Stories) -> None:
    ids = [stories260k.BOS]
    expected = stories.reference["greedy_from_bos_64"]
    with torch.no_grad():
        for _ in range(64):
            ids.append(int(stories.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids == expected


def test_first_logits_after_bos_are_those_of_the_reference(stories: Stories) -> None:
    with torch.no_grad():
        logits = stories.model(input_ids=torch.tensor([[stories260k.BOS]])).logits[0, 0, :16]
    assert_close(logits, torch.tensor(stories.reference["first_logits_head"]), rtol=0, atol=5e-5)


def test_the_tokenizer_without_padding_pads_with_eos(stories: Stories) -> None:
    assert stories.tokenizer.pad_token_id == stories.tokenizer.eos_token_id == stories260k.EOS
    assert (stories.folder / "model.safetensors").is_file()
    assert stories.model.num_parameters() == stories.reference["config"]["n"]
