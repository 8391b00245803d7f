"""Small sweeps of two tiny models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.open.checkpoints import Checkpoints
from analysis.steering.sweep import SteeringSweep, Sweep
from analysis.steering.table import Rows, SweepTable
from tiltmeter.models.generation import Decoding
from tiltmeter.scoring.degeneration import DegenerationScorer
from tiltmeter.scoring.scorer import Sample, Scores

LAMBDAS = (-1.0, 1.0, 0.5)


def make(about: Checkpoints, **changes: Any) -> Sweep:
    options = {
        "scorers": {"degeneration": DegenerationScorer()},
        "decoding": Decoding(max_new_tokens=6),
        "vectors": ["v_bar"],
        "lambdas": LAMBDAS,
        "n_random": 2,
        "n_generated": 2,
    }
    return SteeringSweep(**(options | changes)).plan(about)


def make_small(about: Checkpoints, **changes: Any) -> Sweep:
    return make(about, **({"vectors": [], "n_random": 1, "sites": "final_post_norm"} | changes))


def run(sweep: Sweep, folder: Path, *, n_units: int | None = None, restart: bool = False) -> SweepTable:
    table = SweepTable(folder, sweep.settings, restart=restart)
    for unit in [unit for unit in sweep.units if unit not in table.finished][:n_units]:
        table.append(unit, sweep.rows(unit))
    return table


def as_table(taken: Rows) -> pd.DataFrame:
    return pd.DataFrame(taken.rows).rename(columns={"strength": "lambda"})


def values(table: pd.DataFrame, metric: str, strength: float) -> list[float]:
    return table[(table["metric"] == metric) & (table["lambda"] == strength)]["value"].tolist()


class Listener(DegenerationScorer):
    """Keeps what it is asked to score."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[list[tuple[str, str]]] = []

    def score(self, samples: Sequence[Sample]) -> Scores:
        self.heard.append([(sample.base.text, sample.policy.text) for sample in samples])
        return super().score(samples)
