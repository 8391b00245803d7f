"""A model sharded over two processes by FSDP2 says what a whole one does, also where one process has nothing more to say."""

import json
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from lightning_modules.policy import Policy, shard
from tests.processes import codes, run_on_ranks
from tests.tiltmeter.models.test_generation import make_prompts, spelling
from tests.tiny_models import make_model
from tiltmeter.models.generation import Decoding
from tiltmeter.scoring.behaviour import Completions, Prompt, complete

PROMPTS = [Prompt(f"p{i}", "", ids, "", f"p{i}") for i, ids in enumerate(make_prompts(2))]
DECODING = Decoding(max_new_tokens=12)


def said_by(policy: Policy, end: int, **share: int) -> Completions:
    """Completions where the token ``end`` ends a text."""
    tokenizer = spelling()
    tokenizer.eos_token = str(end)
    return policy.run(lambda model: complete(model, tokenizer, PROMPTS, DECODING, **share))


def one_of_two(rank: int, ends: list[int], folder: Path) -> None:
    distributed.init_process_group("gloo")
    policy = Policy(make_model("llama", torch.float64))
    shard(policy, init_device_mesh("cpu", (2,)))
    said = [said_by(policy, end, rank=rank, world_size=2) for end in ends]
    texts = [{key: [c.text, c.n_tokens] for key, (c,) in one.items()} for one in said]
    (folder / f"{rank}.json").write_text(json.dumps(texts), encoding="utf-8")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_model_says_what_a_whole_one_does_when_one_process_ends_early(tmp_path: Path) -> None:
    policy = Policy(make_model("llama", torch.float64))
    whole = said_by(policy, 5)
    ends = [int(whole[f"p{i}"][0].text.split()[0]) for i in (0, 1)]  # what each process's first prompt begins with
    done = run_on_ranks(one_of_two, ends, tmp_path)
    assert codes(done) == [0, 0], done
    shares = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    for i, end in enumerate(ends):
        expected = {key: [c.text, c.n_tokens] for key, (c,) in said_by(policy, end).items()}
        assert shares[0][i] | shares[1][i] == expected
        assert expected[f"p{i}"] == ["", 0]
        assert expected[f"p{1 - i}"][1] > 0, "the other process goes on"
