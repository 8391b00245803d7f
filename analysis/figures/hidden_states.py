"""What a run has logged and stored of its hidden states, in metrics.csv and snapshots/; no model is asked."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from analysis.figures.fig1a_plane import Parting, parting_of
from analysis.figures.fig3_cosines import CosineSet, deepest_cosines
from analysis.figures.stored_spectra import spectra_table
from analysis.open.observations import DIVERGE, latest, observed, updates
from analysis.open.runs import Run
from analysis.open.stored_rows import StoredRows, latest_rows
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
