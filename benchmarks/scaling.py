"""What does a GPU hold and send for models of 7, 13 and 70 billion parameters? Arithmetic: nothing is run.

    python benchmarks/scaling.py [--gpus 8] [--lora-rank 16] [--tokens 8192] [--micro-batches 4] [--probe-pairs 200]

Training as this project does it: float32 weights and AdamW with trainer.precision=bf16-mixed, embeddings and unembedding frozen;
LoRA on bfloat16 weights; activation checkpointing. tests/benchmarks/test_scaling.py and
tests/lightning_modules/test_sharded_loading.py hold the formulas to small models that are really trained.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file can be run from anywhere
from benchmarks import common

FLOAT32, BFLOAT16, FLOAT64 = 4, 2, 8
ADAM_STATE = 2 * FLOAT32
LOGITS = 128 * 2**20
"""Bytes of a chunk of float32 logits at most (tiltmeter.pairs.log_probs.default_chunk_tokens)."""


class Shape(NamedTuple):
    """A Llama: gated MLP, two norms a block, no biases, untied unembedding."""

    name: str
    width: int
    inner: int
    layers: int
    vocab: int
    kv_width: int
    """Columns of the key (and of the value) projection."""

    @property
    def maps(self) -> list[tuple[int, int]]:
        """(in, out) of each linear map of a block."""
        d, k, m = self.width, self.kv_width, self.inner
        return [(d, d), (d, k), (d, k), (d, d), (d, m), (d, m), (m, d)]

    @property
    def block(self) -> int:
        """Parameters of a block."""
        return sum(a * b for a, b in self.maps) + 2 * self.width

    @property
    def embeddings(self) -> int:
        """Parameters of token embedding and unembedding: frozen."""
        return 2 * self.vocab * self.width

    @property
    def root(self) -> int:
        """Parameters outside the blocks."""
        return self.embeddings + self.width

    @property
    def total(self) -> int:
        """All parameters."""
        return self.layers * self.block + self.root

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters on every linear map of a block."""
        return sum(rank * (a + b) for a, b in self.maps)


LLAMA_7B = Shape("7B", 4096, 11008, 32, 32000, 4096)
LLAMA_13B = Shape("13B", 5120, 13824, 40, 32000, 5120)
LLAMA_70B = Shape("70B", 8192, 28672, 80, 32000, 1024)


class Plan(NamedTuple):
    """How a model is trained."""

    strategy: str
    """ddp or fsdp."""
    gpus: int
    lora_rank: int = 0
    """0: all weights but the embeddings."""

    @property
    def shards(self) -> int:
        """Parts that weights are cut into."""
        return self.gpus if self.strategy == "fsdp" else 1

    def weight_bytes(self) -> int:
        """Of a parameter of the model itself, as stored."""
        return BFLOAT16 if self.lora_rank else FLOAT32

    def trained(self, shape: Shape) -> int:
        """Parameters that have a gradient."""
        return shape.layers * shape.adapters(self.lora_rank) if self.lora_rank else shape.total - shape.embeddings


def memory(shape: Shape, plan: Plan, *, tokens: int) -> dict[str, float]:
    """Part → bytes on one GPU at the end of a backward pass.

    Left out: what one block needs while its forward is done again, and what the allocator, NCCL and CUDA keep for themselves.

    Args:
        tokens: of a micro-batch.
    """
    trained = plan.trained(shape)
    adapters = shape.adapters(plan.lora_rank)
    parts = {
        "weights": (shape.total * plan.weight_bytes() + bool(plan.lora_rank) * trained * FLOAT32) / plan.shards,
        "gradients": trained * FLOAT32 / plan.shards,
        "AdamW": trained * ADAM_STATE / plan.shards,
    }
    block_gathered = BFLOAT16 * (shape.block + adapters)
    if plan.strategy == "fsdp":  # the block at work and the next one; gradients of one, and what is sent of them
        block_gradients = (BFLOAT16 + FLOAT32) * (adapters or shape.block)
        parts["gathered"] = shape.root * plan.weight_bytes() + 2 * block_gathered + block_gradients
    else:  # gradients lie in the buckets that DDP sends
        parts["autocast's copies"] = BFLOAT16 * trained
    parts["block inputs"] = shape.layers * tokens * shape.width * FLOAT32
    parts["logits"] = LOGITS
    parts["probe's unembedding"] = shape.vocab * shape.width * (plan.weight_bytes() if plan.strategy == "fsdp" else 0)
    return parts


def sent(shape: Shape, plan: Plan, *, micro_batches: int) -> float:
    """Bytes that one GPU sends in an optimizer step, by ring algorithms.

    DDP all-reduces gradients once. FSDP2 gathers every block for the forward and again for the backward of each micro-batch,
    the root once, and reduce-scatters its gradients in float32 (in the weights' own type for what isn't a block).
    """
    hop = (plan.gpus - 1) / plan.gpus
    if plan.strategy == "ddp":
        return 2 * hop * plan.trained(shape) * FLOAT32
    gathered = shape.root * plan.weight_bytes()
    gathered += 2 * shape.layers * BFLOAT16 * (shape.block + shape.adapters(plan.lora_rank))
    return hop * micro_batches * (gathered + plan.trained(shape) * FLOAT32)


def watching(shape: Shape, *, probe_pairs: int, positions: int = 1) -> dict[str, float]:
    """Part → bytes for hidden states at every site; in host memory, but for the file.

    Args:
        probe_pairs: N, prompts of the probe.
        positions: read at each prompt.
    """
    rows = (shape.layers + 1) * positions * probe_pairs * shape.width * FLOAT32
    return {
        "base and latest rows": 2 * rows,
        "a site at work": 3 * probe_pairs * shape.width * FLOAT32 + min(probe_pairs, shape.width) ** 2 * FLOAT64,
        "snapshot file an epoch": rows,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--gpus", type=common.positive, default=8, help="in all")
    parser.add_argument("--lora-rank", type=common.positive, default=16)
    parser.add_argument("--tokens", type=common.positive, default=8192, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=common.positive, default=4, help="of an optimizer step, on each GPU")
    parser.add_argument("--probe-pairs", type=common.positive, default=200)
    parser.add_argument("--quick", action="store_true", help="changes nothing: this takes no time")
    return parser.parse_args(arguments)


def gigabytes(n_bytes: float) -> str:
    """Bytes in 10⁹, three digits."""
    return common.three_digits(n_bytes / 1e9)


def main() -> None:
    options = parse()
    shapes = (LLAMA_7B, LLAMA_13B, LLAMA_70B)
    plans = [Plan(s, options.gpus, rank) for rank in (0, options.lora_rank) for s in ("ddp", "fsdp")]
    rows, totals = [], {}
    for shape in shapes:
        for plan in plans:
            parts = memory(shape, plan, tokens=options.tokens)
            moved = sent(shape, plan, micro_batches=options.micro_batches)
            kind = f"LoRA {plan.lora_rank}" if plan.lora_rank else "full"
            states = [parts[name] for name in ("weights", "gradients", "AdamW")]
            copies = sum(parts.get(name, 0) for name in ("gathered", "autocast's copies"))
            rest = sum(parts.values()) - sum(states) - copies
            cells = [*states, copies, rest, sum(parts.values()), moved]
            rows.append([f"{shape.name} {kind}, {plan.strategy.upper()}", *map(gigabytes, cells)])
            totals[f"gb_{shape.name.lower()}_{kind.split()[0].lower()}_{plan.strategy}"] = sum(parts.values()) / 1e9
    head = ["", "weights", "gradients", "AdamW", "copies, buffers", "activations, probe's head", "sum", "sent a step"]
    title = (
        f"GB on each of {options.gpus} GPUs, {options.tokens:,} tokens a micro-batch, {options.micro_batches} a step"
    )
    common.print_table(title, head, rows)
    held = {shape.name: watching(shape, probe_pairs=options.probe_pairs) for shape in shapes}
    names = list(held[shapes[0].name])
    table = [[name, *(gigabytes(held[shape.name][name]) for shape in shapes)] for name in names]
    common.print_table(
        f"GB for watching {options.probe_pairs} prompts at every site", ["", *(shape.name for shape in shapes)], table
    )
    common.print_result(**totals)


if __name__ == "__main__":
    main()
