"""Two models, the same prompts, every scorer: what generation during training and afterwards have in common."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiltmeter.errors import UserError
from tiltmeter.files import write_atomically
from tiltmeter.models.generation import Completion, Decoding, count_batches, generate
from tiltmeter.scoring.scorer import Figure, Sample, Scorer, Scores, kept_notices, notice

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
    """Have a model complete every ``world_size``-th prompt, beginning with ``rank``; the shares of all ranks are the whole.

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
    """Notices that scorers gave on the way."""


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
            thread = threading.Thread(target=copy_context().run, args=(self._score, step, epoch, samples), daemon=True)
            self._threads.append(thread)
            thread.start()

    def take(self) -> list[Scored]:
        """Scores finished since the last call, the oldest first; logs what scorers had to say.

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


FIGURES, SAMPLES = "behaviour_by_step.csv", "samples.csv"
_WHEN = ["steps_taken", "epoch"]
_FIGURE_KEY = ["steps_taken", "metric", "of"]
_SAMPLE_KEY = ["steps_taken", "pair_id", "sample"]
_TEXT = ["metric", "of", "scorer", "pair_id", "prompt", "base", "policy", "chosen"]
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

Cell = str | float | int


class BehaviourTables:
    """The two tables of a folder; scores of a moment may come in several parts and at any time.

    Args:
        folder: where they are; made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, step: int, epoch: int, samples: Sequence[Sample], scores: Scores) -> None:
        """Add or replace the figures and columns of one moment."""
        self._merge(FIGURES, figure_table(step, epoch, scores.figures), _FIGURE_KEY)
        self._merge(SAMPLES, sample_table(step, epoch, samples, scores.columns), _SAMPLE_KEY)

    def forget_after(self, step: int) -> None:
        """Drop what was scored after a step that will be taken again."""
        for name in (FIGURES, SAMPLES):
            table = read_table(self.folder / name)
            if not table.empty and (table["steps_taken"] > step).any():
                self._write(name, table[table["steps_taken"] <= step])

    def _merge(self, name: str, new: pd.DataFrame, key: list[str]) -> None:
        if new.empty:
            return
        old = read_table(self.folder / name)
        if old.empty:
            self._write(name, new)
            return
        known, fresh = old.set_index(key), new.set_index(key)
        merged = fresh.combine_first(known)  # new values first, old ones where there is no new column
        columns = [*known.columns, *(c for c in fresh.columns if c not in known.columns)]
        order = dict.fromkeys([*known.index, *fresh.index])
        self._write(name, merged.reindex(list(order))[columns].rename_axis(key).reset_index())

    def _write(self, name: str, table: pd.DataFrame) -> None:
        columns = [*_WHEN, *(c for c in table.columns if c not in _WHEN)]
        write_atomically(self.folder / name, lambda path: table[columns].to_csv(path, index=False, lineterminator="\n"))


def figure_table(step: int, epoch: int, figures: Sequence[Figure]) -> pd.DataFrame:
    """A row a figure."""
    return pd.DataFrame([{"steps_taken": step, "epoch": epoch, **_figure_row(figure)} for figure in figures])


def sample_table(
    step: int, epoch: int, samples: Sequence[Sample], columns: Mapping[str, Sequence[float]]
) -> pd.DataFrame:
    """A row a completion, with a column a score."""
    rows = pd.DataFrame([{"steps_taken": step, "epoch": epoch, **_sample_row(sample)} for sample in samples])
    return rows.assign(**{name: list(column) for name, column in columns.items()})


def read_table(path: Path) -> pd.DataFrame:
    """A table that was written here; empty when there is none.

    Raises:
        UserError: damaged.
    """
    if not path.is_file():
        return pd.DataFrame()
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)  # else a completion that says "NA" would be missing
        for column in table.columns.difference(_TEXT):
            table[column] = pd.to_numeric(table[column].replace("", None))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]}); delete it to go on") from error
    if "steps_taken" not in table.columns:
        raise UserError(
            f"{path}: expected a column steps_taken, got {', '.join(table.columns)[:120]}; delete it to go on"
        )
    return table


def _figure_row(figure: Figure) -> dict[str, Cell]:
    return {
        "metric": figure.name,
        "of": figure.of,
        "value": figure.value,
        "ci_low": figure.low,
        "ci_high": figure.high,
        "n": figure.n,
        "n_missing": figure.n_missing,
        "scorer": figure.scorer,
    }


def _sample_row(sample: Sample) -> dict[str, Cell]:
    return {
        "pair_id": sample.pair_id,
        "sample": sample.index,
        "prompt": as_cell(sample.prompt),
        "base": as_cell(sample.base.text),
        "policy": as_cell(sample.policy.text),
        "chosen": as_cell(sample.chosen),
    }


def as_cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula; characters that only a terminal obeys are left out.

    >>> as_cell("=1+1"), as_cell(" Hello."), as_cell("red" + chr(27) + "[31m")
    ("'=1+1", ' Hello.', 'red[31m')
    """
    plain = "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160))
    plain = plain.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair can't be written
    return f"'{plain}" if plain.startswith(_FORMULA) else plain
