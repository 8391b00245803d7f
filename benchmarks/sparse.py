"""How long does a training step of sparse steering (FSRL) take beside DPO's, and how fast does a published autoencoder encode?

    python benchmarks/sparse.py [--quick] [--steps 20]

One process, the same random Llama and the same pairs for all: full DPO, LoRA, one trained vector, and a steering of features (TopK
and JumpReLU, eight a dimension, behind the middle block) with its penalty. They take turns; medians are compared. Then
an autoencoder of Gemma Scope 2's shape, 16,384 features of width 640, encodes 10,000 rows.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file can be run from anywhere
from benchmarks import common  # before torch, which reads its threads' settings as it is imported

# isort: split
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.workload import SHAPES, build_model
from tiltmeter.models.cpu_linear import fast_linear
from tiltmeter.models.layers import layer_site
from tiltmeter.models.lora import add_lora
from tiltmeter.models.trained_vector import VectorOptions, insert_vector
from tiltmeter.pairs.batch import PreferenceBatch, TokenizedPair, collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.pairs.preference_losses import PairLogProbs, sigmoid_loss
from tiltmeter.sparse.autoencoder import JumpReLU, SaeId, SparseAutoencoder, TopK
from tiltmeter.sparse.steering import SparseOptions, SparsityPenalty, insert_steering, response_tokens, sparse_steering

_VOCAB = 4096
_FEATURES_EACH = 8
"""Features a dimension of the states."""


class Side(NamedTuple):
    """A model that is trained in one way."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    penalty: SparsityPenalty | None


def random_sae(kind: type[SparseAutoencoder], d_model: int, width: int, site: str) -> SparseAutoencoder:
    """An autoencoder with random weights, some thirty features active at a token."""
    options = {"k": 32} if kind is TopK else {}
    sae = kind(SaeId(site), d_model, width, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (sae.encoder_weight, sae.decoder_weight):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / d_model**0.5)
        if isinstance(sae, JumpReLU):
            sae.threshold.fill_(2.5)
    return sae


def make_side(name: str) -> Side:
    """The model, what is trained of it, and its optimizer."""
    model = build_model(SHAPES["tiny"], _VOCAB, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, "cpu")
    site, width = layer_site(model.config.num_hidden_layers // 2), model.config.hidden_size
    penalty = None
    if name == "lora":
        add_lora(model, LoraConfig(r=16, target_modules="all-linear"))
    elif name == "vector":
        insert_vector(model, VectorOptions(site))
    elif name.startswith("fsrl"):
        kind = TopK if name == "fsrl, TopK" else JumpReLU
        insert_steering(model, random_sae(kind, width, _FEATURES_EACH * width, site), SparseOptions("none"))
        penalty = SparsityPenalty(0.1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Side(model, torch.optim.AdamW(trained, lr=1e-5), penalty)


def make_batches(n: int, *, pairs: int, tokens: int = 96) -> list[PreferenceBatch]:
    """Micro-batches of random pairs, a step each: prompts and responses of equal lengths, so that no side has padding."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        drawn: list[int] = torch.randint(3, _VOCAB, (length,), generator=generator).tolist()
        return drawn

    made = [
        [TokenizedPair(ids(tokens // 2), ids(tokens // 2), ids(tokens // 2)) for _ in range(pairs)] for _ in range(n)
    ]
    return [collate_pairs(of, pair_index=range(pairs), layout="concatenated") for of in made]


def take_step(side: Side, batch: PreferenceBatch) -> Tensor:
    """One optimizer step of DPO's loss, and of the penalty where features are steered."""
    side.optimizer.zero_grad(set_to_none=True)
    with fast_linear(side.model):
        said = sequence_log_probs(side.model, batch)
        chosen, rejected = said.view(2, -1)
        reference = torch.zeros_like(chosen)
        loss = sigmoid_loss(PairLogProbs(chosen, rejected, reference, reference)).mean()
        steering = sparse_steering(side.model)
        if side.penalty is not None and steering is not None:
            side.penalty.begin(int(response_tokens(batch).sum()))
            loss = loss + side.penalty.of(steering, batch)
        loss.backward()  # type: ignore[no-untyped-call]
    side.optimizer.step()
    return loss.detach()


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Print the table and the figures that RESULTS.md keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps of two pairs, a smaller autoencoder")
    parser.add_argument("--steps", type=int, default=20, help="of each side")
    options = parser.parse_args()
    steps = 2 if options.quick else options.steps
    names = ("dpo", "lora", "vector", "fsrl, TopK", "fsrl, JumpReLU")
    sides = {name: make_side(name) for name in names}
    n_pairs = 2 if options.quick else 16
    batches = make_batches(steps + 1, pairs=n_pairs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i, batch in enumerate(batches):
        for name, side in sides.items():
            took = seconds_of(lambda side=side, batch=batch: take_step(side, batch))  # type: ignore[misc]
            if i:  # the first warms up
                seconds[name].append(took)
    print(f"{common.machine(torch.get_num_threads())}\nA step of {n_pairs} pairs, 96 tokens a row, median of {steps}:")
    of_dpo = median(seconds["dpo"])
    for name, times in seconds.items():
        n_trained = sum(p.numel() for p in sides[name].model.parameters() if p.requires_grad)
        print(
            f"  {name:16} {median(times):7.3f} s   {median(times) / of_dpo:5.2f} × dpo   {n_trained:>10,} numbers trained"
        )
    d_model, width = (64, 512) if options.quick else (640, 16_384)
    sae, rows = random_sae(JumpReLU, d_model, width, "layer_00"), torch.randn(10_000, d_model)
    with torch.no_grad():
        encoding = seconds_of(lambda: sae.encode(rows))
    print(f"{width:,} features of width {d_model}: 10,000 rows encoded in {encoding:.2f} s")
    common.print_result(
        fsrl_step_ratio=median(seconds["fsrl, JumpReLU"]) / of_dpo,
        fsrl_topk_step_ratio=median(seconds["fsrl, TopK"]) / of_dpo,
        sae_encode_seconds=encoding,
    )


if __name__ == "__main__":
    main()
