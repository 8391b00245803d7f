"""Two models, the same prompts, every scorer: what generation during training and afterwards have in common."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiltmeter.models.generation import Completion, Decoding, count_batches, generate
from tiltmeter.scoring.notices import kept_notices, notice
from tiltmeter.scoring.scorer import Sample, Scorer, Scores

Completions = dict[str, list[Completion]]
"""``pair_id`` → what a model said, a completion a sample."""


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt, as text and as token ids (BOS included)."""

    pair_id: str
    text: str
    ids: Sequence[int]
    chosen: str
    group: str
    attributes: Mapping[str, str | int | float | bool] = field(default_factory=dict)


def one_a_group(prompts: Sequence[Prompt], n_prompts: int | None) -> list[Prompt]:
    """The first ``n_prompts`` different prompts, or all; of pairs that share one, the first."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.group, prompt)
    return list(first.values())[:n_prompts]


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    rank: int = 0,
    world_size: int = 1,
    tokens_per_batch: int = 16384,
) -> Completions:
    """What a model says to every ``world_size``-th prompt, beginning with ``rank``; the shares of all ranks are the whole.

    Each rank makes the same number of batches, as models that are sharded over ranks need it. Completions don't depend on
    the number of ranks: random streams belong to ``pair_id``.
    """
    shares = [prompts[r::world_size] for r in range(world_size)]
    n_batches = max(count_batches([len(p.ids) for p in s], decoding, tokens_per_batch=tokens_per_batch) for s in shares)
    own = shares[rank]
    said = generate(
        model,
        tokenizer,
        [prompt.ids for prompt in own],
        decoding,
        keys=[prompt.pair_id for prompt in own],
        tokens_per_batch=tokens_per_batch,
        n_batches=n_batches,
    )
    return {prompt.pair_id: completions for prompt, completions in zip(own, said, strict=True)}


def pair_up(prompts: Sequence[Prompt], base: Completions, policy: Completions) -> list[Sample]:
    """Both models' completions side by side, in the order of the prompts.

    Raises:
        ValueError: a model said nothing to a prompt, or not as often as the other.
    """
    wrong = [p.pair_id for p in prompts if len(base.get(p.pair_id, ())) != len(policy.get(p.pair_id, ()))]
    if wrong:
        raise ValueError(f"base and policy have not the same number of completions for {', '.join(wrong[:3])}")
    return [
        Sample(p.pair_id, p.text, p.chosen, b, a, p.group, index, p.attributes)
        for p in prompts
        for index, (b, a) in enumerate(zip(base[p.pair_id], policy[p.pair_id], strict=True))
    ]


def score_all(scorers: Mapping[str, Scorer], samples: Sequence[Sample]) -> Scores:
    """Figures and columns of several scorers; one that breaks is reported, and has no figures."""
    whole = Scores()
    for key, scorer in scorers.items():
        try:
            scores = scorer.score(samples)
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            notice(f"behaviour: {key} ({scorer.name}) could not score these samples: {reason}")
            continue
        whole.figures.extend(scores.figures)
        whole.columns.update(scores.columns)
    return whole


@dataclass(frozen=True)
class Scored:
    """Samples of one moment of training with what slow scorers said of them."""

    step: int
    epoch: int
    samples: list[Sample]
    scores: Scores
    notices: Sequence[str] = ()
    """What they had to say on the way."""


class ScoringBeside:
    """Asks slow scorers in a thread, one set of samples after another, while training goes on.

    The thread is a daemon: a program that ends, for whatever reason, doesn't wait for a judge.

    Args:
        scorers: by the name that the configuration gives them.
    """

    def __init__(self, scorers: Mapping[str, Scorer]) -> None:
        self.scorers = dict(scorers)
        self._one_at_a_time = threading.Lock()
        self._lock = threading.Lock()
        self._done: list[Scored] = []
        self._threads: list[threading.Thread] = []

    @property
    def n_pending(self) -> int:
        """Sets of samples that are not scored yet."""
        return sum(thread.is_alive() for thread in self._threads)

    def submit(self, step: int, epoch: int, samples: list[Sample]) -> None:
        """Have samples scored; returns at once."""
        if self.scorers:
            thread = threading.Thread(target=self._score, args=(step, epoch, samples), daemon=True)
            self._threads.append(thread)
            thread.start()

    def take(self) -> list[Scored]:
        """What was finished since the last call, the oldest first; logs what scorers had to say.

        Logged, not warned: the filters of warnings belong to all threads, and libraries of the scorers' thread change them.
        """
        with self._lock:
            done, self._done = self._done, []
        done.sort(key=lambda scored: scored.step)
        for text in (text for scored in done for text in scored.notices):
            logging.getLogger(__name__).warning(text)
        return done

    def wait(self, seconds: float) -> int:
        """Wait until everything is scored, so long at most; returns how many sets are not."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0))
        return self.n_pending

    def _score(self, step: int, epoch: int, samples: list[Sample]) -> None:
        with self._one_at_a_time, kept_notices() as notices:
            scores = score_all(self.scorers, samples)
        with self._lock:
            self._done.append(Scored(step, epoch, samples, scores, notices))
