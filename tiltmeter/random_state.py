"""State of a process's random numbers, as tensors and plain values that ``torch.load(weights_only=True)`` reads."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """State of the generators of Python, NumPy and PyTorch, on the CPU and on all GPUs of this process.

    >>> before = random_state()
    >>> drawn = torch.rand(3), random.random(), np.random.rand()
    >>> set_random_state(before)
    >>> torch.equal(torch.rand(3), drawn[0]), random.random() == drawn[1], np.random.rand() == drawn[2]
    (True, True, True)
    """
    version, numbers, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002 (the global one is what libraries draw from)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": numpy | {"state": numpy["state"] | {"key": torch.from_numpy(numpy["state"]["key"].astype(np.int64))}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on where :func:`random_state` was taken; GPUs only if as many are here."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy = state["numpy"]
    key = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(numpy | {"state": numpy["state"] | {"key": key}})  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
