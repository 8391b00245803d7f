"""Mixtures: exact shares, nothing twice, every pair with its own source."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from datamodules.mixture import Mixture
from datamodules.records import LoadReport, Message, PreferencePair
from tiltmeter.errors import UserError


class Numbers:
    """A source of n numbered pairs."""

    def __init__(self, name: str, n: int) -> None:
        self.name, self.n, self.n_loads = name, n, 0

    def load(self) -> tuple[list[PreferencePair], list[LoadReport]]:
        self.n_loads += 1
        hi, a, b = Message("user", "hi"), Message("assistant", "a"), Message("assistant", "b")
        pairs = [
            PreferencePair(f"{self.name}/{i:05d}", self.name, f"{self.name} {i}", (hi,), a, b, "hi", " a", " b")
            for i in range(self.n)
        ]
        return pairs, [LoadReport(self.name, "memory", n_rows=self.n, n_kept=self.n)]


def counts(weights: Mapping[str, float], seed: int = 0, **sizes: int) -> dict[str, int]:
    pairs, _ = Mixture({name: Numbers(name, n) for name, n in sizes.items()}, weights, seed=seed).load()
    assert len({pair.pair_id for pair in pairs}) == len(pairs)
    return dict(Counter(pair.source for pair in pairs))


@pytest.mark.parametrize(
    ("weights", "sizes", "expected"),
    [
        ({"a": 0.5, "b": 0.5}, {"a": 100, "b": 30}, {"a": 30, "b": 30}),
        ({"a": 3, "b": 1}, {"a": 30, "b": 100}, {"a": 30, "b": 10}),
        ({"a": 0.75, "b": 0.25}, {"a": 100, "b": 10}, {"a": 32, "b": 10}),  # N = 43: 32.25 and 10.75
        ({"a": 0.1, "b": 0.9}, {"a": 1000, "b": 90}, {"a": 10, "b": 90}),  # N = 101 would need 90.9, still 90
        ({"a": 1, "b": 1, "c": 2}, {"a": 7, "b": 9, "c": 20}, {"a": 7, "b": 7, "c": 15}),  # N = 31: 7.75 and 15.5
        ({"a": 2}, {"a": 5}, {"a": 5}),
    ],
)
def test_the_shares_are_the_largest_without_repeating_a_source(
    weights: dict[str, float], sizes: dict[str, int], expected: dict[str, int]
) -> None:
    assert counts(weights, **sizes) == expected


def test_one_more_pair_in_total_would_need_more_than_a_source_has() -> None:
    weights = {"a": 0.3, "b": 0.6, "c": 0.1}
    for a, b, c in [(17, 40, 9), (100, 100, 100), (3, 1000, 2), (1, 1, 1)]:
        used = counts(weights, a=a, b=b, c=c)
        sizes = {"a": a, "b": b, "c": c}
        fits = [n for n in range(3000) if all(int(w * n + 1e-9) <= sizes[k] for k, w in weights.items())]
        assert used == {k: n for k, w in weights.items() if (n := int(w * max(fits) + 1e-9))}


def test_the_draw_is_seeded_and_the_order_interleaved() -> None:
    def ids(seed: int) -> list[str]:
        sources = {"a": Numbers("a", 300), "b": Numbers("b", 30)}
        return [pair.pair_id for pair in Mixture(sources, {"a": 2, "b": 1}, seed=seed).load()[0]]

    assert ids(0) == ids(0)
    assert set(ids(0)) != set(ids(1))
    for start in range(0, 90, 9):  # every stretch has the shares of the whole
        assert sum(name.startswith("b") for name in ids(0)[start : start + 9]) == 3


def test_one_source_keeps_its_order_and_all_its_pairs() -> None:
    source = Numbers("a", 20)
    assert Mixture({"x": source}, {"x": 1}).load()[0] == source.load()[0]


def test_reports_of_all_sources_come_with_the_number_used() -> None:
    quiet = Numbers("quiet", 5)
    mixture = Mixture({"a": Numbers("a", 2000), "b": Numbers("b", 30), "quiet": quiet}, {"a": 1, "b": 1, "quiet": 0})
    pairs, reports = mixture.load()
    assert len(pairs) == 60
    assert [(r.source, r.n_kept) for r in reports] == [("a", 2000), ("b", 30), ("quiet", 0)]
    assert reports[0].notes["used in the mixture"] == "30 of 2,000 pairs (share 0.5)"
    assert reports[2].location == "not read (weight 0)"
    assert quiet.n_loads == 0


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (
            {"hh": 1, "oast1": 1},
            r"^data\.weights: unknown source 'oast1' \(expected hh, oasst1\); did you mean oasst1\?",
        ),
        ({"hh": 1}, r"^data\.weights: no weight for source 'oasst1' \(got hh\)"),
        ({}, r"no weight for source 'hh' \(got none\)"),
        ({"hh": 1, "oasst1": -0.5}, r"^data\.weights\.oasst1: expected a number ≥ 0, got -0\.5"),
        ({"hh": 1, "oasst1": float("nan")}, "got nan"),
        ({"hh": 1, "oasst1": float("inf")}, "got inf"),
        ({"hh": 1, "oasst1": True}, "got True"),
        ({"hh": "1", "oasst1": 1}, "got '1'"),
        ({"hh": 0, "oasst1": 0.0}, r"^data\.weights: all weights are 0"),
    ],
)
def test_mixture_with_wrong_weights_is_refused(weights: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Mixture({"hh": Numbers("hh", 5), "oasst1": Numbers("oasst1", 5)}, weights)


def test_no_source_an_empty_source_and_the_same_source_twice_are_errors() -> None:
    with pytest.raises(UserError, match=r"^data\.sources: expected at least one"):
        Mixture({}, {})
    with pytest.raises(UserError, match=r"^data\.sources\.b: gave no pairs"):
        Mixture({"a": Numbers("a", 3), "b": Numbers("b", 0)}, {"a": 1, "b": 1}).load()
    with pytest.raises(UserError, match=r"come from two sources, for example same/00000"):
        Mixture({"a": Numbers("same", 3), "b": Numbers("same", 3)}, {"a": 1, "b": 1}).load()
