"""Watch hidden states in a training loop of your own: ``python examples/watch_any_loop.py [FOLDER]``.

Plain PyTorch, offline, a few seconds: a tiny random Llama learns by DPO to prefer the tokens of the upper half of its
vocabulary. The snapshots go to FOLDER (default: ``snapshots``).
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tiltmeter.models.layers import embedding_parameters, unembedding
from tiltmeter.pairs.batch import TokenizedPair, collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.pairs.preference_losses import PairLogProbs, make_preference_loss
from tiltmeter.states.observed_metrics import Metrics, observation_metrics
from tiltmeter.states.probe_set import PreferenceDirections, Probe
from tiltmeter.states.snapshots import BASE, SnapshotWriter, epoch_name
from tiltmeter.states.state_pair import StatePair

VOCAB, EPOCHS, STEPS_PER_EPOCH = 64, 3, 4


def train(
    model: PreTrainedModel, pairs: list[TokenizedPair], held_out: list[TokenizedPair], folder: Path
) -> list[Metrics]:
    """DPO, observed before the first step and after every epoch; returns what was seen."""
    probe = Probe.of_pairs(held_out, sites="all", positions=("prompt_last", "content", "diverge"))
    snapshots = SnapshotWriter(
        folder, dtype="float32", pair_ids={row: f"held-out/{row}" for row in range(len(held_out))}
    )
    head = unembedding(model)
    directions = PreferenceDirections(head, held_out)
    base = probe.read(model)
    snapshots.write(BASE, base)
    seen, steering = [], None

    batch = collate_pairs(pairs, pair_index=range(len(pairs)))
    with torch.no_grad():
        reference = sequence_log_probs(model, batch).chunk(2)
    loss_of = make_preference_loss("sigmoid", beta=0.1)
    for parameter in embedding_parameters(model):
        parameter.requires_grad_(False)  # the paper's setting, and what keeps `head` that of the base
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for epoch in range(EPOCHS):
        for _ in range(STEPS_PER_EPOCH):
            log_probs = sequence_log_probs(model, batch).chunk(2)
            loss = loss_of(PairLogProbs(*log_probs, *reference, *batch.target_counts.chunk(2))).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        states = StatePair(base, probe.read(model))
        seen.append(observation_metrics(states, directions, head=head, previous=steering))
        snapshots.write(epoch_name(epoch), states.policy)
        steering = states.steering_vectors()
    return seen


def make_model() -> PreTrainedModel:
    """Any causal language model of transformers would do; without dropout, as here, or in ``eval()`` while it is read."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.2, **sizes))


def make_pairs(n: int, seed: int) -> list[TokenizedPair]:
    """Token ids of prompt, chosen and rejected response: chosen ones are of the upper half of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        n_tokens = int(torch.randint(2, 9, (), generator=generator))
        return torch.randint(low, high, (n_tokens,), generator=generator).tolist()

    return [TokenizedPair(draw(0, VOCAB), draw(VOCAB // 2, VOCAB), draw(0, VOCAB // 2)) for _ in range(n)]


def main(folder: Path) -> tuple[PreTrainedModel, list[Metrics]]:
    """The trained model, and what was seen after each epoch."""
    model = make_model()
    return model, train(model, make_pairs(32, seed=1), make_pairs(24, seed=2), folder)


if __name__ == "__main__":
    for epoch, metrics in enumerate(main(Path((sys.argv[1:] or ["snapshots"])[0]))[1]):
        shown = ("shift_share/delta", "top1_energy/delta", "mean_cosine/leave_one_out", "projection/delta")
        figures = ", ".join(f"{name} {metrics[f'{name}/final_post_norm']:.3f}" for name in shown)
        print(f"epoch {epoch}, final_post_norm: {figures}")  # noqa: T201
