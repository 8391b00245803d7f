"""How long do the intervals of a large study take? f, ρ₁ and both entropies of 33 sites under many weightings of the prompts.

    python benchmarks/resamples.py [--quick] [--sites 33] [--rows 512] [--width 4096] [--weightings 1000]

Each site has its Gram matrix made of float32 rows, as a snapshot holds them, and every figure by way of it.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file can be run from anywhere
import tiltmeter.threads  # noqa: F401  before torch, which reads its threads' settings as it is imported

# isort: split
import torch

from benchmarks.common import Spread
from tiltmeter.geometry.consistency import shift_shares_of_gram
from tiltmeter.geometry.spectra import entropies_of_gram, leading_energies_of_gram, smaller_gram


def seconds_of_site(rows: torch.Tensor, weights: torch.Tensor) -> float:
    """Time for one site."""
    started = time.perf_counter()
    gram = smaller_gram(rows)
    for figures in (shift_shares_of_gram(gram), leading_energies_of_gram(gram), entropies_of_gram(gram)):
        assert figures(weights).isfinite().all()
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    """Print the time a site, and of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("sites", 33), ("rows", 512), ("width", 4096), ("weightings", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--quick", action="store_true", help="three sites")
    options = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(options.rows, options.width, generator=generator) + torch.randn(
        options.width, generator=generator
    )
    weights = torch.rand(options.weightings, options.rows, generator=generator, dtype=torch.float64)
    times = [seconds_of_site(rows, weights) for _ in range(3 if options.quick else options.sites)]
    spread = Spread.of(times)
    total = sum(times) * options.sites / len(times)
    print(
        f"{options.weightings} weightings of {options.rows} rows of width {options.width}, f, ρ₁, σ₂/σ₁ and two entropies: "
        f"{spread.median:.2f} s a site ({spread.min:.2f} … {spread.max:.2f}), {total:.0f} s for {options.sites} sites"
    )
    print(f"RESULT resample_seconds={total:.1f}")


if __name__ == "__main__":
    main()
