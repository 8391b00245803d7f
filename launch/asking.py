"""Analyses that ask models, each planned before any of them starts: what it will take, and its section when it is run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from analysis.behaviour.asked import Behaviour
from analysis.behaviour.section import behaviour_section
from analysis.figures.fig2_steering import steering_section_of
from analysis.open.checkpoints import Checkpoints
from analysis.report.costs import Cost
from analysis.report.page import Section
from analysis.report.samples import Samples, samples_of
from analysis.steering.sweep import SteeringSweep, sweep_costs
from analysis.steering.table import OtherSettings
from launch.screen import FittingTable, console
from launch.steering import sweep_into
from tiltmeter.errors import FailedWrite, Unsupported, UserError
from tiltmeter.pairs.verification import best_layout


class Asked(NamedTuple):
    """What came of one analysis."""

    section: Section | None
    samples: Samples | None = None
    """What both models said, where they were made to speak."""
    lost: Sequence[str] = ()
    """Figures without a number, because too many scores are missing."""


class Question(Protocol):
    """What the node of an analysis builds; its answer is made by :class:`Plan` where it is more than a section."""

    dtype: str
    device: str | None


class _WithSection(Question, Protocol):
    def costs(self, checkpoints: Checkpoints) -> list[Cost]: ...

    def section(self, checkpoints: Checkpoints) -> Section: ...


class Plan:
    """One question about two models, which can be answered now.

    Args:
        name: of the analysis.
        question: as its node built it.
        checkpoints: opened.
        tables: where a table grows while it is made.
        goes_on_with: what to add to the command so that it goes on with these tables after a stop; None: nothing.
        takes_old: a table that is there with other settings is shown instead of refused.
        dry_run: nothing will be run: judges and the like aren't reached for.

    Raises:
        UserError: something that the answer needs is not there.
    """

    def __init__(
        self,
        name: str,
        question: Question,
        checkpoints: Checkpoints,
        *,
        tables: Path,
        goes_on_with: str | None,
        takes_old: bool,
        dry_run: bool,
    ) -> None:
        self.name, self.question, self.checkpoints = name, question, checkpoints
        self.tables, self.goes_on_with, self.takes_old = tables, goes_on_with, takes_old
        if isinstance(question, Behaviour | SteeringSweep):
            if not dry_run:
                question.start(checkpoints)
        else:
            self.costs()  # refuses sites and pairs that don't fit before any other analysis has begun

    def costs(self) -> list[Cost]:
        """Passes and tokens of each part."""
        if isinstance(self.question, SteeringSweep):
            return sweep_costs(self.question.plan(self.checkpoints))
        question: Behaviour | _WithSection = self.question  # type: ignore[assignment]
        return question.costs(self.checkpoints)

    def ask(self) -> Asked:
        """Run it.

        Raises:
            Unsupported: it fails, and the models are of a family that no rows can be shared in (ALiBi, state-space layers …).
        """
        try:
            return self._ask()
        except (UserError, FailedWrite):
            raise
        except Exception as error:
            model = self.checkpoints.base.model
            if best_layout(model, ()) == "shared_prefix":
                raise
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            raise Unsupported(
                f"{type(model).__name__} has no attention that rows can be shared in ({reason})"
            ) from error

    def _ask(self) -> Asked:
        if isinstance(self.question, Behaviour):
            return _behaviour(self.question, self.checkpoints)
        if isinstance(self.question, SteeringSweep):
            return self._sweep(self.question)
        question: _WithSection = self.question  # type: ignore[assignment]
        return Asked(question.section(self.checkpoints))

    def _sweep(self, question: SteeringSweep) -> Asked:
        try:
            swept = sweep_into(self.tables, question, self.checkpoints, goes_on_with=self.goes_on_with)
        except OtherSettings as error:
            if not self.takes_old:
                raise
            console().print(f"{error}; here it is shown as it is", soft_wrap=True)
            return Asked(steering_section_of(self.tables))
        if swept is None:
            return Asked(None)
        return Asked(swept.section, None, [f"{name} ({n} of the vectors)" for name, n in swept.missing.items()])


def _behaviour(question: Behaviour, checkpoints: Checkpoints) -> Asked:
    answers = question.score(checkpoints)
    figures = answers.scores.figures
    lost = [f"{f.name} of {f.of}" for f in figures if f.n_missing and math.isnan(f.value)]
    return Asked(behaviour_section(answers), samples_of(checkpoints.pairs, answers.samples, answers.decoding), lost)


def costs_table(costs: Mapping[str, Sequence[Cost]]) -> FittingTable:
    """What would be run, by analysis."""
    table = FittingTable(title="Would run", title_justify="left", title_style="bold")
    for column, justify in (("analysis", "left"), ("", "left"), ("passes", "right"), ("tokens", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, parts in costs.items():
        for i, cost in enumerate(parts):
            table.add_row("" if i else name, cost.name, f"{cost.forwards:,.1f}", f"{cost.tokens:,}")
    return table
