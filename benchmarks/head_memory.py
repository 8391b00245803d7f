"""Peak memory of the unembedding, forward and backward: tiltmeter's chunks against materialised logits."""

import time

import torch
from torch.nn import functional as F

from benchmarks.common import Message, peak_memory_mb, synchronizer
from benchmarks.worker import Channel
from tiltmeter.layers import Unembedding
from tiltmeter.log_probs import token_log_probs


def work(settings: Message, channel: Channel) -> Message:
    """Memory above that of the inputs, and seconds; ``chunk_tokens`` null materialises all logits.

    The gradient of the weight, which both ways make, counts on both.
    """
    device, n_tokens, vocab = settings["device"], settings["n_tokens"], settings["vocab_size"]
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    hidden = torch.randn(n_tokens, settings["width"], device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab, settings["width"], device=device, dtype=dtype) * 0.02).requires_grad_()
    target_ids = torch.randint(vocab, (n_tokens,), device=device)
    synchronize = synchronizer(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, started = peak_memory_mb(device), time.perf_counter()
    if settings["chunk_tokens"] is None:
        log_probs = F.linear(hidden, weight).float().log_softmax(-1).gather(-1, target_ids[:, None])
    else:
        log_probs = token_log_probs(hidden, Unembedding(weight), target_ids, chunk_tokens=settings["chunk_tokens"])
    total = log_probs.sum()
    total.backward()
    synchronize()
    return {
        "peak_mb": peak_memory_mb(device) - before,
        "seconds": time.perf_counter() - started,
        "log_prob": total.item(),
    }
