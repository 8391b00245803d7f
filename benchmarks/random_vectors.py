"""How often the random vectors of a run's steering sweep are called above or below random, each judged against the others.

    python analyze.py run=RUN analysis=steering_sweep
    python benchmarks/random_vectors.py RUN                    # half a minute

The nominal rate is 2.5 % each side. Lengths, metrics and sites share their draws: the error given is that over draws of one cell
of the table, and the rates of cells go together.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import common  # before torch, which reads its threads' settings as it is imported

# isort: split
import pandas as pd

from analysis.controls.c15_random_vectors import COMPARED, Cell, Sums, cell_of, compare
from analysis.steering.table import read_pairs
from tiltmeter.stats.among_random import ABOVE, BELOW
from tiltmeter.steering.vector import RANDOM_KINDS

NOMINAL = 0.025


def random_among_random(pairs: pd.DataFrame) -> pd.DataFrame:
    """Share of random vectors called above or below the others of their kind: the real error rate of :func:`steering_effects`.

    Args:
        pairs: :func:`analysis.steering.table.read_pairs`.

    Returns:
        a row for each direction, site, random kind, comparison and length above 0 (``lambda`` is the random vectors' own), with the
        shares of ``n`` draws whose verdict is ``above`` and ``below``, each draw judged against all others.
    """
    rows: list[dict[str, Any]] = []
    for (direction, site), part in pairs.groupby(["direction", "site"], sort=False):
        cell = cell_of(part)
        for kind, drawn in ((name, cell.by_vector[name]) for name in RANDOM_KINDS if name in cell.by_vector):
            n = drawn.kl.shape[1]
            for strength in (x for x in drawn.strengths if x > 0):
                for metric, equal in COMPARED:
                    verdicts = [
                        compare(with_one_apart(cell, kind, i), "one", kind, metric, equal, strength)[0].verdict
                        for i in range(n)
                    ]
                    known = {"direction": direction, "site": site, "control": kind, "lambda": strength}
                    known |= {"metric": metric, "equal": equal, "n": n}
                    rows.append(known | {"above": verdicts.count(ABOVE) / n, "below": verdicts.count(BELOW) / n})
    return pd.DataFrame(rows)


def with_one_apart(cell: Cell, kind: str, draw: int) -> Cell:
    """One draw of a random kind as the vector ``one``, beside all others of its kind."""
    drawn = cell.by_vector[kind]
    others = [i for i in range(drawn.kl.shape[1]) if i != draw]
    return cell._replace(by_vector={"one": _some(drawn, [draw]), kind: _some(drawn, others)})


def _some(sums: Sums, draws: list[int]) -> Sums:
    return sums._replace(**{name: getattr(sums, name)[:, draws] for name in Sums._fields[2:]})


def main() -> None:
    """Print the rates by site and comparison, over directions and lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    found = random_among_random(read_pairs(parser.parse_args().run / "report" / "tables" / "sweep_pairs.csv"))
    means = (
        found.groupby(["control", "site", "metric", "equal", "n"], sort=False)[["above", "below"]].mean().reset_index()
    )
    print(means.to_string(index=False, float_format="{:.3f}".format))
    every = found[["above", "below"]].mul(found["n"], axis=0).sum() / found["n"].sum()
    error = math.sqrt(NOMINAL * (1 - NOMINAL) / found["n"].max())
    common.print_result(random_above=every["above"], random_below=every["below"], nominal=NOMINAL, error=error)


if __name__ == "__main__":
    main()
