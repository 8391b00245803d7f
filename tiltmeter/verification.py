"""Does this model compute what this project assumes? One small pair, before training, against the model's own logits.

A model family may read positions, masks or its head in a way that no flag announces (ALiBi, state-space layers, scaled
heads); then log-probs would be wrong without any error. A check costs four short forwards.
"""

import torch
from transformers import PreTrainedModel

from tiltmeter.batch import Layout, TokenizedPair, collate_pairs
from tiltmeter.errors import UserError
from tiltmeter.log_probs import sequence_log_probs

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest accepted difference of a log-prob, as a share of its size."""


@torch.no_grad()
def verify_layout(model: PreTrainedModel, layout: Layout) -> None:
    """Compare the log-probs of one pair of random tokens in a layout with the model's own logits, a sequence at a time.

    Raises:
        UserError: they differ, or the model can't run the layout.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    prompt, chosen, rejected = (
        torch.randint(vocab_size, (length,), generator=generator, device="cpu").tolist() for length in (7, 4, 6)
    )
    pair = TokenizedPair(prompt, chosen, rejected)
    own = [_own_log_prob(model, prompt, response) for response in (chosen, rejected)]
    batch = collate_pairs([pair], pair_index=[0], layout=layout).to(model.device)
    name = f"model: {type(model).__name__}"
    try:
        ours = sequence_log_probs(model, batch).tolist()
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} cannot run datamodule.layout={layout} ({reason[:200]}); {_advice(layout)}") from error
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, own, strict=False))
    if not worst <= _TOLERANCE.get(model.dtype, 5e-2):
        raise UserError(
            f"{name} gives other log-probs in datamodule.layout={layout} than by its own logits (a relative difference of "
            f"{worst:.1g}); {_advice(layout)}"
        )


def _own_log_prob(model: PreTrainedModel, prompt: list[int], response: list[int]) -> float:
    ids = torch.tensor([prompt + response], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0].to(torch.float64)
    predicted = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return float(predicted.gather(1, ids[0, len(prompt) :, None]).sum())


def _advice(layout: Layout) -> str:
    if layout == "shared_prefix":
        return "its attention can't share a prompt: set datamodule.layout=concatenated"
    return "this family is not supported"
