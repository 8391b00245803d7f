"""BLEU and ROUGE against the packages that define them, on one process and on two."""

import math
import socket
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from tests.processes import codes, run_on_ranks
from tests.text_samples import figure, sample, samples_of
from tiltmeter.errors import UserError
from tiltmeter.scoring.overlap import CorpusBLEU, CorpusROUGE, OverlapScorer, bleu_counts, bleu_of_counts, rouge_f1

GOLDEN = [
    ("The dog bit the man.", "The dog bit the man, it was said."),
    ("It wasn't surprising", "It was not unexpected."),
    ("The man had just bitten him.", "The man bit him first."),
    ("Costs 1,000.50 &amp; more - a lot-\n", "Costs 1,000.50 & more - a lot -"),
    ("", "Nothing was said."),
    ("naïve café 你好 \u2028 end", "naïve cafe 你好 end"),
]
WORDS = st.lists(
    st.sampled_from(["the", "cat", "sat", "on", ".", ",", "don't", "3.5", "The", "-\n", "&lt;", "é"]), max_size=12
)
TEXTS = st.one_of(WORDS.map(" ".join), st.text(max_size=30))
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)


def reference_bleu(pairs: list[tuple[str, str]]) -> float:
    said, wanted = zip(*pairs, strict=True)
    return sacrebleu.corpus_bleu(list(said), [list(wanted)]).score


def our_bleu(pairs: list[tuple[str, str]]) -> float:
    metric = CorpusBLEU()
    metric.update([said for said, _ in pairs], [[wanted] for _, wanted in pairs])
    return float(metric.compute())


@given(PAIRS)
@example(GOLDEN)
@example([("a b", "a b")])  # no 3-gram
@example([("a b c d e f", "f e d c b a")])  # no bigram matches
@example([("cat-\n", "cat-\n")])
@example([("", "")])
def test_bleu_is_that_of_sacrebleu(pairs: list[tuple[str, str]]) -> None:
    assert our_bleu(pairs) == pytest.approx(reference_bleu(pairs), abs=1e-9)


@given(TEXTS, TEXTS)
@example(*GOLDEN[0])
def test_rouge_is_that_of_its_authors_package(prediction: str, reference: str) -> None:
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(reference, prediction)
    ours = rouge_f1(prediction, reference)._asdict()
    assert ours == pytest.approx({name: float(score.fmeasure) for name, score in theirs.items()}, abs=1e-12)


def test_bleu_has_the_scale_and_signature_of_sacrebleu() -> None:
    text = "one two three four five"
    assert our_bleu([(text, text)]) == pytest.approx(100)
    bleu = sacrebleu.BLEU()
    bleu.corpus_score([text], [[text]])
    theirs = set(str(bleu.get_signature()).split("|"))
    assert theirs - set(OverlapScorer().score(samples_of([text])).figures[0].scorer.split("|")) == {
        f"version:{sacrebleu.__version__}"
    }


def test_counts_of_samples_add_up_to_the_corpus() -> None:
    said, wanted = zip(*GOLDEN, strict=True)
    counts = bleu_counts(said, wanted)
    assert counts.dtype == torch.float64
    assert float(bleu_of_counts(counts.sum(0)[None])) == pytest.approx(reference_bleu(GOLDEN), abs=1e-9)


def test_counts_stay_exact_where_float32_would_not() -> None:
    metric = CorpusBLEU()
    for state in (metric.preds_len, metric.target_len, metric.numerator, metric.denominator):
        state += 2.0**24
    metric.update(["one"], [["one"]])
    one, large = 2.0**24 + 1, 2.0**24
    assert metric.counts().tolist() == [one, large, large, large, one, large, large, large, one, one]


def test_metrics_of_nothing_are_nothing() -> None:
    rouge = CorpusROUGE()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert all(value.isnan() for value in rouge.compute().values())


# --- two processes ----------------------------------------------------------------------------------------------------


def _on_a_rank(rank: int, folder: str) -> None:
    """The first process has one sample, the other all others."""
    torch.distributed.init_process_group("gloo")
    mine = GOLDEN[:1] if rank == 0 else GOLDEN[1:]
    bleu, rouge = CorpusBLEU(), CorpusROUGE()
    for prediction, reference in mine:
        bleu.update([prediction], [[reference]])
        rouge.update([prediction], [reference])
    torch.save({"bleu": bleu.compute(), **rouge.compute()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_uneven_shares_give_the_figures_of_one(tmp_path: Path) -> None:
    done = run_on_ranks(_on_a_rank, str(tmp_path))
    assert codes(done) == [0, 0], done
    rouge = CorpusROUGE()
    rouge.update(*map(list, zip(*GOLDEN, strict=True)))
    alone = {"bleu": our_bleu(GOLDEN)} | {name: float(value) for name, value in rouge.compute().items()}
    for rank in (0, 1):
        both = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert {name: float(value) for name, value in both.items()} == pytest.approx(alone, abs=1e-9)


# --- the scorer -------------------------------------------------------------------------------------------------------


def test_both_models_are_held_against_what_the_data_prefers() -> None:
    samples = [
        sample("the cat sat on the mat", "no", chosen="the cat sat on the mat", pair_id="a"),
        sample("dogs bark", "dogs bark loudly", chosen="dogs bark loudly", pair_id="b"),
    ]
    scores = OverlapScorer().score(samples)
    assert scores.columns["rougeL/policy"] == pytest.approx([1, 0.8])
    assert figure(scores, "rouge1").value == pytest.approx(0.9)
    assert figure(scores, "rouge1", "base").value == pytest.approx(0.5)
    assert figure(scores, "bleu").value == pytest.approx(
        reference_bleu([(s.policy.text, s.chosen) for s in samples]), abs=1e-9
    )
    assert {f.name for f in scores.figures} == {"bleu", "rouge1", "rouge2", "rougeL"}


def test_the_interval_of_bleu_resamples_whole_prompts() -> None:
    texts = ["the cat sat on the mat again", "a dog ran over the hill today", "rain fell on all of us"] * 4
    wanted = ["the cat sat on a mat again", "a dog ran over the hill", "it was sunny for all of us"] * 4
    rows = zip(texts, wanted, strict=True)
    samples = [sample(ours, chosen=best, pair_id=str(i)) for i, (ours, best) in enumerate(rows)]
    found = figure(OverlapScorer().score(samples), "bleu")
    assert found.low < found.value < found.high
    one = figure(OverlapScorer().score([sample(texts[0], chosen=wanted[0])]), "bleu")
    assert (one.low, one.high) == (-math.inf, math.inf)


def test_the_policy_can_be_held_against_the_base() -> None:
    scores = OverlapScorer("base").score(samples_of(["the cat sat here"], ["the cat sat here"]))
    assert {(f.name, f.of) for f in scores.figures} == {
        (f"{name}_to_base", "policy") for name in ("bleu", "rouge1", "rouge2", "rougeL")
    }
    assert figure(scores, "bleu_to_base").value == pytest.approx(100)
    assert scores.columns["rougeL_to_base/policy"] == [1.0]


def test_a_sample_without_a_reference_is_missing_and_an_empty_completion_is_none() -> None:
    samples = [sample("", pair_id=str(i)) for i in range(30)] + [sample("words", chosen=" ", pair_id="x")]
    scores = OverlapScorer().score(samples)
    for name in ("bleu", "rouge1"):
        found = figure(scores, name)
        assert (found.value, found.n, found.n_missing) == (0, 30, 1)
    assert math.isnan(scores.columns["rouge2/policy"][-1])
    assert all(math.isnan(f.value) for f in OverlapScorer().score(samples[-2:]).figures)
    assert all(math.isnan(f.value) and f.n == 0 for f in OverlapScorer().score([]).figures)


def test_an_unknown_reference_is_refused() -> None:
    with pytest.raises(UserError, match=r"reference: expected chosen or base, got 'rejected'"):
        OverlapScorer("rejected")


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a scorer of overlap reached for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    assert figure(OverlapScorer().score(samples_of(["A good answer here. Yes."])), "rougeL").value > 0.5
