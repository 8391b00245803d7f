"""How much memory and time do two large models' weights take? Every figure of every matrix of a 7B-shaped pair on disk.

    python benchmarks/weights.py [--quick] [--layers 2] [--width 4096] [--hidden 11008]

Layers of Llama-2-7B's shape in bfloat16; of the second model one weight in ten has another value. Files are written first, outside
the clock, a layer each; seconds are those of one GB of one of the two models.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file can be run from anywhere
from benchmarks import common  # before torch, which reads its threads' settings as it is imported

# isort: split
import torch
from safetensors.torch import save_file

from tiltmeter.weights.stored import StoredWeights, weight_changes


def write_pair(folder: Path, *, n_layers: int, width: int, hidden: int, kinds: Sequence[str]) -> float:
    """Write both models; returns the bytes of one."""
    n_bytes, generator = 0.0, torch.Generator().manual_seed(0)
    shapes = {name: (hidden, width) if name in ("gate", "up") else (width, width) for name in kinds}
    shapes |= {"down": (width, hidden)} if "down" in kinds else {}
    for name in ("base", "aligned"):
        (folder / name).mkdir()
    for layer in range(n_layers):
        base, aligned = {}, {}
        for kind, shape in shapes.items():
            key = f"model.layers.{layer}.{kind}.weight"
            own = 0.02 * torch.randn(shape, generator=generator)
            moved = torch.rand(shape, generator=generator) < 0.1
            base[key] = own.bfloat16()
            aligned[key] = torch.where(moved, own * 1.05, own).bfloat16()
            n_bytes += 2 * own.numel()
        save_file(base, folder / "base" / f"model-{layer}.safetensors")
        save_file(aligned, folder / "aligned" / f"model-{layer}.safetensors")
    return n_bytes


def main(argv: Sequence[str] | None = None) -> None:
    """Print peak memory and seconds per GB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 2), ("width", 4096), ("hidden", 11008)):
        parser.add_argument(f"--{name}", type=common.positive, default=default)
    parser.add_argument("--quick", action="store_true", help="one square and one wide matrix")
    options = parser.parse_args(argv)
    kinds = ("q", "up") if options.quick else ("q", "k", "v", "o", "gate", "up", "down")
    place = common.machine(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        shape = {"width": options.width, "hidden": options.hidden, "kinds": kinds}
        size = write_pair(Path(folder), n_layers=1 if options.quick else options.layers, **shape) / 1e9
        common.forget_peak_memory()
        started, processor = time.perf_counter(), time.process_time()
        base, aligned = (StoredWeights(Path(folder) / name) for name in ("base", "aligned"))
        found = dict(weight_changes(base, aligned))
        seconds, busy = time.perf_counter() - started, time.process_time() - processor
    memory = common.peak_memory_mb("cpu") / 1000
    shares = [change.changed_share for change in found.values()]
    print(
        f"{place}\n{len(found)} matrices, {size:.2f} GB a model, {min(shares):.3f} to {max(shares):.3f} of entries changed: "
        f"{seconds:.1f} s ({busy:.1f} s of CPU time), peak memory {memory:.2f} GB"
    )
    common.print_result(
        weights_peak_gb=memory, weights_seconds_per_gb=seconds / size, weights_cpu_seconds_per_gb=busy / size
    )


if __name__ == "__main__":
    main()
