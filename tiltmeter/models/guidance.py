"""Two models decoded as one: logits z + w (z_other − z) at every token, on the same completion behind prompts of their own.

With the aligned model as the other one this is guidance by it (CFGRL, arXiv 2505.23458): w = 1 is the aligned model. With the same
model behind a prompt that states a principle it is linear alignment (arXiv 2401.11458): w = 1 is the prompt alone.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel


class Guide(NamedTuple):
    """The other model of two that are decoded as one."""

    model: PreTrainedModel
    weight: float
    prompts: Sequence[Sequence[int]] | None = None
    """Token ids of its own prompts, one for each that is completed; None: the same."""


def guided(
    logits: Float[Tensor, "*row vocab"], other: Float[Tensor, "*row vocab"], weight: float
) -> Float[Tensor, "*row vocab"]:
    """z + w (z_other − z): unnormalised log-probs of π^(1−w) π_other^w; exact at w = 0 and w = 1.

    >>> guided(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0]), 2.0)
    tensor([5., 2.])
    """
    return other if weight == 1 else logits + weight * (other - logits)


class Guidance(LogitsProcessor):
    """Mixes another model's logits into those of the one that generates; it keeps a cache of its own.

    Args:
        guide: the other model and its weight.
        ids: its prompts, padded on the left.
        mask: 0 where they are padded.
    """

    def __init__(self, guide: Guide, ids: Int[Tensor, "row token"], mask: Int[Tensor, "row token"]) -> None:
        self.guide, self.ids, self.mask = guide, ids, mask
        self._takes = set(signature(guide.model.forward).parameters)
        self._cache: Any = None

    def __call__(self, input_ids: Int[Tensor, "row token"], scores: Float[Tensor, "row vocab"]) -> Tensor:
        """Logits of both for the next token, mixed."""
        if self._cache is None:
            new = self.ids
        else:
            new = input_ids[:, -1:]
            self.mask = torch.cat([self.mask, torch.ones_like(new)], dim=1)
        places = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        options = {"position_ids": places, "logits_to_keep": 1}
        found = self.guide.model(
            input_ids=new,
            attention_mask=self.mask,
            past_key_values=self._cache,
            use_cache=True,
            **{name: value for name, value in options.items() if name in self._takes},
        )
        self._cache = found.past_key_values
        return guided(scores, found.logits[:, -1].to(scores), self.guide.weight)
