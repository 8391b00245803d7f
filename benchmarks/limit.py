"""What share of the machine's own matrix-product rate does a DPO step reach on useful tokens, and where is the rest?

    python benchmarks/limit.py [--quick] [--device cuda --model-shape llama2_7b|qwen_0.5b]

Useful are the operations that no exact DPO step can do without: each prompt once, no padding, attention only where a
token may look, the head on completion tokens alone, nothing computed twice. Time is that of whole optimizer steps in
Lightning's Trainer, data and log line included.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file can be run from anywhere
from tiltmeter.threads import usable_cores  # before torch, which reads its threads' settings as it is imported

# isort: split
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from benchmarks import common
from benchmarks.common import Spread
from benchmarks.matmul_rate import best_rates, matmul_rates
from benchmarks.side_tiltmeter import fit, make_data, make_module, padding_share, quiet
from benchmarks.workload import SHAPES, Settings, load_pairs, n_useful, prepare, random_order
from datamodules.step_dataset import StepDataset
from lightning_modules.dpo import DPOModule
from tiltmeter.models.layers import decoder_blocks, unembedding
from tiltmeter.pairs import log_probs
from tiltmeter.pairs.batch import TokenizedPair

WARMUP_STEPS = 2
KINDS = {
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "matrix products": ("mm", "linear", "gemm"),
    "optimizer and clipping": ("_foreach", "fused_adam", "linalg_vector_norm"),
    "copies, gathers, fills": (
        "copy",
        "cat",
        "index",
        "gather",
        "scatter",
        "fill",
        "zero",
        "clone",
        "contiguous",
        "to",
    ),
}
"""Kind of operator → what its name contains; all others are element-wise operations and reductions."""


def useful_flops(model: PreTrainedModel, pairs: Sequence[TokenizedPair], *, frozen_embeddings: bool) -> float:
    """Floating-point operations that one DPO step on some pairs can't do without.

    Forward 2 per weight and token, 4 × width per layer for each (query, visible key), and the head on completion tokens;
    backward twice that, but a frozen unembedding needs no weight gradient. Embeddings, norms and the optimizer count 0.
    """
    blocks, config = decoder_blocks(model), model.config
    n_weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = head_dim * config.num_attention_heads
    n_looks = n_responses = 0
    for prompt, chosen, rejected in ([len(ids) for ids in pair] for pair in pairs):
        n_looks += prompt * (prompt + 1) // 2
        n_looks += sum(n * prompt + n * (n + 1) // 2 for n in (chosen, rejected))
        n_responses += chosen + rejected
    forward = 2.0 * n_weights * n_useful(pairs) + 4.0 * width * len(blocks) * n_looks
    head = 2.0 * unembedding(model).weight.numel() * n_responses
    return 3 * forward + (2 if frozen_embeddings else 3) * head


class PhaseTimer:
    """Seconds by phase; a phase inside another is taken out of the outer one."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._synchronize = synchronize
        self._inside: list[float] = []
        self._undo = ExitStack()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside to one phase."""
        self._synchronize()
        started = time.perf_counter()
        self._inside.append(0.0)
        yield
        self._synchronize()
        seconds = time.perf_counter() - started
        self.seconds[name] += seconds - self._inside.pop()
        if self._inside:
            self._inside[-1] += seconds

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Count every call of a function to a phase."""
        function = getattr(owner, attribute)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **options)

        self._undo.callback(setattr, owner, attribute, function)
        setattr(owner, attribute, timed)

    @contextmanager
    def watching(self, module: DPOModule) -> Iterator[None]:
        """Stand around the parts of a step."""
        with self._undo:
            self.watch(StepDataset, "__getitem__", "collate")
            self.watch(log_probs, "_model_mask", "mask")
            self.watch(log_probs, "target_hidden_states", "forward: blocks")
            self.watch(torch.nn.functional, "scaled_dot_product_attention", "forward: attention")
            self.watch(log_probs, "token_log_probs", "forward: head")
            self.watch(log_probs._TokenLogProbs, "backward", "backward: head")
            self.watch(module, "manual_backward", "backward: rest")
            self.watch(module, "_clip_gradients", "optimizer")
            yield


class StepClock(Callback):
    """Seconds of every optimizer step, from one start to the next; phases count from the end of the warm-up."""

    def __init__(self, timer: PhaseTimer, synchronize: Callable[[], None]) -> None:
        self.timer = timer
        self.starts: list[float] = []
        self._synchronize = synchronize

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        self.timer.watch(optimizer, "step", "optimizer")
        self.timer.watch(optimizer, "zero_grad", "optimizer")

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if len(self.starts) == WARMUP_STEPS:
            self.timer.seconds.clear()
        self._tick()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._tick()

    def seconds(self) -> list[float]:
        """Of the steps after the warm-up."""
        return [end - start for start, end in itertools.pairwise(self.starts)][WARMUP_STEPS:]

    def _tick(self) -> None:
        self._synchronize()
        self.starts.append(time.perf_counter())


def report_phases(timer: PhaseTimer, step_seconds: Sequence[float]) -> None:
    """Print where the time of the measured steps went."""
    total = sum(step_seconds)
    phases = dict(sorted(timer.seconds.items(), key=lambda item: -item[1]))
    phases["logging and everything else"] = total - sum(phases.values())
    rows = [[name, f"{1000 * s / len(step_seconds):.1f}", f"{s / total:.1%}"] for name, s in phases.items()]
    common.print_table("Where a step's time goes", ["phase", "ms per step", "share"], rows)


def kind_of(operator: str) -> str:
    """Which row of the operator table an operator belongs to."""
    name = operator.rpartition("::")[2].lower()
    found = (kind for kind, parts in KINDS.items() if any(part in name for part in parts))
    return next(found, "element-wise operations and reductions")


def report_operators(settings: Settings) -> None:
    """Print the same by kind of operator, forward and backward together, over some steps under torch's profiler."""
    data = make_data(settings)
    activities = [ProfilerActivity.CUDA if settings.device == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        fit(settings, data, make_module(settings, data), [])
    sums: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        own = event.self_device_time_total if settings.device == "cuda" else event.self_cpu_time_total
        if settings.device == "cuda" or event.key.startswith(("aten::", "mkldnn::", "onednn::")):
            sums[kind_of(event.key)] += own
    rows = [[name, f"{us / sum(sums.values()):.1%}"] for name, us in sorted(sums.items(), key=lambda item: -item[1])]
    common.print_table("The same by kind of operator (whole fit, reference included)", ["operators", "share"], rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    number = common.positive
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer steps and repeats")
    parser.add_argument(
        "--data", help="HH file or folder; default: harmless-base below $TILTMETER_SHARED, else a stand-in"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: bfloat16 weights")
    parser.add_argument("--model-shape", choices=SHAPES, default="tiny", help="random weights of this shape")
    parser.add_argument("--pairs-per-step", type=number, default=32, help="pairs of an optimizer step")
    parser.add_argument("--tokens-per-micro-batch", type=number, help="of a forward pass; default: the data module's")
    parser.add_argument("--steps", type=number, help="measured optimizer steps (default: 12; quick: 3)")
    parser.add_argument("--threads", type=number, default=usable_cores(), help="CPU threads")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (3 if options.quick else 12)
    return options


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure the machine, then the step, then the machine again."""
    common.check_device(options.device)
    torch.set_num_threads(options.threads)
    settings = Settings(
        folder=str(folder), variant="full", shape=options.model_shape, device=options.device,
        pairs_per_step=options.pairs_per_step, pairs_per_micro_batch=8,
        tokens_per_micro_batch=options.tokens_per_micro_batch, turns=(WARMUP_STEPS, options.steps), n_measured=1,
    )  # fmt: skip
    description = prepare(folder, options.data, settings.n_steps * settings.pairs_per_step)
    print(f"Machine: {common.machine(options.threads)}\nData: {description}")
    patience = 0.3 if options.quick else 1.0
    before = matmul_rates(options.device, patience)
    data = make_data(settings)
    module = make_module(settings, data)
    synchronize = common.synchronizer(options.device)
    timer = PhaseTimer(synchronize)
    clock = StepClock(timer, synchronize)
    with timer.watching(module):
        fit(settings, data, module, [clock])
    rates = best_rates(before, matmul_rates(options.device, patience), options.device)
    shares = report_share(settings, module, clock.seconds(), rates, padding_share(settings, data))
    report_phases(timer, clock.seconds())
    report_operators(settings.changed(turns=(1, 2)))
    common.print_result(matmul_share=min(shares.values()), share_of_torch_mm=shares["torch.mm"])


def report_share(
    settings: Settings, module: DPOModule, seconds: Sequence[float], rates: dict[str, float], padding: float
) -> dict[str, float]:
    """Print the share of the machine's rate that the steps reached; returns the median for each library."""
    pairs = load_pairs(settings.folder)
    order, per_step = random_order(settings, len(pairs)), settings.pairs_per_step
    model, frozen = module.trained_policy.model, settings.model_shape.freeze_embeddings
    flops = []
    for step in range(WARMUP_STEPS, settings.n_steps):
        rows = order[step * per_step : (step + 1) * per_step]
        flops.append(useful_flops(model, [pairs[row] for row in rows], frozen_embeddings=frozen))
    speeds = [n / duration for n, duration in zip(flops, seconds, strict=True)]
    shares = {name: Spread.of([speed / rate for speed in speeds]) for name, rate in rates.items()}
    rows_of_table = [
        ["useful GFLOP a step", str(Spread.of([n / 1e9 for n in flops]))],
        ["seconds a step", str(Spread.of(seconds))],
        ["useful GFLOP/s", str(Spread.of([speed / 1e9 for speed in speeds]))],
        *([f"share of the best rate of {name}, {rates[name] / 1e9:,.0f} GFLOP/s", str(shares[name])] for name in rates),
        ["padding among the computed tokens", f"{padding:.1%}"],
    ]
    common.print_table("Share of the machine's matrix-product rate", ["", "min · median · max"], rows_of_table)
    return {name: share.median for name, share in shares.items()}


def main() -> None:
    options = parse()
    with common.clear_errors(), tempfile.TemporaryDirectory() as folder:
        quiet()
        run(options, Path(folder))


if __name__ == "__main__":
    main()
