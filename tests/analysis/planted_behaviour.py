"""Tables of figures with known numbers, as training and analysis write them."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from tiltmeter.scoring.behaviour import FIGURES, BehaviourTables, figure_table
from tiltmeter.scoring.scorer import Figure, Scores, Side


def figure(
    name: str, of: Side, value: float, *, width: float = 0.05, n: int = 64, n_missing: int = 0, scorer: str = "coin"
) -> Figure:
    return Figure(name, of, value, value - width, value + width, n, n_missing, scorer)


def lost(name: str, of: Side, *, n: int = 10, n_missing: int = 54, scorer: str = "coin") -> Figure:
    return Figure(name, of, math.nan, math.nan, math.nan, n, n_missing, scorer)


def look(win_rate: float, toxicity: float, *, vs_chosen: float = 0.3) -> list[Figure]:
    """What one moment of training may give."""
    oracle, words = "planted oracle", "word list sha256=1"
    return [
        figure("rougeL", "policy", 0.25, scorer="rouge"),
        figure("rougeL", "base", 0.25, scorer="rouge"),
        figure("toxicity_word_list", "policy", toxicity, width=0.01, scorer=words),
        figure("toxicity_word_list", "base", 0.2, width=0.01, scorer=words),
        figure("oracle_preference_rate", "both", win_rate, scorer=oracle),
        figure("oracle_preference_rate_vs_chosen", "both", vs_chosen, scorer=oracle),
    ]


LOOKS = {0: look(0.5, 0.2), 10: look(0.75, 0.125, vs_chosen=0.625)}


def table_of(looks: dict[int, list[Figure]]) -> pd.DataFrame:
    return pd.concat([figure_table(step, 0, figures) for step, figures in looks.items()], ignore_index=True)


def write(run: Path, looks: dict[int, Sequence[Figure]]) -> Path:
    """The run's table, as training writes it; returns its path."""
    tables = BehaviourTables(run / "report" / "tables")
    for step, figures in looks.items():
        tables.add(step, 0, [], Scores(list(figures)))
    return tables.folder / FIGURES
