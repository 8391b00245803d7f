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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import common  # before torch, which reads its threads' settings as it is imported

# isort: split
from analysis.controls.c15_random_vectors import random_among_random
from analysis.steering.table import read_pairs

NOMINAL = 0.025


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
