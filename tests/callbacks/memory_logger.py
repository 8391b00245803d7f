"""A logger that keeps what it gets."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger


class MemoryLogger(Logger):
    """Rows in the order in which they came."""

    name = "memory"
    version = ""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Not kept."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep a row."""
        self.rows.append({"step": float(step or 0), **{name: float(value) for name, value in metrics.items()}})

    def of(self, name: str) -> list[float]:
        """One metric over time."""
        return [row[name] for row in self.rows if name in row]

    @property
    def names(self) -> set[str]:
        """Every metric that came."""
        return {name for row in self.rows for name in row}
