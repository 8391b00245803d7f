"""The speed comparison as a person runs it, on the smallest work that goes through every part of it."""

import json
from pathlib import Path

import pytest

from benchmarks.common import Spread
from benchmarks.workload import Settings, random_order, sorted_order
from tests.benchmarks.command import in_miniature, result_of, run_benchmark
from tests.tiny_models import random_pairs

pytest.importorskip("trl")

SETTINGS = Settings(
    folder="", variant="trl_sorted", shape="tiny", device="cpu", pairs_per_step=4, pairs_per_micro_batch=2,
    tokens_per_micro_batch=None, turns=(1, 2, 2, 1), n_measured=2,
)  # fmt: skip


@pytest.mark.slow
def test_quick_comparison_ends_with_its_figures() -> None:
    """With LoRA, which is all that goes without it, and adapters that both sides start from."""
    little = ("--rounds", "1", "--pairs-per-step", "4", "--micro-batch", "2", "--threads", "1", "--lora-rank", "4")
    done = run_benchmark("dpo_step.py", "--quick", *little, before=in_miniature)
    assert done.returncode == 0, done.stderr
    result = result_of(done.stdout)
    assert list(result) == [
        "speedup_vs_trl",
        "speedup_vs_trl_sorted",
        "padding_share",
        "max_loss_difference",
        "head_memory_ratio",
    ]
    assert result["padding_share"] == 0
    assert result["max_loss_difference"] <= 1e-5
    assert 0 < result["head_memory_ratio"] < 0.5
    assert "stand-in" in done.stdout
    assert "LoRA of rank 4" in done.stdout
    assert "0.693147" in done.stdout, "both sides start at ln 2"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--pairs-per-step", "12"), "--micro-batch=8, got 12"),
        (("--data", "no_such_file.jsonl"), "no_such_file.jsonl"),
        (("--quick", "--data", "SMALL"), "24 pairs are wanted and 1 are there"),
    ],
)
def test_wrong_options_are_one_line(arguments: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    small = tmp_path / "small.jsonl"
    sides = {name: f"\n\nHuman: Hi\n\nAssistant: {text}" for name, text in (("chosen", "Hello."), ("rejected", "No."))}
    small.write_text(json.dumps(sides) + "\n")
    done = run_benchmark("dpo_step.py", *(str(small) if word == "SMALL" else word for word in arguments))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert expected in done.stderr


def test_pairs_sorted_by_hand_are_the_same_pairs_in_every_measured_turn() -> None:
    pairs = random_pairs(30)
    plain, by_hand = random_order(SETTINGS, len(pairs)), sorted_order(SETTINGS, pairs)
    first, last = 4, 20
    assert by_hand[:first] == plain[:first]
    assert by_hand[last:] == plain[last:]
    assert sorted(by_hand[first:last]) == sorted(plain[first:last])


def test_pairs_sorted_by_hand_pad_less() -> None:
    pairs = random_pairs(30, longest=60)

    def padded(order: list[int]) -> int:
        widths = [len(pairs[row].prompt_ids) + max(map(len, pairs[row][1:])) for row in order[4:20]]
        return sum(2 * max(widths[at : at + 2]) for at in range(0, 16, 2))

    assert padded(sorted_order(SETTINGS, pairs)) < 0.9 * padded(random_order(SETTINGS, len(pairs)))


def test_spread_is_smallest_middle_largest() -> None:
    assert Spread.of([2.0, 9.0, 1.0]) == (1.0, 2.0, 9.0)
