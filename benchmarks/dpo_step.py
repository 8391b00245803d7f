"""How fast is a DPO step? tiltmeter against TRL, and against itself with each of its savings switched off.

    python benchmarks/dpo_step.py [--quick] [--device cuda --model-shape llama2_7b|qwen_0.5b]

Every side trains the same model from the same weights on the same token ids with the same optimizer, in a process of its
own, through its own trainer with a log line every step. The sides take turns, so that a slow minute of the machine
hits all of them; a ratio compares two sides within one round of turns. Reference log-probs are computed before the
first turn and are in no figure.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file can be run from anywhere
from benchmarks import common
from benchmarks.common import SideResult, Spread, Worker
from benchmarks.workload import (
    CURVE_STEPS,
    HEAD_TOKENS,
    HEAD_WIDTH,
    SHAPES,
    Settings,
    load_pairs,
    n_useful,
    prepare,
    random_order,
    sorted_order,
)
from tiltmeter.errors import UserError
from tiltmeter.models.cpu_linear import onednn_is_faster
from tiltmeter.pairs.log_probs import default_chunk_tokens
from tiltmeter.threads import usable_cores

OURS, TRL, TRL_SORTED = "tiltmeter", "TRL", "TRL, pairs sorted by length"
WARMUP_STEPS = 1


@dataclass(frozen=True)
class Side:
    """One row of the table."""

    module: str
    variant: str


SIDES = {
    OURS: Side("benchmarks.side_tiltmeter", "full"),
    TRL: Side("benchmarks.side_trl", "trl"),
    TRL_SORTED: Side("benchmarks.side_trl", "trl_sorted"),
    "without shared prefix (layout=concatenated)": Side("benchmarks.side_tiltmeter", "concatenated"),
    "without packing (rows grouped by length)": Side("benchmarks.side_tiltmeter", "padded"),
    "without packing, and without grouping by length": Side("benchmarks.side_tiltmeter", "ungrouped"),
    "without oneDNN (PyTorch's own float32 products)": Side("benchmarks.side_tiltmeter", "torch_products"),
    "without chunked completion-only head": Side("benchmarks.side_tiltmeter", "all_logits"),
    "without cached reference": Side("benchmarks.side_tiltmeter", "second_model"),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; what --quick changes is only a default."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    number = common.positive
    parser.add_argument("--quick", action="store_true", help="under a minute: --main-sides, small steps, a small head")
    parser.add_argument(
        "--data", help="HH file or folder; default: harmless-base below $TILTMETER_SHARED, else a stand-in"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: bfloat16 weights")
    parser.add_argument("--model-shape", choices=SHAPES, default="tiny", help="random weights of this shape")
    parser.add_argument("--pairs-per-step", type=number, help="pairs of an optimizer step (default: 32; quick: 8)")
    parser.add_argument("--micro-batch", type=number, default=8, help="TRL's pairs per forward pass")
    parser.add_argument("--tokens-per-micro-batch", type=number, help="tiltmeter's; default: its data module's")
    parser.add_argument("--steps", type=number, help="optimizer steps of a turn (default: 2; quick: 1)")
    parser.add_argument("--rounds", type=number, help="turns of each side (default: 4; quick: 2)")
    parser.add_argument("--threads", type=number, default=usable_cores(), help="CPU threads of a side")
    parser.add_argument("--lora-rank", type=number, help="train adapters on every linear map instead of the weights")
    parser.add_argument("--main-sides", action="store_true", help="tiltmeter and TRL alone, no saving switched off")
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="one process in memory at a time (llama2_7b: always)"
    )
    options = parser.parse_args(arguments)
    for name, usual, quick in (("pairs_per_step", 32, 8), ("steps", 2, 1), ("rounds", 4, 2)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
    options.main_sides |= options.quick
    options.one_at_a_time |= options.model_shape == "llama2_7b"
    return options


def check(options: argparse.Namespace) -> None:
    """Refuse what can't be compared."""
    common.check_device(options.device)
    if options.pairs_per_step % options.micro_batch:
        raise UserError(
            f"--pairs-per-step: TRL's mean over micro-batches is the mean over pairs only for a multiple of "
            f"--micro-batch={options.micro_batch}, got {options.pairs_per_step}"
        )


def settings_of(name: str, options: argparse.Namespace, folder: Path) -> Settings:
    """What a side is told: a warm-up, the measured turns, and for the two of the loss curves its remaining steps."""
    turns = [WARMUP_STEPS, *[options.steps] * options.rounds]
    rest = CURVE_STEPS - sum(turns)
    if name in (OURS, TRL) and rest > 0 and not options.quick:
        turns.append(rest)
    return Settings(
        folder=str(folder),
        variant=SIDES[name].variant,
        shape=options.model_shape,
        device=options.device,
        pairs_per_step=options.pairs_per_step,
        pairs_per_micro_batch=options.micro_batch,
        tokens_per_micro_batch=options.tokens_per_micro_batch,
        turns=tuple(turns),
        n_measured=options.rounds,
        lora_rank=options.lora_rank,
    )


def run_sides(
    names: Sequence[str], settings: Mapping[str, Settings], options: argparse.Namespace
) -> dict[str, SideResult]:
    """Train all sides, interleaved; or one after the other where memory holds only one."""
    results: dict[str, SideResult] = {}
    groups = [[name] for name in names] if options.one_at_a_time else [list(names)]
    for group in groups:
        common.progress(f"starting: {', '.join(group)}")
        workers = [
            Worker(
                name,
                SIDES[name].module,
                settings[name].as_json(),
                log=Path(settings[name].folder) / f"{SIDES[name].variant}.log",
                threads=options.threads,
            )
            for name in group
        ]
        results |= common.take_turns(workers, {name: len(settings[name].turns) for name in group})
    return results


def rates(name: str, result: SideResult, settings: Settings) -> tuple[list[float], list[float]]:
    """Pairs and useful tokens per second of each measured turn."""
    pairs = load_pairs(settings.folder)
    order = sorted_order(settings, pairs) if name == TRL_SORTED else random_order(settings, len(pairs))
    pair_rates, token_rates = [], []
    at = settings.turns[0] * settings.pairs_per_step
    for turn in range(1, 1 + settings.n_measured):
        rows = order[at : at + settings.turns[turn] * settings.pairs_per_step]
        pair_rates.append(len(rows) / result.seconds[turn])
        token_rates.append(n_useful([pairs[row] for row in rows]) / result.seconds[turn])
        at += len(rows)
    return pair_rates, token_rates


def report_speed(results: Mapping[str, SideResult], settings: Mapping[str, Settings]) -> dict[str, Spread]:
    """Print the main table; returns how many times faster tiltmeter is than each side."""
    measured = {name: rates(name, result, settings[name]) for name, result in results.items()}
    ratios, rows = {}, []
    for name, result in results.items():
        pair_rates, token_rates = measured[name]
        ratios[name] = Spread.of([a / b for a, b in zip(measured[OURS][0], pair_rates, strict=True)])
        summary = result.summary
        losses = [
            f"{summary['losses'][i]:.6f}" for i in (0, sum(settings[name].turns[: 1 + settings[name].n_measured]) - 1)
        ]
        figures = [str(Spread.of(pair_rates)), str(ratios[name]), f"{Spread.of(token_rates).median:,.0f}"]
        rows.append([name, *figures, f"{summary['peak_mb']:,.0f}", f"{summary['padding_share']:.1%}", *losses])
    head = [
        "side",
        "pairs/s",
        "tiltmeter is × faster",
        "useful tokens/s",
        "peak MB",
        "padding",
        "first loss",
        "last loss",
    ]
    common.print_table("Speed (min · median · max over rounds; peak MB of the whole process)", head, rows)
    return ratios


def report_curves(results: Mapping[str, SideResult]) -> float:
    """Print how far the loss curves are apart; returns the largest difference."""
    ours, theirs = (results[name].summary["losses"] for name in (OURS, TRL))
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    rows = [[str(i + 1), f"{ours[i]:.7f}", f"{theirs[i]:.7f}", f"{differences[i]:.1e}"] for i in range(len(ours))]
    common.print_table("Loss at the same batches from the same weights", ["step", OURS, TRL, "difference"], rows)
    return max(differences)


def head_memory(options: argparse.Namespace, folder: Path) -> float:
    """Print what the head needs in memory; returns the share of the default chunks in that of materialised logits."""
    shared = {"device": options.device, "n_tokens": HEAD_TOKENS, "width": HEAD_WIDTH}
    shared["vocab_size"] = 2**14 if options.quick else 2**17
    usual = default_chunk_tokens(shared["vocab_size"])
    logits, chunks = "materialised logits", f"tiltmeter, chunks of {usual:,} (default)"
    sides: dict[str, int | None] = {logits: None, chunks: usual}
    if not options.quick:
        sides["tiltmeter, chunks of 1,024"] = 1024
    workers = [
        Worker(
            name,
            "benchmarks.head_memory",
            shared | {"chunk_tokens": chunk_tokens},
            log=folder / f"head_{chunk_tokens}.log",
            threads=options.threads,
        )
        for name, chunk_tokens in sides.items()
    ]
    found = common.take_turns(workers, dict.fromkeys(sides, 2))
    peaks = {name: float(result.summary["peak_mb"]) for name, result in found.items()}
    rows = []
    for name, result in found.items():
        figures = [f"{peaks[name]:,.0f}", f"{peaks[name] / peaks[logits]:.3f}", f"{result.seconds[1]:.2f}"]
        rows.append([name, *figures, f"{result.summary['log_prob']:.8g}"])
    title = f"Head, forward and backward, {shared['n_tokens']:,} completion tokens × {shared['vocab_size']:,} words"
    common.print_table(title, ["head", "MB above its inputs", "share", "seconds", "sum of log-probs"], rows)
    return peaks[chunks] / peaks[logits]


def run(options: argparse.Namespace, folder: Path) -> None:
    """The whole comparison."""
    check(options)
    names = [OURS, TRL, TRL_SORTED] if options.main_sides else list(SIDES)
    if options.device == "cuda" or not onednn_is_faster():
        names = [name for name in names if SIDES[name].variant != "torch_products"]  # the same as tiltmeter there
    settings = {name: settings_of(name, options, folder) for name in names}
    n_pairs = max(s.n_steps for s in settings.values()) * options.pairs_per_step
    machine = common.machine(options.threads)
    data = prepare(folder, options.data, n_pairs)
    results = run_sides(names, settings, options)
    summary = results[OURS].summary
    print(
        f"Machine: {machine}\nData: {data}\nModel: {options.model_shape}, {summary['n_parameters'] / 1e6:.1f} M parameters, "
        f"{'float32' if options.device == 'cpu' else 'bfloat16'}"
        f"{f', LoRA of rank {options.lora_rank}' if options.lora_rank else ''}; {options.pairs_per_step} pairs an optimizer step; "
        f"TRL in micro-batches of {options.micro_batch}; tiltmeter of {summary['tokens_per_micro_batch']:,} tokens; "
        f"{options.rounds} rounds of {options.steps} step(s), "
        f"{'one side after the other' if options.one_at_a_time else 'interleaved'}"
    )
    ratios = report_speed(results, settings)
    difference = report_curves(results)
    head_ratio = head_memory(options, folder)
    common.print_result(
        speedup_vs_trl=ratios[TRL].median,
        speedup_vs_trl_sorted=ratios[TRL_SORTED].median,
        padding_share=summary["padding_share"],
        max_loss_difference=difference,
        head_memory_ratio=head_ratio,
    )


def main() -> None:
    options = parse()
    with common.clear_errors(), tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder))


if __name__ == "__main__":
    main()
