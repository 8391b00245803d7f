"""Steering by sparse features (FSRL, arXiv 2509.12934): a small map adds to the features of each token, the model is frozen.

With f = encode(x): a = W_A x + b_A, s = soft(a, τ), f' = ReLU(f + s), x' = f' W_dec + b_dec + (x − SAE(x)), the last term without
gradient. What s does is not s: where f + s < 0 the feature is only off, so the *effective* steering is ReLU(f + s) − f.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiltmeter.errors import UserError, argument
from tiltmeter.models.cpu_linear import linear
from tiltmeter.models.state_adapter import StateAdapter, insert_adapter
from tiltmeter.pairs.batch import CHOSEN, PreferenceBatch
from tiltmeter.sparse.autoencoder import SparseAutoencoder

NOT_MERGED = "features of hidden states are steered, which no weight of the model does"
"""Reason why there is no whole model to write."""


@dataclass(frozen=True)
class SparseOptions:
    """Options of a steering that is trained.

    Args:
        sae: folder or hub id of the autoencoder (:func:`tiltmeter.sparse.files.load_sae`); its site is where it steers.
        folder: inside it.
        revision: commit or tag on the hub.
        site: of files that don't say it.
        any_model: an autoencoder of another model of that shape will do.
        threshold: τ at first, and the largest entry of W_A: small enough that the model computes what it did.
        sparsity: λ₁, weight in the loss of Σ|s|, the mean over response tokens.
        seed: of W_A.

    Raises:
        UserError: a threshold that is not above 0, a weight below 0.
    """

    sae: str
    folder: str | None = None
    revision: str | None = None
    site: str | None = None
    any_model: bool = False
    threshold: float = 1e-6
    sparsity: float | int = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked without a file."""
        if not self.threshold > 0:
            raise UserError(f"{argument('SparseOptions.threshold')}: expected more than 0, got {self.threshold}")
        if not self.sparsity >= 0:
            raise UserError(f"{argument('SparseOptions.sparsity')}: expected at least 0, got {self.sparsity}")


class Steered(NamedTuple):
    """Steering of each token of a forward pass; the first has a gradient."""

    l1: Float[Tensor, "*row"]
    """Σ_j |s_j|, in units of features."""
    l0: Float[Tensor, "*row"]
    """Features with s_j ≠ 0."""
    l1_effective: Float[Tensor, "*row"]
    """Σ_j |ReLU(f_j + s_j) − f_j|."""
    l0_effective: Float[Tensor, "*row"]
    """Features that are changed."""


def soft_threshold(a: Float[Tensor, "*row width"], threshold: Float[Tensor, " width"]) -> Float[Tensor, "*row width"]:
    """sgn(a) · max(|a| − τ, 0); a τ below 0 counts as 0.

    >>> soft_threshold(torch.tensor([3.0, -3.0, 0.5]), torch.ones(3)).tolist()
    [2.0, -2.0, 0.0]
    """
    return a.sign() * (a.abs() - threshold.clamp(min=0)).relu()


def effective_steering(
    features: Float[Tensor, "*row width"], steering: Float[Tensor, "*row width"]
) -> Float[Tensor, "*row width"]:
    """ReLU(f + s) − f: what is left of a steering once features can't go below 0; exactly 0 where s is.

    >>> effective_steering(torch.tensor([0.0, 2.0, 2.0]), torch.tensor([-1.0, -3.0, 0.5])).tolist()
    [0.0, -2.0, 0.5]
    """
    return (features + steering).relu() - features


class SparseSteering(StateAdapter):
    """x ↦ f' W_dec + b_dec + (x − SAE(x)) at every token.

    Args:
        sae: frozen from now on.
        threshold: τ₀: W_A ~ U(−τ₀, τ₀), b_A = 0 and τ = τ₀.
        seed: of W_A.
    """

    name = "sparse_steering"

    def __init__(self, sae: SparseAutoencoder, *, threshold: float = 1e-6, seed: int = 0) -> None:
        super().__init__(sae.site)
        self.sae = sae.requires_grad_(False)
        drawn = torch.rand(sae.width, sae.d_model, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(threshold * (2 * drawn - 1))
        self.bias = nn.Parameter(torch.zeros(sae.width))
        self.threshold = nn.Parameter(torch.full((sae.width,), threshold))
        self.ablated: Bool[Tensor, " width"] | None
        self.register_buffer("ablated", None, persistent=False)
        """Features that are not steered; None: all are."""
        self.last: Steered | None = None
        """Steering of the last forward pass while it was on."""

    def steering(self, hidden: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row width"]:
        """s = soft(W_A x + b_A, τ), 0 for ablated features."""
        s = soft_threshold(linear(hidden.to(self.weight.dtype), self.weight, self.bias), self.threshold)
        return s if self.ablated is None else s.masked_fill(self.ablated, 0.0)

    def change(self, hidden: Float[Tensor, "row token d_model"]) -> Float[Tensor, "row token d_model"]:
        """The steered states; what was steered is left in :attr:`last`.

        The error term and f are without gradient, so x' is x + (f' − f) W_dec: exactly x where nothing is steered.
        """
        hidden = hidden.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            with torch.no_grad():
                features = self.sae.encode(hidden)
            s = self.steering(hidden)
            effective = effective_steering(features, s)
            moved = self.sae.move(effective, like=hidden)
        self.last = Steered(s.abs().sum(-1), *_counts(s, effective))
        return hidden + moved.to(hidden.dtype)

    @torch.no_grad()
    def clamp_thresholds(self) -> str | None:
        """Set thresholds that an optimizer's step drove below 0 to 0; one line about it, None where there was none."""
        n_below = int((self.threshold < 0).sum())
        if not n_below:
            return None
        self.threshold.clamp_(min=0)
        return f"sparse steering: {n_below} of {len(self.threshold)} thresholds were driven below 0 and are 0 now"


class SparsityPenalty:
    """λ₁ · mean over the response tokens of an optimizer step of Σ_j |s_j|, micro-batch by micro-batch; and what was steered.

    Args:
        weight: λ₁.
    """

    def __init__(self, weight: float | int) -> None:
        self.weight = weight
        self.n_tokens = 0
        self._sums: dict[str, Tensor] = {}

    def begin(self, n_tokens: int) -> None:
        """A step begins.

        Args:
            n_tokens: response tokens of all its micro-batches, on all processes.
        """
        self.n_tokens, self._sums = n_tokens, {}

    def of(self, steering: SparseSteering, batch: PreferenceBatch) -> Float[Tensor, ""]:
        """Share of the step's penalty by one micro-batch, whose forward pass was the last; it has a gradient."""
        assert steering.last is not None, "the model runs first"
        mask = response_tokens(batch)
        for name, per_token in zip(Steered._fields, steering.last, strict=True):
            total = per_token.detach()[mask].sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        return self.weight * steering.last.l1[mask].sum() / max(1, self.n_tokens)

    def means(self) -> dict[str, Tensor]:
        """Field of :class:`Steered` → its mean over the step's response tokens, of this process's part."""
        return {name: total / max(1, self.n_tokens) for name, total in self._sums.items()}


def response_tokens(batch: PreferenceBatch) -> Bool[Tensor, "row token"]:
    """Tokens of chosen and rejected responses, none of a micro-batch that only fills a process's schedule."""
    return (batch.segments >= CHOSEN) & bool(batch.weights.any())


def insert_steering(model: PreTrainedModel, sae: SparseAutoencoder, options: SparseOptions) -> SparseSteering:
    """Put a steering into a model, the only parameters that are trained from now on.

    Raises:
        UserError: the autoencoder doesn't fit the model.
    """
    sae.check_fits(model, any_model=options.any_model)
    steering = SparseSteering(sae, threshold=options.threshold, seed=options.seed)
    insert_adapter(model, steering)
    return steering


def sparse_steering(model: PreTrainedModel) -> SparseSteering | None:
    """The steering that :func:`insert_steering` put into a model; None: it has none."""
    return getattr(model, SparseSteering.name, None)


@torch.no_grad()
def _counts(s: Tensor, effective: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """l0, effective l1 and effective l0 of each token."""
    changed = effective.abs()
    return (s != 0).sum(-1).to(s.dtype), changed.sum(-1), (changed > 0).sum(-1).to(s.dtype)
