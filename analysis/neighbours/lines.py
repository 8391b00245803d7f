"""Next-token distributions of many methods on the same tokens: one pass of each model, then arithmetic on logits.

A method at a strength is a line: z₀ + w (z − z₀) with the logits z of another model or of the base behind another prompt; the
base's states behind the final norm moved by λ v*; or its logits moved by λ b.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.open.models import LoadedModel
from analysis.open.pair_log_probs import batches_by_length, longer_row
from tiltmeter.models.cpu_linear import fast_linear, linear
from tiltmeter.models.guidance import guided
from tiltmeter.models.layers import Unembedding, unembedding
from tiltmeter.pairs.batch import TokenizedPair, collate_pairs
from tiltmeter.pairs.log_probs import default_chunk_tokens, scale_and_cap, target_hidden_states
from tiltmeter.steering.recovery import kl_divergences

BASE = "base"
"""Source that every line starts from."""


class Source(NamedTuple):
    """Logits: those of a model behind prompts of its own."""

    model: LoadedModel
    pairs: Sequence[TokenizedPair]
    """The pairs, with its prompts and everybody's responses."""


class Line(NamedTuple):
    """A method at one strength."""

    method: str
    strength: float
    source: str = BASE
    """Source whose logits are mixed in, by the strength; the base: none."""
    state: Tensor | None = None
    """Added to the base's states behind the final norm, times the strength."""
    logits: Tensor | None = None
    """Added to the base's logits, times the strength."""


class Sums(NamedTuple):
    """Sums over the tokens of each response."""

    log_probs: Float[Tensor, "line pair side"]
    kl: Float[Tensor, "line pair"]
    """KL(line ‖ base) over the chosen response, nats."""

    @property
    def odds(self) -> Float[Tensor, "line pair"]:
        """log [P(chosen) / P(rejected)], nats."""
        return self.log_probs[..., 0] - self.log_probs[..., 1]


@torch.no_grad()
def measure(lines: Sequence[Line], sources: Mapping[str, Source]) -> Sums:
    """Log-probs of both responses of every pair, and how far from the base, of each line.

    Args:
        sources: by name, the base among them, all with the same responses in the same order.
    """
    n = len(sources[BASE].pairs)
    found = torch.zeros(len(lines), n, 3, dtype=torch.float64)
    for part in _parts(sources):
        of, is_chosen = part.pairs, part.is_chosen
        for i, line in enumerate(lines):
            mixed = part.logits_of(line)
            said = mixed.log_softmax(-1).gather(1, part.target_ids[:, None])[:, 0].double().cpu()
            away = kl_divergences(mixed, part.logits[BASE]).double().cpu()
            for column, values in enumerate((said * is_chosen, said * ~is_chosen, away * is_chosen)):
                found[i, :, column].index_add_(0, of, values)
    return Sums(found[..., :2], found[..., 2])


@torch.no_grad()
def mean_change(sources: Mapping[str, Source], name: str) -> Float[Tensor, " vocab"]:
    """Mean over all response tokens of a source's logits less the base's, each centred: what a bias alone could do."""
    total, n_tokens = torch.zeros(0, dtype=torch.float64), 0
    for part in _parts(sources):
        change = (part.logits[name] - part.logits[BASE]).double()
        summed = (change - change.mean(1, keepdim=True)).sum(0).cpu()
        total = summed if not n_tokens else total + summed
        n_tokens += len(change)
    return (total / n_tokens).float()


class _Part(NamedTuple):
    """Some targets of a batch under all sources."""

    logits: Mapping[str, Float[Tensor, "target vocab"]]
    hidden: Float[Tensor, "target d_model"]
    head: Unembedding
    target_ids: Tensor
    pairs: Tensor
    is_chosen: Tensor

    def logits_of(self, line: Line) -> Float[Tensor, "target vocab"]:
        base = self.logits[BASE]
        if line.state is not None:
            return _logits(self.hidden + line.strength * line.state.to(self.hidden), self.head)
        if line.logits is not None:
            return base + line.strength * line.logits.to(base)
        return guided(base, self.logits[line.source], line.strength)


def _parts(sources: Mapping[str, Source]) -> Iterator[_Part]:
    """Targets of all pairs, a chunk of logits at a time."""
    heads = {name: unembedding(of.model.model) for name, of in sources.items()}
    lengths = [max(map(longer_row, of)) for of in zip(*(source.pairs for source in sources.values()), strict=True)]
    for rows in batches_by_length(lengths):
        states, batch = {}, None
        for name, of in sources.items():
            laid = collate_pairs([of.pairs[row] for row in rows], pair_index=rows, layout="concatenated")
            laid = laid.to(of.model.model.device)
            with fast_linear(of.model.model):
                states[name] = target_hidden_states(of.model.model, laid)
            batch = laid if name == BASE else batch
        assert batch is not None
        where = torch.tensor(rows).repeat(2)[batch.target_sequences.cpu()]
        is_chosen = (batch.target_sequences < batch.n_pairs).cpu()
        for at in torch.arange(len(where)).split(default_chunk_tokens(len(heads[BASE].weight))):
            logits = {name: _logits(states[name][at], heads[name]) for name in sources}
            yield _Part(logits, states[BASE][at], heads[BASE], batch.target_ids[at], where[at], is_chosen[at])


def _logits(hidden: Tensor, head: Unembedding) -> Tensor:
    return scale_and_cap(linear(hidden, head.weight, head.bias), head)
