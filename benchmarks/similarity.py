"""How long does likeness of two large models' states take? Every measure and the map of sites, as the report makes them.

    python benchmarks/similarity.py [--quick] [--sites 33] [--prompts 2000] [--width 4096]

Rows are random, float32 as a snapshot holds them; one site's rows are made at a time, outside the clock.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file can be run from anywhere
from benchmarks import common  # before torch, which reads its threads' settings as it is imported

# isort: split
import torch

from analysis.belief.similarity import of_position
from tiltmeter.models.layers import layer_site
from tiltmeter.pairs.batch import PROMPT
from tiltmeter.states.capture import HiddenStates, ReadPoint
from tiltmeter.states.state_pair import StatePair


def main(argv: Sequence[str] | None = None) -> None:
    """Print the time of all sites at one position, and the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("sites", 33), ("prompts", 2000), ("width", 4096)):
        parser.add_argument(f"--{name}", type=common.positive, default=default)
    parser.add_argument("--quick", action="store_true", help="three sites")
    options = parser.parse_args(argv)
    n_sites = min(3, options.sites) if options.quick else options.sites
    place = common.machine(torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(options.prompts), torch.full((options.prompts,), PROMPT)
    base, policy = {}, {}
    first = torch.randn(options.prompts, options.width, generator=generator)
    second = first + 0.3 * torch.randn(options.prompts, options.width, generator=generator)
    for i in range(n_sites):  # the same rows at every site: nothing here depends on their values
        point = ReadPoint(layer_site(i), "prompt_last")
        base[point], policy[point] = HiddenStates(first, *labels), HiddenStates(second, *labels)
    before = common.resident_memory_mb()
    common.forget_peak_memory()
    started, processor = time.perf_counter(), time.process_time()
    table, cells = of_position(StatePair(base, policy))
    seconds, busy = time.perf_counter() - started, time.process_time() - processor
    assert table["cka"].notna().all()
    assert len(cells) == n_sites**2
    whole = seconds * options.sites / n_sites
    memory = common.peak_memory_mb("cpu") - before
    print(
        f"{place}\n{n_sites} sites of {options.prompts} prompts and width {options.width}, raw and without v*: "
        f"{seconds:.1f} s ({busy:.1f} s of CPU time), {whole:.0f} s for {options.sites} sites; {memory:,.0f} MB beside the rows"
    )
    of_cpu = busy * options.sites / n_sites
    common.print_result(similarity_seconds=whole, similarity_cpu_seconds=of_cpu, similarity_memory_mb=memory)


if __name__ == "__main__":
    main()
