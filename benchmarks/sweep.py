"""How fast is a sweep over steering strengths, against one run for each strength, and does the model say the same?

    python benchmarks/sweep.py [--quick]

All sides run in this process on the same model, prompts and vector and take turns. The peer is a loop over strengths with the
steering-vectors package as people run it: its hook on the model, then ``model.generate`` or one forward pass. The package asks
for transformers < 5 and uses nothing that has changed since, so it is installed without its dependencies into a folder of this
benchmark's own. Where it can't be had, a hook of the same meaning stands in, and the output says so.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file can be run from anywhere
from tiltmeter.threads import usable_cores  # before torch, which reads its threads' settings as it is imported

# isort: split
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from benchmarks import common, workload
from benchmarks.common import Spread
from tiltmeter.models.cpu_linear import fast_linear
from tiltmeter.models.generation import Decoding
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM, layer_site
from tiltmeter.pairs.batch import PreferenceBatch, TokenizedPair, collate_pairs
from tiltmeter.pairs.branching import generate_branches
from tiltmeter.pairs.log_probs import model_inputs, run_backbone
from tiltmeter.steering.sweep_logits import steered_logits, steered_sums, sweep_cost

PACKAGE = "steering-vectors==0.12.2"
SMALL = workload.Shape(
    {"model_type": "llama", "hidden_size": 192, "intermediate_size": 528, "num_hidden_layers": 4}
    | {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    learning_rate=0.0,
)
"""conf/model/small_llama.yaml."""
LONGEST, ROWS_PER_BATCH = 128, 16
PAIRS_TO_CHOOSE_FROM = 700
Steered = Callable[[float], AbstractContextManager[Any]]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    number = common.positive
    parser.add_argument("--quick", action="store_true", help="under a minute: 16 prompts, one round")
    parser.add_argument("--data", help="HH file or folder; default: below $TILTMETER_SHARED, else a stand-in")
    parser.add_argument("--prompts", type=number, default=64)
    parser.add_argument("--strengths", type=number, default=21, help="λ, evenly from −2 to 2")
    parser.add_argument("--new-tokens", type=number, default=32)
    parser.add_argument("--layer", type=int, default=1, help="steered block, counted from 0")
    parser.add_argument("--rounds", type=number, default=3)
    parser.add_argument("--threads", type=number, default=usable_cores(), help="CPU threads")
    parser.add_argument(
        "--peer", choices=("package", "hook"), default="package", help="hook: the stand-in, without network"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.prompts, options.rounds = min(options.prompts, 16), 1
    return options


@dataclass
class Work:
    """What every side is given."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pairs: list[TokenizedPair]
    batches: list[PreferenceBatch]
    """Prompts with their chosen responses."""
    vector: Tensor
    strengths: Tensor
    new_tokens: int
    layer: int

    @property
    def shifts(self) -> Tensor:
        return self.strengths[:, None] * self.vector

    @property
    def at_layer(self) -> str:
        return layer_site(self.layer)


def prepare(options: argparse.Namespace, folder: Path) -> tuple[Work, str]:
    described = workload.prepare(folder, options.data, PAIRS_TO_CHOOSE_FROM)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    pairs = [pair for pair in workload.load_pairs(str(folder)) if len(pair.prompt_ids) <= LONGEST][: options.prompts]
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = workload.build_model(SMALL, len(tokenizer), special, "cpu").eval()
    by_length = sorted(pairs, key=lambda pair: len(pair.prompt_ids) + len(pair.chosen_ids))
    batches = [
        collate_pairs(some, pair_index=range(len(some)), layout="chosen_only")
        for some in (by_length[at : at + ROWS_PER_BATCH] for at in range(0, len(pairs), ROWS_PER_BATCH))
    ]
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    strengths = torch.linspace(-2, 2, options.strengths)
    work = Work(model, tokenizer, pairs, batches, vector, strengths, options.new_tokens, options.layer)
    return work, described


def find_peer(work: Work, folder: Path, peer: str) -> tuple[str, Callable[[str, bool], Steered]]:
    """The peer in words; for a module's name and whether only new tokens are meant, what puts its hook on for a strength."""

    def hook(module: str, new: bool) -> Steered:
        return lambda strength: stand_in(work, module, new, strength)

    if peer == "hook":
        return f"a hook and model.generate in place of {PACKAGE}, as asked", hook
    target = folder / "peer"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        name = f"a hook and model.generate in place of {PACKAGE}, which can't be installed ({reason[:100]})"
        return name, hook
    sys.path.insert(0, str(target))
    from steering_vectors import SteeringVector

    def new_only(hidden: Tensor, shift: Tensor) -> Tensor:
        return shift if hidden.shape[1] == 1 else torch.zeros_like(shift)

    def steered(module: str, new: bool) -> Steered:
        config: Any = {"decoder_block": lambda _model, _number: module}
        vector = SteeringVector({0: work.vector})
        return lambda strength: vector.apply(
            work.model, layer_config=config, operator=new_only if new else None, multiplier=strength
        )

    return f"a loop with {PACKAGE}", steered


@contextmanager
def stand_in(work: Work, module: str, new: bool, strength: float) -> Iterator[None]:
    """What the package does, in a few lines."""

    def moved(_module: Any, _inputs: Any, hidden: Tensor) -> Tensor | None:
        return None if new and hidden.shape[1] > 1 else hidden + strength * work.vector

    handle = work.model.get_submodule(module).register_forward_hook(moved)
    try:
        yield
    finally:
        handle.remove()


def generate_ours(work: Work) -> list[list[list[int]]]:
    prompts = [list(pair.prompt_ids) for pair in work.pairs]
    decoding = Decoding(max_new_tokens=work.new_tokens)
    said = generate_branches(work.model, work.tokenizer, prompts, decoding, site=work.at_layer, shifts=work.shifts)
    return [[list(samples[0].ids) for samples in branch] for branch in said]


@torch.no_grad()
def generate_theirs(work: Work, steered: Steered) -> list[list[list[int]]]:
    end, pad = work.tokenizer.eos_token_id, work.tokenizer.pad_token_id
    width = max(len(pair.prompt_ids) for pair in work.pairs)
    rows = [[pad] * (width - len(pair.prompt_ids)) + list(pair.prompt_ids) for pair in work.pairs]
    mask = torch.tensor([[0] * (width - len(p.prompt_ids)) + [1] * len(p.prompt_ids) for p in work.pairs])
    said = []
    for strength in work.strengths.tolist():
        with steered(strength):
            out = work.model.generate(  # type: ignore[operator]
                torch.tensor(rows),
                attention_mask=mask,
                max_new_tokens=work.new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=pad,
                eos_token_id=end,
            )
        new = out[:, width:].tolist()
        said.append([ids[: ids.index(end) + 1] if end in ids else ids for ids in new])
    return said


def score_ours(work: Work, site: str) -> Tensor:
    found = [
        part.log_probs(batch)
        for batch in work.batches
        for part in steered_logits(work.model, batch, site=site, shifts=work.shifts)
    ]
    return torch.cat(found, dim=1)


N_RANDOM, N_RANDOM_BEFORE = 99, 5
"""Random vectors after the final norm by default, and how many there were when each was scored like any other vector."""


def random_vectors(work: Work, n: int) -> Tensor:
    """[n, d_model], of the vector's norm."""
    drawn = torch.randn(n, len(work.vector), generator=torch.Generator().manual_seed(1))
    return drawn / drawn.norm(dim=1, keepdim=True) * work.vector.norm()


def one_kl(goal: Tensor, steered: Tensor) -> Tensor:
    """KL(goal ‖ steered) at every target, nats, in float64."""
    log_goal = goal.double().log_softmax(-1)
    return (log_goal.exp() * (log_goal - steered.double().log_softmax(-1))).sum(-1)


@torch.no_grad()
def score_random_at_once(work: Work) -> Tensor:
    """KL from the unsteered model under every random vector and strength: [vector × strength, target]."""
    shifts = (random_vectors(work, N_RANDOM)[:, None] * work.strengths[:, None]).flatten(0, 1)
    found = []
    for batch in work.batches:
        unsteered = plain_logits(work, batch)
        sums = steered_sums(work.model, batch, site=FINAL_POST_NORM, shifts=shifts, goal_logits=unsteered.__getitem__)
        found += [part.kl_from_start for part in sums]
    return torch.cat(found, dim=1)


@torch.no_grad()
def score_random_one_by_one(work: Work) -> Tensor:
    """The same for a few of them, from everybody's logits."""
    found = []
    for vector in random_vectors(work, N_RANDOM)[:N_RANDOM_BEFORE]:
        parts = []
        for batch in work.batches:
            unsteered = plain_logits(work, batch)
            for part in steered_logits(
                work.model, batch, site=FINAL_POST_NORM, shifts=work.strengths[:, None] * vector
            ):
                parts.append(torch.stack([one_kl(unsteered[part.targets], logits) for logits in part.logits]))
        found.append(torch.cat(parts, dim=1))
    return torch.cat(found)


def plain_logits(work: Work, batch: PreferenceBatch) -> Tensor:
    logits: Tensor = work.model(**model_inputs(work.model, batch)).logits
    return logits.flatten(0, 1)[batch.target_rows]


@torch.no_grad()
def score_theirs(work: Work, steered: Steered) -> Tensor:
    """One forward pass of the whole model for each strength; log-probs at the responses."""
    found = []
    for strength in work.strengths.tolist():
        with steered(strength):
            parts = []
            for batch in work.batches:
                logits = work.model(**model_inputs(work.model, batch)).logits.flatten(0, 1)[batch.target_rows]
                parts.append(logits.log_softmax(-1).gather(-1, batch.target_ids[:, None])[:, 0])
            found.append(torch.cat(parts))
    return torch.stack(found)


@torch.no_grad()
def one_pass(work: Work) -> None:
    with fast_linear(work.model):
        for batch in work.batches:
            run_backbone(work.model, batch)


def run(options: argparse.Namespace, folder: Path) -> None:
    work, described = prepare(options, folder)
    peer, hook = find_peer(work, folder, options.peer)
    block = f"model.layers.{work.layer}"
    n_targets = sum(len(batch.target_ids) for batch in work.batches)
    print(f"Machine: {common.machine(options.threads)}")
    print(f"Data: {len(work.pairs)} prompts of at most {LONGEST} tokens, {n_targets} response tokens, from {described}")
    print(f"Model: a random Llama of 4 blocks, width 192, float32; {len(work.strengths)} strengths, block {work.layer}")
    print(f"Peer: {peer}")
    sides: dict[str, Callable[[Work], Any]] = {
        "generation": generate_ours,
        "generation, peer": partial(generate_theirs, steered=hook(block, True)),
        "post-norm": partial(score_ours, site=FINAL_POST_NORM),
        "post-norm, peer": partial(score_theirs, steered=hook("model.norm", False)),
        "pre-norm": partial(score_ours, site=FINAL_PRE_NORM),
        "block": partial(score_ours, site=work.at_layer),
        "block, peer": partial(score_theirs, steered=hook(block, False)),
        f"{N_RANDOM} random vectors, post-norm": score_random_at_once,
        f"{N_RANDOM_BEFORE} random vectors, post-norm, one by one": score_random_one_by_one,
        "one pass through the blocks": one_pass,
    }
    for side in sides.values():  # prepares the kernels
        side(replace(work, strengths=work.strengths[:2], new_tokens=2))
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    found: dict[str, Any] = {}
    for turn in range(options.rounds):
        for side, compute in sides.items():
            began = time.perf_counter()
            found[side] = compute(work)
            seconds[side].append(time.perf_counter() - began)
        common.progress(f"  round {turn + 1} of {options.rounds} done")
    report(work, seconds, found)


def report(work: Work, seconds: dict[str, list[float]], found: dict[str, Any]) -> None:
    """Print the tables and the RESULT line."""
    print_row = {side: [side, str(Spread.of(values))] for side, values in seconds.items()}
    ratios = {
        side: Spread.of([a / b for a, b in zip(seconds[f"{side}, peer"], seconds[side], strict=True)])
        for side in ("generation", "post-norm", "block")
    }
    for side, ratio in ratios.items():
        print_row[side].append(str(ratio))
    rows = [[*row, *[""] * (3 - len(row))] for row in print_row.values()]
    common.print_table(
        "A sweep (min · median · max over rounds)", ["side", "seconds", "times faster than the peer"], rows
    )
    n_moved = int((work.strengths != 0).sum())
    passes = sweep_cost(work.model.config.num_hidden_layers, work.layer, n_moved)
    costs = [
        block / (one * passes + pre - one)  # what the unembedding of all strengths takes is known from pre-norm
        for block, pre, one in zip(
            seconds["block"], seconds["pre-norm"], seconds["one pass through the blocks"], strict=True
        )
    ]
    ours, theirs = found["generation"], found["generation, peer"]
    same = [a == b for left, right in zip(ours, theirs, strict=True) for a, b in zip(left, right, strict=True)]
    plain = ours[int(work.strengths.abs().argmin())]
    changed = [a != b for branch in ours for a, b in zip(branch, plain, strict=True)]
    many, few = f"{N_RANDOM} random vectors, post-norm", f"{N_RANDOM_BEFORE} random vectors, post-norm, one by one"
    dearer = Spread.of([a / b for a, b in zip(seconds[many], seconds[few], strict=True)])
    kl_apart = float((found[many][: len(found[few])] - found[few]).abs().max())
    apart = max(float((found[s] - found[f"{s}, peer"]).abs().max()) for s in ("post-norm", "block"))
    print(f"\nTime at block {work.layer} over that of {passes:g} passes and all unembeddings: {Spread.of(costs)}")
    print(
        f"Completions: {sum(same)} of {len(same)} token for token the peer's; {sum(changed)} differ from strength 0's"
    )
    print(f"Largest difference of a log-prob from the peer's: {apart:.2g} nats")
    print(
        f"Time of {N_RANDOM} random vectors over that of {N_RANDOM_BEFORE} one by one: {dearer}; largest difference of a KL: "
        f"{kl_apart:.2g} nats"
    )
    common.print_result(
        speedup_generation=ratios["generation"].median,
        speedup_post_norm=ratios["post-norm"].median,
        layer_cost_ratio=Spread.of(costs).median,
        tokens_identical=sum(same) / len(same),
        random_vectors_cost_ratio=dearer.median,
    )


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    with common.clear_errors(), tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder))


if __name__ == "__main__":
    main()
