"""Speed of training steps, validation and looks at hidden states left out."""

import time

import torch

from tiltmeter.metric_names import metric
from tiltmeter.pairs.batch import StepBatch


class Throughput:
    """A clock that runs while optimizer steps do."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """In training steps so far."""
        self.pairs = 0
        """Trained on in that time."""
        self._started = 0.0

    def start(self) -> None:
        """Begin to count: what was done until now is no part of a step."""
        self._started = time.perf_counter()

    def end_of_step(self, step: StepBatch, device: torch.device) -> dict[str, float]:
        """Pairs and tokens per second of the step that ends here; the next one begins."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - self._started
        self.start()
        self.seconds += seconds
        self.pairs += step.n_pairs
        return {
            metric("throughput", "pairs_per_second"): step.n_pairs / seconds,
            metric("throughput", "tokens_per_second"): step.n_tokens / seconds,
        }
