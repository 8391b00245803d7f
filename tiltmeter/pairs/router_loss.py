"""The load-balancing loss of mixtures of experts, beside log-probs from one forward pass."""

import sys
from typing import Any, cast

from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from tiltmeter.errors import UserError, argument
from tiltmeter.models.layers import backbone, unembedding
from tiltmeter.pairs.batch import PAD, PreferenceBatch
from tiltmeter.pairs.log_probs import model_inputs, sum_by_sequence, token_log_probs

_FUNCTION = "load_balancing_loss_func"
"""Name that transformers gives the loss in each family's own module."""


def router_coefficient(model: PreTrainedModel, router_aux_loss: float | None = None) -> float:
    """Weight of the load-balancing loss; 0 for a model without one.

    Args:
        router_aux_loss: None: the model's own, ``router_aux_loss_coef`` of its configuration.

    Raises:
        UserError: it is asked of a model that has none.
    """
    own = getattr(model.config, "router_aux_loss_coef", None)
    records = "router_logits" in (getattr(backbone(model), "_can_record_outputs", None) or {})
    if own is None or not records or not hasattr(sys.modules[type(model).__module__], _FUNCTION):
        if router_aux_loss:
            raise UserError(
                f"{argument('router_coefficient.router_aux_loss')}={router_aux_loss:g}: {type(model).__name__} has no "
                "load-balancing loss; leave it out"
            )
        return 0.0
    return float(own if router_aux_loss is None else router_aux_loss)


def log_probs_and_router_loss(
    model: PreTrainedModel, batch: PreferenceBatch, *, chunk_tokens: int | None = None
) -> tuple[Float[Tensor, " sequence"], Float[Tensor, ""]]:
    """log π(y|x) in nats as :func:`~tiltmeter.pairs.log_probs.sequence_log_probs`, and the load-balancing loss of the tokens.

    The loss is the family's own in transformers (Switch, arXiv 2101.03961, eq. 4 to 6): over all layers and all tokens but padding,
    n · Σ_e (share of choices that fall on expert e) · (mean routing probability of e), which is k at its best, k the experts of a
    token. With a shared prompt its tokens count once, where two rows of prompt and response count them twice.
    """
    out = backbone(model)(**model_inputs(model, batch), output_router_logits=True)
    hidden = rearrange(out.last_hidden_state, "row token d -> (row token) d")[batch.target_rows]
    token_logps = token_log_probs(hidden, unembedding(model), batch.target_ids, chunk_tokens=chunk_tokens)
    balance = getattr(sys.modules[type(model).__module__], _FUNCTION)
    owner: Any = model
    loss = balance(out.router_logits, owner.num_experts, owner.num_experts_per_tok, batch.segments != PAD)
    return sum_by_sequence(token_logps, batch.target_sequences, batch.n_sequences), cast(Tensor, loss)
