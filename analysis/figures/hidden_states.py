"""What training did to hidden states: sections of the report and figures for trackers, from metrics.csv and snapshots/.

Nothing is computed from a model here: curves come from what callbacks logged, histograms from the rows that they stored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from analysis.figures.fig1a_plane import Parting, parting_of, preference_plane_section
from analysis.figures.fig1a_projection import projection_section
from analysis.figures.fig1c_clouds import cloud_section
from analysis.figures.fig3_consistency import consistency_section
from analysis.figures.fig3_cosines import CosineSet, cosine_section, deepest_cosines
from analysis.figures.fig4a_controls import entropy_control_section
from analysis.figures.fig4a_entropy import entropy_section
from analysis.figures.fig4b_signal_rank import signal_rank_section
from analysis.figures.fig4b_singular_values import singular_value_section
from analysis.figures.layer_curves import geometry_section
from analysis.figures.layer_maps import layers_by_step_section
from analysis.figures.stored_spectra import spectra_table
from analysis.open.observations import DIVERGE, latest, observed, updates
from analysis.open.runs import Run
from analysis.open.stored_rows import StoredRows, latest_rows
from analysis.report.page import Section
from tiltmeter.errors import UserError
from tiltmeter.weights.random_update import RandomUpdates


@dataclass(frozen=True)
class Watched:
    """What a run has logged and stored of its hidden states, finished or not.

    Args:
        metrics: metrics.csv.
        snapshots: the run's snapshots/ folder, there or not.
    """

    metrics: pd.DataFrame
    snapshots: Path

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row for each observation, position and site."""
        return observed(self.metrics)

    @cached_property
    def rows(self) -> StoredRows | None:
        """Those of the last stored observation, at ``prompt_last`` where it was read.

        Raises:
            UserError: a snapshot is damaged; names the file.
        """
        return latest_rows(self.snapshots, self.metrics)

    @cached_property
    def parting(self) -> Parting | None:
        """Stored states that predict the tokens in which responses part: at ``diverge``, or the usual ones that are the same.

        Raises:
            UserError: a file of the run is damaged; names it.
        """
        return parting_of(
            latest_rows(self.snapshots, self.metrics, position=DIVERGE) or self.rows, self.snapshots.parent
        )

    @cached_property
    def steps_taken(self) -> int | None:
        """Optimizer steps behind the last update that was read; None without one."""
        seen = latest(updates(self.table))
        return int(seen["steps_taken"].iloc[0]) if len(seen) else None

    @cached_property
    def random(self) -> RandomUpdates | None:
        """The last update's random counterparts; None where none were read, or of an earlier update only.

        Raises:
            UserError: their file is damaged; names it.
        """
        found = RandomUpdates.read(self.snapshots)
        return found if found is not None and found.steps_taken == self.steps_taken else None

    @property
    def lacks_random(self) -> bool:
        """Whether there is an update without random counterparts."""
        return self.steps_taken is not None and self.random is None

    @cached_property
    def cosines(self) -> CosineSet | None:
        """Pair by pair, of :attr:`rows`."""
        return None if self.rows is None else deepest_cosines(self.rows)

    @cached_property
    def spectra(self) -> pd.DataFrame:
        """Of :attr:`rows`, under every control; empty without them."""
        return pd.DataFrame() if self.rows is None else spectra_table(self.rows)

    @classmethod
    def of_run(cls, run: Run) -> "Watched":
        """That of a finished run."""
        return cls(run.metrics, run.folder / "snapshots")

    @classmethod
    def of_folder(cls, run_dir: Path) -> "Watched":
        """That of a run which this process is writing; for a finished one, which may be damaged, use :meth:`of_run`."""
        return cls(pd.read_csv(run_dir / "metrics.csv"), run_dir / "snapshots")


_BUILDERS: Mapping[str, Callable[[Watched], Section | None]] = {
    "geometry": lambda seen: geometry_section(seen.table, seen.random),
    "entropy": lambda seen: entropy_section(seen.table, seen.random),
    "entropy_controls": lambda seen: (
        None if seen.rows is None else entropy_control_section(seen.rows, seen.spectra, seen.random)
    ),
    "singular_values": lambda seen: (
        None if seen.rows is None else singular_value_section(seen.rows, seen.spectra, seen.random)
    ),
    "signal_rank": lambda seen: None if seen.rows is None else signal_rank_section(seen.rows, seen.spectra),
    "layers_by_step": lambda seen: layers_by_step_section(seen.table),
    "cosines": lambda seen: None if seen.cosines is None else cosine_section(seen.cosines, seen.random),
    "consistency": lambda seen: None if seen.rows is None else consistency_section(seen.rows, seen.random),
    "clouds": lambda seen: None if seen.rows is None else cloud_section(seen.rows),
    "projection": lambda seen: projection_section(seen.table, seen.metrics),
    "preference_plane": lambda seen: preference_plane_section(seen.parting),
}
SECTIONS = tuple(_BUILDERS)
"""Names of the sections, in the order of the report."""
BESIDE_RANDOM = ("geometry", "entropy", "entropy_controls", "singular_values", "cosines", "consistency")
"""Those that hold the update against random weight changes."""
WHILE_TRAINING = ("geometry", "entropy", "layers_by_step", "cosines", "projection")
"""Those that are quick enough to be drawn after every look at the probe."""


def hidden_state_section(name: str, seen: Watched) -> Section | None:
    """One section; None when the run logged or stored nothing for it.

    Raises:
        UserError: a snapshot is damaged; names the file.
    """
    return _BUILDERS[name](seen)


def section_of_run(name: str, run: Run) -> Section:
    """One section of a finished run.

    Raises:
        UserError: the run has nothing for it, or a snapshot is damaged.
    """
    found = hidden_state_section(name, Watched.of_run(run))
    if found is None:
        raise UserError(
            f"analysis={name}: {run.folder} has no readings for it (expected a run trained with callbacks=geometry or "
            "callbacks=full that took at least one step)"
        )
    return found


def hidden_state_sections(seen: Watched, names: Sequence[str] = SECTIONS) -> list[Section]:
    """The sections of these names that a run has readings for; none for a run without a probe.

    Raises:
        UserError: a snapshot is damaged; names the file.
    """
    found = [hidden_state_section(name, seen) for name in names]
    return [section for section in found if section is not None]
