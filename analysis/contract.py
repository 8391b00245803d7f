"""The contract of an analysis: its needs, a table computed from them, and a section of the report that is drawn of the table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from analysis.open.checkpoints import Checkpoints
from analysis.report.page import Section

_MODEL_KEYS = ("dtype", "device", "attn_implementation")
_NO_READINGS = (
    "there are no readings for it (expected a run trained with callbacks=geometry or callbacks=full that took at least one "
    "step"
)


class Cost(NamedTuple):
    """Passes and tokens of one part of an analysis, said before it starts."""

    name: str
    forwards: float
    """Passes of all its rows through all blocks; parts of a pass count as parts."""
    tokens: int
    """Through all blocks; of completions at most."""


class Needs(NamedTuple):
    """Needs of an analysis."""

    what: Literal["run", "states", "models"]
    """A run's tables; hidden states, those that a run stored or else read now; or both models."""
    several_steps: bool = False
    """Observations at several steps of one training."""
    random_weights: bool = False
    """Whether figures are held against random weight changes (control C8)."""

    @property
    def a_run(self) -> bool:
        """Whether two checkpoints alone can't give it."""
        return self.what == "run" or self.several_steps


class Asking(NamedTuple):
    """A question to two models that are open."""

    question: Any
    """The options that it is asked with, as its node of conf/analyze.yaml builds them."""
    models: Checkpoints
    tables: Path
    """Folder in which a table grows while it is made."""
    goes_on_with: str | None = None
    """Words to add to the command so that it goes on with these tables after a stop; None: nothing."""
    takes_old: bool = False
    """A table that is there with other settings is shown instead of refused."""


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    Args:
        name: on the command line, and of the files of its figure and table.
        needs: what ``table`` and ``cost`` are given: a :class:`analysis.open.runs.Run`, what was observed of hidden states, or an
            :class:`Asking`.
        table: computes; None: there is nothing to compute it from.
        section: draws what the table says and asks nothing else; None: the table has too little to draw.
        start: reaches what asking needs, before any analysis has begun.
        cost: passes and tokens of each part.
        node: of conf/analyze.yaml, whose options ``table`` is asked with.
        keys: of conf/analyze.yaml that have an effect on it; others concern every analysis.
        missing: what is wrong where it was asked for by its name and has no table.
        while_training: quick enough to be drawn after every look at the probe.
        done_in_training: a run has it from its training, so that ``analysis=all`` of a run leaves it out.
        every_pair: asked alone about two checkpoints it takes every pair of the source, unless a number is set.
        takes_other_corpus: of a run it also asks about pairs of ``data=…``.
    """

    name: str
    needs: Needs
    table: Callable[[Any], Any]
    section: Callable[[Any], Section | None]
    start: Callable[[Any], object] = lambda given: None
    cost: Callable[[Any], list[Cost]] = lambda given: []
    node: str = ""
    keys: Sequence[str] = ()
    missing: str = "the run logged nothing for it"
    while_training: bool = False
    done_in_training: bool = False
    every_pair: bool = False
    takes_other_corpus: bool = False

    def answer(self, given: Any) -> Section | None:
        """The section, with its table computed first; None where there is nothing to show."""
        table = self.table(given)
        return None if table is None else self.section(table)


def of_states(
    name: str,
    table: Callable[[Any], Any],
    section: Callable[[Any], Section | None],
    *,
    several_steps: bool = False,
    random_weights: bool = False,
    while_training: bool = False,
) -> Analysis:
    """Drawn of hidden states, which are read once for all such analyses."""
    also = "" if several_steps else ", or two models that differ, and at least four pairs whose responses do"
    return Analysis(
        name,
        Needs("states", several_steps, random_weights),
        table,
        section,
        keys=("hidden_states", *_MODEL_KEYS),
        missing=f"{_NO_READINGS}{also})",
        while_training=while_training,
    )


def of_models(
    name: str,
    section: Callable[[Any], Section | None],
    *,
    node: str,
    table: Callable[[Asking], Any] = lambda given: given.question.table(given.models),
    cost: Callable[[Asking], list[Cost]] = lambda given: given.question.costs(given.models),
    reaches: Sequence[str] = (),
    done_in_training: bool = False,
    every_pair: bool = False,
    takes_other_corpus: bool = False,
) -> Analysis:
    """Asked of both models, by what its node builds: an object with ``dtype``, ``device``, ``costs(models)`` and ``table(models)``.

    Where it has an ``asks_base_alone`` that is true, a study makes its table once for all runs.

    Args:
        reaches: keys of scorers and judges, which its ``start(models)`` reaches; none: what doesn't fit is refused by ``cost``.
    """
    return Analysis(
        name,
        Needs("models"),
        table,
        section,
        start=(lambda given: given.question.start(given.models)) if reaches else cost,
        cost=cost,
        node=node,
        keys=(node, *reaches, *_MODEL_KEYS),
        done_in_training=done_in_training,
        every_pair=every_pair,
        takes_other_corpus=takes_other_corpus,
    )
