"""The next token from logits: drawn by Gumbel noise from a stream of its own, and never from NaN."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper

from tiltmeter.errors import UserError


class NoNaN(LogitsProcessor):
    """:func:`refuse_nan` inside of ``model.generate``."""

    def __call__(
        self, input_ids: Int[Tensor, "row token"], scores: Float[Tensor, "row vocab"]
    ) -> Float[Tensor, "row vocab"]:
        """Return the scores as they are. Raises UserError where they are NaN."""
        refuse_nan(scores)
        return scores


def refuse_nan(logits: Float[Tensor, "*row vocab"]) -> None:
    """Stop where the likeliest token would be id 0 for want of numbers: text that no model said.

    Raises:
        UserError: NaN among the logits.
    """
    if logits.isnan().any():
        raise UserError(
            "generation: the model's logits are NaN; its weights are not finite, or it can't take left-padded rows in this "
            "dtype and attention (float64 with eager does not)"
        )


class GumbelSampling(LogitsProcessor):
    """Turns the likeliest token into one drawn from softmax(logits / temperature), cut to ``top_p``, by a stream per row."""

    def __init__(self, streams: Sequence[int], temperature: float, top_p: float) -> None:
        self.generators = [torch.Generator().manual_seed(stream) for stream in streams]
        self.temperature = temperature
        self.warp = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(
        self, input_ids: Int[Tensor, "row token"], scores: Float[Tensor, "row vocab"]
    ) -> Float[Tensor, "row vocab"]:
        """Draw one token a row; the signature is that of transformers."""
        return self.perturbed(scores)

    def perturbed(self, scores: Float[Tensor, "score_row vocab"]) -> Float[Tensor, "score_row vocab"]:
        """Scores of which the largest is the token drawn; a single stream is that of all rows."""
        logits = scores.double() / self.temperature
        if self.warp is not None:
            logits = self.warp(None, logits)
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=g, dtype=torch.float64) for g in self.generators])
        return logits - torch.log(-torch.log(uniform.clamp_min(1e-300))).to(logits.device)
