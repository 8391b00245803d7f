"""How fast is TruthfulQA scored, against one forward pass a choice, and are the figures the same?

    python benchmarks/truthfulqa.py [--quick]

All sides run in this process on the same model, questions and prompt, tokenisation included, and take turns of some
questions, each first in rotation. The peer (tests/harness.py) is lm-evaluation-harness 0.4.12 written straight down at
batch size 1: one forward pass for every choice of MC1 and of MC2, which share most of their answers. The third side is
the peer with each different answer run once.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file can be run from anywhere
from tiltmeter.threads import usable_cores  # before torch, which reads its threads' settings as it is imported

# isort: split
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from benchmarks import common
from benchmarks.common import Spread
from benchmarks.workload import HHLengths
from datamodules.tokenization import train_bpe_tokenizer
from tests import harness, stories260k
from tiltmeter.models.causal_lm import CausalLM
from tiltmeter.scoring.multiple_choice import TOKENS_PER_BATCH
from tiltmeter.scoring.truthfulqa import TruthfulQA, TruthfulQuestion, read_preset

OURS, PEER, ONCE = "tiltmeter", "one forward pass a choice", "one forward pass a different answer"
N_QUICK, N_WARM_UP, TURNS, QUICK_TURNS = 120, 16, 9, 5
N_STAND_IN = 48
KINDS = ("mc1", "mc2")
Values = dict[str, list[float]]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    number = common.positive
    parser.add_argument("--quick", action="store_true", help=f"under a minute: the first {N_QUICK} questions")
    parser.add_argument("--data", help="mc_task.json; default: v1 below $TILTMETER_SHARED, else a stand-in")
    parser.add_argument("--model", help="model folder; default: stories260K below $TILTMETER_SHARED, else a stand-in")
    parser.add_argument("--preset-file", help="the harness's prompt or its truthfulqa_mc1.yaml; default: zero-shot")
    parser.add_argument("--tokens-per-batch", type=number, default=TOKENS_PER_BATCH)
    parser.add_argument("--threads", type=number, default=usable_cores(), help="CPU threads")
    return parser.parse_args(arguments)


def shared() -> Path | None:
    """Folder of the real data, if it can be had."""
    root = os.environ.get("TILTMETER_SHARED")
    return Path(root) / "data" if root else None


def stand_in_questions(folder: Path) -> Path:
    """Meaningless questions with as many answers as TruthfulQA's, six words each."""
    words = [pair.chosen.content.split() for pair in HHLengths(400).load()[0]]
    sixes = iter([" ".join(some[:6]) for some in words if len(some) >= 6])
    rows = []
    for _ in range(N_STAND_IN):
        question, *answers = (next(sixes) for _ in range(6))
        labels = {answer: int(i < 2) for i, answer in enumerate(answers)}
        rows.append({"question": question, "mc1_targets": dict(list(labels.items())[1:]), "mc2_targets": labels})
    path = folder / "stand_in.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def load_model(options: argparse.Namespace, folder: Path, texts: Sequence[str]) -> tuple[Any, Callable[[], Any], str]:
    """Tokenizer, what builds the model, and the model in words."""
    root = shared()
    path = options.model
    if path is None and root is not None:
        path = str(stories260k.convert(root / "models" / "stories260K", folder / "stories260K"))
    if path is not None:
        spec = CausalLM(name_or_path=path)
        tokenizer = spec.load_tokenizer()
        return tokenizer, lambda: spec.build(tokenizer), Path(path).name
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8}
    config = AutoConfig.for_model("llama", vocab_size=512, max_position_embeddings=512, **sizes)

    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)

    return train_bpe_tokenizer(texts, vocab_size=512), build, "stand-in of stories260K's shape"


def as_rows(questions: Sequence[TruthfulQuestion]) -> list[dict[str, Any]]:
    """Questions as the peer reads them."""
    return [
        {"question": q.question}
        | {f"{kind}_targets": {a.text: int(a.is_true) for a in answers} for kind, answers in q.answers.items()}
        for q in questions
    ]


def score_ours(
    scorer: TruthfulQA, questions: list[TruthfulQuestion], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Values:
    """Values a question of MC1 and MC2."""
    scorer.questions = questions
    columns = scorer.score(model, tokenizer).columns
    return {kind: values for kind in KINDS for name, values in columns.items() if kind in name}


def run(options: argparse.Namespace, folder: Path) -> None:
    root = shared()
    path = options.data or (root / "truthfulqa" / "v1_mc_task.part80.json" if root else stand_in_questions(folder))
    scorer = TruthfulQA(
        str(path),
        preset_file=options.preset_file,
        limit=N_QUICK if options.quick else None,
        tokens_per_batch=options.tokens_per_batch,
    )
    scorer.start()
    questions = scorer.questions
    preset = read_preset(options.preset_file)
    start = "" if preset is None else preset + "\n\n"
    texts = [a.text for q in questions for answers in q.answers.values() for a in answers]
    tokenizer, build, name = load_model(options, folder, texts)
    ours, plain = build(), build().eval()
    n_answers = sum(len({a.text for answers in q.answers.values() for a in answers}) for q in questions)
    n_choices = sum(len(answers) for q in questions for answers in q.answers.values())
    print(f"Machine: {common.machine(options.threads)}")
    print(f"Data: {scorer.name}; {n_choices} choices, {n_answers} different answers")
    print(f"Model: {name}, float32; {options.tokens_per_batch} tokens a pass")

    def peer(some: list[TruthfulQuestion], *, each_once: bool) -> Values:
        return harness.score_all(plain, tokenizer, as_rows(some), start=start, each_once=each_once)

    sides: dict[str, Callable[[list[TruthfulQuestion]], Values]] = {
        OURS: lambda some: score_ours(scorer, some, ours, tokenizer),
        PEER: partial(peer, each_once=False),
        ONCE: partial(peer, each_once=True),
    }
    for side in sides.values():  # the first call prepares the model and the kernels
        side(questions[:N_WARM_UP])
    n_turns = QUICK_TURNS if options.quick else TURNS
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    values: dict[str, Values] = {side: {kind: [] for kind in KINDS} for side in sides}
    for turn in range(n_turns):
        some = questions[turn * len(questions) // n_turns : (turn + 1) * len(questions) // n_turns]
        for side in [*sides][turn % 3 :] + [*sides][: turn % 3]:
            began = time.perf_counter()
            found = sides[side](some)
            seconds[side].append(time.perf_counter() - began)
            for kind, known in values[side].items():
                known += found[kind]
            common.progress(f"  turn {turn + 1} of {n_turns}: {side}, {seconds[side][-1]:.1f} s")
    report(seconds, values, n_questions=len(questions))


def report(seconds: dict[str, list[float]], values: dict[str, Values], *, n_questions: int) -> None:
    """Print the table and the RESULT line."""
    ratios = {
        side: Spread.of([theirs / ours for theirs, ours in zip(seconds[side], seconds[OURS], strict=True)])
        for side in seconds
    }
    rows = [
        [
            side,
            f"{sum(seconds[side]):.1f}",
            str(Spread.of(seconds[side])),
            str(ratios[side]),
            *(f"{statistics.fmean(values[side][kind]):.6f}" for kind in KINDS),
        ]
        for side in seconds
    ]
    head = ["side", "seconds in all", "seconds a turn", "tiltmeter is × faster", "MC1", "MC2"]
    n_turns = len(seconds[OURS])
    common.print_table(f"{n_questions} questions in {n_turns} turns (min · median · max over turns)", head, rows)
    worst = max(
        abs(ours - theirs)
        for kind in KINDS
        for ours, theirs in zip(values[OURS][kind], values[PEER][kind], strict=True)
    )
    print(f"\nLargest difference of a question's MC1 or MC2: {worst:.2g}")
    common.print_result(
        speedup=ratios[PEER].median, speedup_vs_different_answers=ratios[ONCE].median, max_difference=worst
    )


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    with common.clear_errors(), tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder))


if __name__ == "__main__":
    main()
