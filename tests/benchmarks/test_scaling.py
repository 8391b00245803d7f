"""The formulas of benchmarks/scaling.py against a small Llama that is really trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from benchmarks.scaling import ADAM_STATE, FLOAT32, Plan, Shape, memory, sent
from lightning_modules.ddp_strategy import InPlaceDDPStrategy
from lightning_modules.policy import Policy, freeze_embeddings
from tests.tiny_models import make_model, random_pairs
from tiltmeter.models.lora import add_lora
from tiltmeter.pairs.batch import collate_pairs

SMALL = Shape("small", width=32, inner=64, layers=2, vocab=64, kv_width=16)


def step(policy: Any) -> torch.optim.AdamW:
    """One optimizer step."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad])
    policy(collate_pairs(random_pairs(2), pair_index=range(2))).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_weights_gradients_and_optimizer_state_are_what_training_holds(lora_rank: int) -> None:
    model = make_model("llama")
    assert sum(p.numel() for p in model.parameters()) == SMALL.total
    if lora_rank:
        add_lora(model, LoraConfig(r=lora_rank))
    else:
        freeze_embeddings(model)
    policy = Policy(model)
    optimizer = step(policy)
    plan = Plan("ddp", 1, lora_rank)
    parts = memory(SMALL, plan, tokens=1)
    gradients = sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None)
    state = sum(x.nbytes for s in optimizer.state.values() for k, x in s.items() if k != "step")
    assert parts["gradients"] == gradients == FLOAT32 * plan.trained(SMALL)
    assert parts["AdamW"] == state == ADAM_STATE * plan.trained(SMALL)
    if not lora_rank:
        assert parts["weights"] == sum(p.nbytes for p in policy.parameters())


def test_ddp_sends_the_gradients_once_from_where_they_lie(tmp_path: Path) -> None:
    model = make_model("llama")
    freeze_embeddings(model)
    seen: dict[int, int] = {}

    def hook(_: object, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        seen[bucket.buffer().untyped_storage().data_ptr()] = bucket.buffer().nbytes
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        policy = DistributedDataParallel(Policy(model), **InPlaceDDPStrategy()._ddp_kwargs)
        policy.register_comm_hook(None, hook)
        step(policy)
        lie = {p.grad.untyped_storage().data_ptr() for p in policy.parameters() if p.grad is not None}
    finally:
        distributed.destroy_process_group()
    n_bytes = sum(seen.values())
    assert lie == seen.keys(), "no second copy"
    assert n_bytes == FLOAT32 * Plan("ddp", 1).trained(SMALL)
    assert sent(SMALL, Plan("ddp", 2), micro_batches=3) == n_bytes, "a ring of two sends each half twice"


def test_shards_are_parts_of_the_whole_and_alone_nothing_is_sent() -> None:
    one, four = (memory(SMALL, Plan("fsdp", n), tokens=1) for n in (1, 4))
    for name in ("weights", "gradients", "AdamW"):
        assert four[name] == one[name] / 4
    assert sent(SMALL, Plan("fsdp", 1), micro_batches=2) == sent(SMALL, Plan("ddp", 1), micro_batches=2) == 0
