"""Two processes that read a model's weights sharded: none ever holds the whole, and together they have it bit for bit."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from benchmarks.scaling import Plan, Shape, sent
from lightning_modules.policy import Policy, freeze_embeddings, shard
from tests.processes import codes, run_on_ranks
from tests.tiny_models import make_model, make_tokenizer, random_pairs
from tiltmeter.models.causal_lm import CausalLM
from tiltmeter.models.lora import add_lora, check_adapters, insert_adapters, plain_state
from tiltmeter.pairs.batch import PreferenceBatch, collate_pairs
from tiltmeter.pairs.reference_cache import hash_weights
from tiltmeter.pairs.verification import settle_packing

pytestmark = pytest.mark.slow
LARGE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 24, "vocab_size": 300}
T = TypeVar("T")


def batch() -> PreferenceBatch:
    return collate_pairs(random_pairs(4), pair_index=range(4))


def autocast() -> AbstractContextManager[None]:
    return torch.autocast("cpu", torch.bfloat16)


def most_held(work: Callable[[], T]) -> tuple[T, int]:
    """A function's result, and the most bytes of tensors that it held at a time, files that it mapped included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return result, max(accumulate(n for _, n in changes))


def sharded(folder: Path, *, lora: bool = False, block_dtype: torch.dtype | None = None) -> Policy:
    """As configure_model builds it."""
    empty = CausalLM(str(folder)).build_empty(make_tokenizer())
    assert empty is not None
    if lora:
        torch.manual_seed(5)
        insert_adapters(empty.model, LoraConfig(r=2))
    freeze_embeddings(empty.model)
    policy = Policy(empty.model)
    shard(policy, init_device_mesh("cpu", (2,)), block_dtype=block_dtype)
    empty.read_weights(torch.device("cpu"))
    return policy


def sent_by(work: Callable[[], T]) -> tuple[T, int]:
    """A function's result, and the bytes that FSDP2 let this process send in a ring of two."""
    names = ("all_gather_single", "reduce_scatter_single")
    counts: list[int] = []

    def counting(collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(output: Tensor, input: Tensor, *rest: Any, **options: Any) -> Any:
            counts.append(min(output.nbytes, input.nbytes))
            return collective(output, input, *rest, **options)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(distributed, name, counting(getattr(distributed, name)))
        return work(), sum(counts)


def results(policy: Policy, cast: AbstractContextManager[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of a batch and the gradients of their sum."""
    with cast:
        logps = policy(batch())
    logps.sum().backward()
    named = policy.named_parameters()
    whole = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in named if p.grad is not None}
    return logps.detach(), whole


def after_a_broken_forward(model: PreTrainedModel) -> Tensor:
    """What a check that fails inside the model leaves behind must not change what comes next."""

    class Broken(Exception): ...

    def breaks(*_: Any) -> None:
        raise Broken

    hook = model.model.layers[1].mlp.register_forward_pre_hook(breaks)
    with pytest.raises(Broken), torch.no_grad():
        Policy(model)(batch())
    hook.remove()
    with torch.no_grad():
        return Policy(model)(batch())


def one_of_two(rank: int, large: Path, small: Path, folder: Path) -> None:
    distributed.init_process_group("gloo")
    policy, peak = most_held(lambda: sharded(large))
    n_bytes = sum(4 * parameter.numel() for parameter in policy.parameters())
    packs, peak_of_check = most_held(
        lambda: policy.run(lambda model: settle_packing(model, "shared_prefix", None, max_length=60))
    )
    _, peak_whole = most_held(lambda: CausalLM(str(large)).build(make_tokenizer()))
    said: dict[str, Any] = {"packs": packs, "peaks": [p / n_bytes for p in (peak, peak_of_check, peak_whole)]}
    policy.reshard()
    said["share"] = sum(p.to_local().nbytes for p in policy.parameters() if isinstance(p, DTensor)) / n_bytes
    said["hash"] = hash_weights(plain_state(policy.model), is_first=rank == 0)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    said["consolidated"] = sorted(get_model_state_dict(policy.model, options=options))
    torch.save(results(policy, nullcontext()), folder / f"plain_{rank}.pt")
    mixed = sharded(small, block_dtype=torch.bfloat16)
    found, said["sent"] = sent_by(lambda: results(mixed, autocast()))
    torch.save(found, folder / f"mixed_{rank}.pt")
    torch.save(sharded(small).run(after_a_broken_forward), folder / f"broken_{rank}.pt")
    adapted = sharded(small, lora=True)
    adapted.run(check_adapters)
    said["adapted_hash"] = hash_weights(plain_state(adapted.model), is_first=rank == 0)
    torch.save(results(adapted, nullcontext()), folder / f"lora_{rank}.pt")
    (folder / f"{rank}.json").write_text(json.dumps(said), encoding="utf-8")
    distributed.destroy_process_group()


def stored(folder: Path, **changes: Any) -> PreTrainedModel:
    model = make_model("llama", **({"vocab_size": 300} | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                "norm" in name
            ):  # the only weights that autocast leaves in float32, and blocks gathered in bfloat16 don't
                parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder, max_shard_size="4MB")  # a file that is being read counts whole
    return model


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel, PreTrainedModel]:
    """The folder of what two processes said, and both models whole."""
    root = tmp_path_factory.mktemp("sharded")
    large, small = stored(root / "large", **LARGE), stored(root / "small")
    done = run_on_ranks(one_of_two, root / "large", root / "small", root)
    assert codes(done) == [0, 0], done
    return root, large, small


def test_no_process_ever_holds_the_whole_model_and_together_they_do(both: Any) -> None:
    root, large, small = both
    first, second = (json.loads((root / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert first["hash"] == hash_weights(large.state_dict())
    assert first["adapted_hash"] == hash_weights(small.state_dict()), "adapters are no part of it"
    assert second["hash"] == second["adapted_hash"] == ""
    for said in (first, second):
        loading, checking, whole = said["peaks"]
        assert loading < 0.7, "its half, and one file that is being read"
        assert checking < 0.3, "a few blocks at a time"
        assert whole >= 0.99
    assert first["share"] == pytest.approx(0.5, abs=0.01)
    assert first["share"] + second["share"] == 1
    assert first["packs"] is second["packs"] is True, "checked on the sharded model"
    assert first["consolidated"] == sorted(large.state_dict())
    assert second["consolidated"] == [], "the first process alone puts it together"


@pytest.mark.parametrize("name", ["plain", "mixed", "lora"])
def test_a_model_read_sharded_computes_what_a_whole_one_does(name: str, both: Any) -> None:
    root, large, _ = both
    model = large if name == "plain" else CausalLM(str(root / "small")).build(make_tokenizer())
    if name == "lora":
        torch.manual_seed(5)
        add_lora(model, LoraConfig(r=2))
    freeze_embeddings(model)
    logps, gradients = results(Policy(model), autocast() if name == "mixed" else nullcontext())
    for rank in (0, 1):
        ours, grads = torch.load(root / f"{name}_{rank}.pt", weights_only=True)
        assert torch.equal(ours, logps)
        assert grads.keys() == gradients.keys()
        for key in grads:
            rounding = 2**-8 if name == "mixed" and "norm" in key else 0  # autocast leaves only these in float32
            torch.testing.assert_close(grads[key], gradients[key], rtol=rounding, atol=0, msg=key)


def test_what_a_step_sends_is_what_the_arithmetic_says(both: Any) -> None:
    root, _, small = both
    config = small.config
    shape = Shape("", config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size, 16)
    assert shape.total == sum(parameter.numel() for parameter in small.parameters())
    for rank in (0, 1):
        said = json.loads((root / f"{rank}.json").read_text(encoding="utf-8"))
        assert said["sent"] == sent(shape, Plan("fsdp", 2), micro_batches=1)


def test_a_check_that_fails_inside_a_sharded_model_changes_nothing(both: Any) -> None:
    root, _, _ = both
    expected = Policy(CausalLM(str(root / "small")).build(make_tokenizer()))
    for rank in (0, 1):
        with torch.no_grad():
            assert torch.equal(expected(batch()), torch.load(root / f"broken_{rank}.pt", weights_only=True))
