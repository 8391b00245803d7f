"""Surface overlap of completions with a reference: BLEU and ROUGE. How far the words drifted, not whether they are good.

Both are sums over samples, kept in float64, so that they are the same on any number of processes.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torchmetrics
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import SacreBLEUScore

from tiltmeter.errors import UserError
from tiltmeter.scoring.scorer import MAX_MISSING_SHARE, Figure, Sample, Scores, mean_figure
from tiltmeter.stats.jackknife import NO_INTERVAL, jackknife_interval

BLEU_SIGNATURE = f"bleu|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|torchmetrics:{torchmetrics.__version__}"
"""BLEU's settings as sacrebleu writes them; the last part names the code that counts."""
ROUGE_SIGNATURE = "rouge|f1|case:lower|tok:[a-z0-9]+|stemmer:no"
N_ORDERS = 4
_ROUGE = ("rouge1", "rouge2", "rougeL")


class Rouge(NamedTuple):
    """F1 of one completion against its reference, each 0 … 1."""

    rouge1: float
    rouge2: float
    rougeL: float


def bleu_of_counts(counts: Float[Tensor, "corpus 10"]) -> Float[Tensor, " corpus"]:
    """BLEU, 0 … 100, of corpora given by sums over their samples: matches and n-grams of order 1 … 4, both lengths in words.

    BLEU = 100 · min(1, exp(1 − reference / prediction)) · (Π p_n)^¼ with p_n = matches_n / n-grams_n; the k-th order without
    a match has p_n = 1 / (2^k · n-grams_n) (``exp`` smoothing). 0 when no word matches or no 4-gram was said. As sacrebleu.

    >>> bleu_of_counts(torch.tensor([[4, 3, 2, 1, 4, 3, 2, 1, 4, 4]], dtype=torch.float64))
    tensor([100.], dtype=torch.float64)
    """
    matches, n_grams, (said, reference) = counts[:, :4], counts[:, 4:8], counts[:, 8:].T
    is_empty = matches == 0
    halvings = 2.0 ** is_empty.cumsum(1)
    precisions = torch.where(is_empty, 1 / halvings, matches) / n_grams
    brevity = torch.where(said < reference, (1 - reference / said).exp(), 1.0)
    bleu = 100 * brevity * precisions.log().mean(1).exp()
    return bleu.where(matches.any(1) & (n_grams > 0).all(1), 0.0)


def rouge_f1(prediction: str, reference: str) -> Rouge:
    """ROUGE-1, -2 and -L F1 of one text against another (Lin 2004), equal to the ``rouge-score`` package without stemmer.

    torchmetrics has them in float32 and keeps every sample; this is float64.

    >>> rouge_f1("the cat sat", "the cat slept")
    Rouge(rouge1=0.6666666666666666, rouge2=0.5, rougeL=0.6666666666666666)
    """
    said, wanted = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, reference))
    shared = [(_n_shared(said, wanted, n), len(said) + 1 - n, len(wanted) + 1 - n) for n in (1, 2)]
    return Rouge(*(_f1(*counts) for counts in (*shared, (_n_common(said, wanted), len(said), len(wanted)))))


class CorpusBLEU(SacreBLEUScore):
    """Corpus BLEU, 0 … 100, of predictions against one reference each, as sacrebleu's default: 13a tokens, ``exp`` smoothing.

    torchmetrics' own is 0 … 1, has no such smoothing and counts in float32, which is exact to 16.8 million n-grams only.

    >>> metric = CorpusBLEU()
    >>> metric.update(["the cat is on the mat"], [["there is a cat on the mat"]])
    >>> round(metric.compute().item(), 4)
    29.0593
    """

    plot_upper_bound = 100.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(n_gram=N_ORDERS, tokenize="13a", **kwargs)
        for name, size in (("numerator", N_ORDERS), ("denominator", N_ORDERS)):
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("preds_len", "target_len"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Sequence[str], target: Sequence[Sequence[str]]) -> None:
        """Count predictions, each with a list of references."""
        # as sacrebleu, before it joins words that a line end parts
        super().update([text.rstrip() for text in preds], [[text.rstrip() for text in texts] for texts in target])

    def counts(self) -> Float[Tensor, " 10"]:
        """Counts since the last reset, on this process, as :func:`bleu_of_counts` takes them."""
        return torch.cat([self.numerator, self.denominator, self.preds_len[None], self.target_len[None]])

    def compute(self) -> Float[Tensor, ""]:
        """BLEU of all processes' samples together; 0 when there are none."""
        return bleu_of_counts(self.counts()[None])[0]


class CorpusROUGE(Metric):
    """Mean F1 over samples of ROUGE-1, -2 and -L, 0 … 1, see :func:`rouge_f1`; NaN when there are none.

    >>> metric = CorpusROUGE()
    >>> metric.update(["the cat sat"], ["the cat slept"])
    >>> round(metric.compute()["rouge2"].item(), 6)
    0.5
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    sums: Tensor
    n_samples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(len(_ROUGE), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_samples", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Sequence[str], target: Sequence[str]) -> None:
        """Add predictions and the reference of each."""
        for prediction, reference in zip(preds, target, strict=True):
            self.sums += torch.tensor(rouge_f1(prediction, reference), dtype=torch.float64, device=self.sums.device)
            self.n_samples += 1

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """The means over all processes' samples."""
        return dict(zip(_ROUGE, self.sums / self.n_samples, strict=True))


class OverlapScorer:
    """BLEU (0 … 100) and ROUGE-1, -2, -L F1 (0 … 1) against what the data set prefers, or of the policy against the base.

    A drift signal: it says how far the words moved, not whether the answers got better. A sample without a reference has
    no score.

    Args:
        reference: ``chosen``: figures ``bleu``, ``rouge1``, ``rouge2``, ``rougeL`` of both models. ``base``: of the policy alone,
            against the base's completion of the same prompt, named ``bleu_to_base`` and so on.
    """

    is_slow = False

    def __init__(self, reference: str = "chosen") -> None:
        if reference not in ("chosen", "base"):
            raise UserError(f"overlap.reference: expected chosen or base, got {reference!r}")
        self.reference = reference
        self.name = f"overlap with {reference}: {BLEU_SIGNATURE}, {ROUGE_SIGNATURE}"

    def start(self) -> None:
        """Nothing is needed."""

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Score the completions; no figures for prompts of which none has a chosen response."""
        scores, is_chosen = Scores(), self.reference == "chosen"
        if is_chosen and samples and not any(sample.chosen.strip() for sample in samples):
            return scores
        suffix = "" if is_chosen else "_to_base"
        references = [sample.chosen if is_chosen else sample.base.text for sample in samples]
        sides: tuple[Literal["policy", "base"], ...] = ("policy", "base") if is_chosen else ("policy",)
        for of in sides:
            said = [getattr(sample, of).text for sample in samples]
            scores.figures.append(self._bleu(f"bleu{suffix}", of, said, references, samples))
            for name, values in _rouge_columns(said, references).items():
                scores.columns[f"{name}{suffix}/{of}"] = values
                scores.figures.append(
                    mean_figure(name + suffix, of, values, samples, scorer=ROUGE_SIGNATURE, is_share=True)
                )
        return scores

    def _bleu(
        self,
        name: str,
        of: Literal["policy", "base"],
        said: Sequence[str],
        references: Sequence[str],
        samples: Sequence[Sample],
    ) -> Figure:
        rows = [row for row, reference in enumerate(references) if reference.strip()]
        n_missing = len(samples) - len(rows)
        interval = NO_INTERVAL
        if rows and n_missing <= MAX_MISSING_SHARE * len(samples):
            counts = bleu_counts([said[row] for row in rows], [references[row] for row in rows])
            groups = [samples[row].group for row in rows]
            interval = jackknife_interval(lambda weights: bleu_of_counts(weights @ counts), groups)
        return Figure(name, of, *interval, len(rows), n_missing, BLEU_SIGNATURE)


def bleu_counts(predictions: Sequence[str], references: Sequence[str]) -> Float[Tensor, "sample 10"]:
    """Counts of :class:`CorpusBLEU` for each sample by itself: their sum over samples is the corpus."""
    metric = CorpusBLEU()
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        metric.reset()
        metric.update([prediction], [[reference]])
        rows.append(metric.counts())
    return torch.stack(rows)


def _rouge_columns(said: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """ROUGE of each completion, by name; NaN without a reference."""
    nothing = Rouge(math.nan, math.nan, math.nan)
    found = [rouge_f1(one, of) if of.strip() else nothing for one, of in zip(said, references, strict=True)]
    return {name: [getattr(rouge, name) for rouge in found] for name in _ROUGE}


def _n_shared(said: Sequence[str], wanted: Sequence[str], n: int) -> int:
    counts = (Counter(zip(*(words[at:] for at in range(n)), strict=False)) for words in (said, wanted))
    return sum((next(counts) & next(counts)).values())


def _n_common(said: Sequence[str], wanted: Sequence[str]) -> int:
    """Length of the longest common subsequence, one row of the table in the bits of a number (Hyyrö 2004)."""
    at_words: dict[str, int] = {}
    for at, word in enumerate(wanted):
        at_words[word] = at_words.get(word, 0) | 1 << at
    row = full = (1 << len(wanted)) - 1
    for word in said:
        matches = row & at_words.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return (full ^ row).bit_count()


def _f1(n_shared: int, n_said: int, n_wanted: int) -> float:
    precision, recall = n_shared / max(n_said, 1), n_shared / max(n_wanted, 1)
    return 2 * precision * recall / (precision + recall) if n_shared else 0.0
