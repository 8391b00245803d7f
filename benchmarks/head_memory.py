"""Peak memory of the unembedding, forward and backward: tiltmeter's chunks against materialised logits."""

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Message, peak_memory_mb, synchronizer
from benchmarks.worker import Channel, Turns
from tiltmeter.models.layers import Unembedding
from tiltmeter.pairs.log_probs import token_log_probs


def work(settings: Message, channel: Channel) -> Message:
    """Memory above that of the inputs; ``chunk_tokens`` null materialises all logits. The first turn makes the inputs.

    The gradient of the weight, which both ways make, counts on both.
    """
    device, n_tokens, vocab = settings["device"], settings["n_tokens"], settings["vocab_size"]
    turns = Turns([0, 1], channel, synchronizer(device))
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    hidden = torch.randn(n_tokens, settings["width"], device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab, settings["width"], device=device, dtype=dtype) * 0.02).requires_grad_()
    target_ids = torch.randint(vocab, (n_tokens,), device=device)
    turns.before_step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_memory_mb(device)
    total = log_probs(hidden, weight, target_ids, settings["chunk_tokens"]).sum()
    total.backward()
    turns.end()
    return {"peak_mb": peak_memory_mb(device) - before, "log_prob": total.item()}


def log_probs(hidden: Tensor, weight: Tensor, target_ids: Tensor, chunk_tokens: int | None) -> Tensor:
    """Log-prob of each target, in one of the two ways."""
    if chunk_tokens is None:
        return F.linear(hidden, weight).float().log_softmax(-1).gather(-1, target_ids[:, None])
    return token_log_probs(hidden, Unembedding(weight), target_ids, chunk_tokens=chunk_tokens)
