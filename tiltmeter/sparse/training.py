"""Training of TopK autoencoders: first weights, the loss and its revival of dead features, rows of the decoder of length 1.

After Gao et al. (arXiv 2406.04093). Rows come through a buffer that mixes them, so that states are never all in memory or on disk.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from tiltmeter.errors import NumericalStop, UserError, argument
from tiltmeter.models.cpu_linear import linear
from tiltmeter.sparse.autoencoder import SparseAutoencoder, TopK, keep_largest


class SaeLoss(NamedTuple):
    """Loss of a batch of rows; scalars."""

    total: Float[Tensor, ""]
    """Reconstruction + weight · auxiliary."""
    reconstruction: Float[Tensor, ""]
    """Σ‖x − x̂‖² / Σ‖x − x̄‖²: share of the rows' variance that is not explained."""
    auxiliary: Float[Tensor, ""]
    """Σ‖e − ê‖² / Σ‖e‖² of what the reconstruction lacks, e, by dead features alone; 0 where none is dead."""
    features: Float[Tensor, "row width"]


@torch.no_grad()
def initialise(sae: TopK, rows: Float[Tensor, "row d_model"], *, seed: int) -> None:
    """Fill an autoencoder: random decoder rows of length 1, the encoder the same, the bias the mean of some states.

    Args:
        rows: states such as it will be trained on.
        seed: of the directions.
    """
    drawn = torch.randn(sae.width, sae.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sae.decoder_weight.copy_(normalize(drawn, dim=1))
    sae.encoder_weight.copy_(sae.decoder_weight)
    sae.encoder_bias.zero_()
    sae.decoder_bias.copy_(rows.double().mean(0))


def sae_loss(
    sae: TopK,
    rows: Float[Tensor, "row d_model"],
    dead: Bool[Tensor, " width"],
    *,
    n_revived: int,
    auxiliary_weight: float | int,
) -> SaeLoss:
    """Reconstruction loss, and the auxiliary one that keeps features from staying dead.

    The auxiliary loss lets the ``n_revived`` largest pre-activations of dead features, those above 0, explain what the
    reconstruction lacks; the error itself gets no gradient from it.

    Args:
        dead: features that haven't been active for long.
        n_revived: most dead features that a row uses.
        auxiliary_weight: of the auxiliary loss in the total.
    """
    pre = sae.pre_activations(rows)
    features = sae.activate(pre)
    made = sae.decode(features, like=rows)
    lacking = rows - made
    reconstruction = lacking.square().sum() / (rows - rows.mean(0)).square().sum()
    auxiliary = reconstruction.new_zeros(())
    n = min(n_revived, int(dead.sum()))
    if n and auxiliary_weight:
        revived = keep_largest(pre.masked_fill(~dead, -torch.inf), n)
        error = lacking.detach()
        left = error - linear(revived, sae.decoder_weight.t())
        auxiliary = left.square().sum() / error.square().sum()
    return SaeLoss(reconstruction + auxiliary_weight * auxiliary, reconstruction, auxiliary, features)


@torch.no_grad()
def drop_radial_gradient(sae: SparseAutoencoder) -> None:
    """Take the part along each decoder row out of its gradient, which could only change the row's length."""
    if sae.decoder_weight.grad is not None:
        rows, gradient = sae.decoder_weight, sae.decoder_weight.grad
        gradient -= (gradient * rows).sum(1, keepdim=True) * rows


@torch.no_grad()
def unit_decoder_rows(sae: SparseAutoencoder) -> None:
    """Scale every decoder row to length 1, in place."""
    sae.decoder_weight.copy_(normalize(sae.decoder_weight, dim=1))


class Learner:
    """Steps of one training and what they keep: for how many rows each feature was not active.

    Args:
        sae: trained in place.
        n_revived: most dead features that a row revives; None: half of the width of the states.
        auxiliary_weight: of the auxiliary loss.
        dead_after: rows without a feature from which it counts as dead.

    Raises:
        UserError: a number below 0, or no row.
    """

    def __init__(
        self,
        sae: TopK,
        *,
        n_revived: int | None = None,
        auxiliary_weight: float | int = 1 / 32,
        dead_after: int = 1_000_000,
    ) -> None:
        for name, value, least in (
            ("n_revived", 1 if n_revived is None else n_revived, 0),
            ("auxiliary_weight", auxiliary_weight, 0),
            ("dead_after", dead_after, 1),
        ):
            if not value >= least:
                raise UserError(f"{argument(f'Learner.{name}')}: expected at least {least}, got {value}")
        self.sae, self.auxiliary_weight, self.dead_after = sae, auxiliary_weight, dead_after
        self.n_revived = max(1, sae.d_model // 2) if n_revived is None else n_revived
        self.rows_without = torch.zeros(sae.width, dtype=torch.long)

    @property
    def dead(self) -> Bool[Tensor, " width"]:
        """Features that count as dead now."""
        return self.rows_without >= self.dead_after

    def loss(self, rows: Float[Tensor, "row d_model"]) -> SaeLoss:
        """Loss of the next batch of rows, which are counted.

        Raises:
            NumericalStop: every feature is dead, so that nothing could be learned any more.
        """
        if bool(self.dead.all()):
            raise NumericalStop(
                f"every feature is dead: none was active in the last {self.dead_after} states; a lower learning rate is the cure"
            )
        device = self.sae.decoder_weight.device
        found = sae_loss(
            self.sae,
            rows,
            self.dead.to(device),
            n_revived=self.n_revived,
            auxiliary_weight=self.auxiliary_weight,
        )
        is_active = (found.features.detach() > 0).any(0).cpu()
        self.rows_without = torch.where(is_active, 0, self.rows_without + len(rows))
        return found

    def before_step(self) -> None:
        """Call between the backward pass and the optimizer's step."""
        drop_radial_gradient(self.sae)

    def after_step(self) -> None:
        """Call after the optimizer's step."""
        unit_decoder_rows(self.sae)


class ShuffleBuffer:
    """Mixes a stream of rows: each that comes in takes the place of a random one, which goes out.

    Args:
        n_rows: rows that are kept.
        d_model: their width.
        seed: of the order.

    Raises:
        UserError: no row is kept.
    """

    def __init__(self, n_rows: int, d_model: int, *, seed: int) -> None:
        if n_rows < 1:
            raise UserError(f"{argument('ShuffleBuffer.n_rows')}: expected at least 1, got {n_rows}")
        self.rows = torch.zeros(n_rows, d_model)
        self.n_filled = 0
        self._generator = torch.Generator().manual_seed(seed)

    def exchange(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Put rows in and get as many back, float32 on the CPU; until the buffer is full, they are copies of rows that stay."""
        parts = [self._exchange(part) for part in rows.detach().to("cpu", torch.float32).split(len(self.rows))]
        return torch.cat(parts)

    def _exchange(self, rows: Tensor) -> Tensor:
        n_new = min(len(rows), len(self.rows) - self.n_filled)
        self.rows[self.n_filled : self.n_filled + n_new] = rows[:n_new]
        self.n_filled += n_new
        places = torch.randperm(self.n_filled, generator=self._generator)[: len(rows)]
        out = self.rows[places]
        self.rows[places[n_new:]] = rows[n_new:]
        return out

    def state_dict(self) -> dict[str, Any]:
        """Everything that a training needs to go on as it would have."""
        return {"rows": self.rows[: self.n_filled].clone(), "order": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.n_filled = len(state["rows"])
        self.rows[: self.n_filled] = state["rows"]
        self._generator.set_state(state["order"])
