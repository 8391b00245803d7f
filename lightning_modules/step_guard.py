"""Whether a step's loss and gradient are fit to be learned from: finite, and no spike."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

from tiltmeter.errors import NumericalStop

WINDOW = 128
"""Steps that a spike is measured against, at most."""
ACTIVE_FROM = 64
"""Steps before the first that can be a spike."""
CURE = "A lower module.learning_rate or a higher precision is the usual cure"


def some(names: Sequence[str]) -> str:
    """The first five of them.

    >>> some(["a/1", "a/2", "a/3", "a/4", "a/5", "a/6", "a/7"])
    'a/1, a/2, a/3, a/4, a/5 and 2 more'
    """
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class StepGuard:
    """Judges every optimizer step by its loss and gradient norm before weights change; equal numbers in, equal verdict out.

    A spike is a loss or a gradient norm that lies more than ``spike_sigmas`` standard deviations above the mean of the
    last 128 finite steps (the rule of OLMo-core's SkipStepOptimizer, above only). Spikes enter the window like any other
    step, so that a lasting change is learned from after a few steps.

    Args:
        max_skipped_steps: in a row, for numbers that aren't finite; one more ends the run.
        spike_sigmas: None: spikes are learned from.

    >>> guard = StepGuard(max_skipped_steps=3, spike_sigmas=6.0)
    >>> [guard.refuse(loss=0.6 + 0.1 * (step % 2), norm=1.0) for step in range(64)] == [None] * 64
    True
    >>> guard.refuse(loss=1.0, norm=1.0)
    'loss 1 is 6.9 standard deviations above the mean of 64 steps'
    >>> guard.refuse(loss=math.nan, norm=1.0), guard.n_refused, guard.n_not_finite_in_a_row
    ('loss or gradient not finite', 2, 1)
    """

    def __init__(self, *, max_skipped_steps: int, spike_sigmas: float | None) -> None:
        self.max_skipped_steps = max_skipped_steps
        self.spike_sigmas = spike_sigmas
        self.n_refused = 0
        self.n_not_finite_in_a_row = 0
        self._before: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in ("loss", "gradient norm")}

    def refuse(self, *, loss: float, norm: float) -> str | None:
        """Why a step is not to be taken; None: it is."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.n_refused += 1
            self.n_not_finite_in_a_row += 1
            return "loss or gradient not finite"
        self.n_not_finite_in_a_row = 0
        latest = {"loss": loss, "gradient norm": norm}
        reasons = [reason for name, value in latest.items() if (reason := self._spike(name, value))]
        for name, value in latest.items():
            self._before[name].append(value)
        self.n_refused += bool(reasons)
        return "; ".join(reasons) or None

    def skipped(self, step: int, reason: str, not_finite: Sequence[str]) -> str:
        """A refused step in words.

        Args:
            step: optimizer steps before it.
            reason: of :meth:`refuse`.
            not_finite: pairs whose loss isn't finite, on any process.

        Raises:
            NumericalStop: too many in a row.
        """
        n_in_a_row = self.n_not_finite_in_a_row
        pairs = f" ({some(not_finite) if not_finite else 'every loss is finite, the gradient is not'})"
        said = f"step {step}: {reason}{pairs if n_in_a_row else ''}"
        if n_in_a_row > self.max_skipped_steps:
            raise NumericalStop(
                f"{said}, {n_in_a_row} in a row (module.max_skipped_steps={self.max_skipped_steps}). {CURE}"
            )
        return f"{said}; skipped, nothing was updated"

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs to judge as it would have."""
        before = {name: list(values) for name, values in self._before.items()}
        return {"n_refused": self.n_refused, "in_a_row": self.n_not_finite_in_a_row, "before": before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.n_refused, self.n_not_finite_in_a_row = state["n_refused"], state["in_a_row"]
        self._before = {name: deque(values, maxlen=WINDOW) for name, values in state["before"].items()}

    def _spike(self, name: str, value: float) -> str | None:
        before = self._before[name]
        if self.spike_sigmas is None or len(before) < ACTIVE_FROM:
            return None
        mean, deviation = statistics.fmean(before), statistics.stdev(before)
        if value - mean <= self.spike_sigmas * deviation:
            return None
        far = f"{(value - mean) / deviation:.2g} standard deviations" if deviation else "far"
        return f"{name} {value:.3g} is {far} above the mean of {len(before)} steps"
