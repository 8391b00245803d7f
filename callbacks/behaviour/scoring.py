"""The scoring half of GenerationMetrics, on the first process: quick scorers now, slow ones beside training, all of it kept."""

import logging
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Trainer

from callbacks.behaviour.completions import labelled_pairs_of
from callbacks.probe_session import log, report_failed_write
from datamodules.preference import PreferenceDataModule
from tiltmeter.errors import UserError
from tiltmeter.metric_names import SCORED_STEP
from tiltmeter.scoring.behaviour import BehaviourTables, Scored, ScoringBeside, score_all
from tiltmeter.scoring.scorer import Figure, Sample, Scorer, Scores, as_metrics, start_scorers


class Scoring:
    """Scores samples, logs ``behaviour/…`` and writes ``report/tables/{behaviour_by_step,samples}.csv`` of the run folder.

    Args:
        scorers: by the name that the configuration gives them.
    """

    def __init__(self, scorers: Mapping[str, Scorer]) -> None:
        self.scorers = dict(scorers)
        self._fast = {name: scorer for name, scorer in scorers.items() if not scorer.is_slow}
        self._beside = ScoringBeside({name: scorer for name, scorer in scorers.items() if scorer.is_slow})
        self._is_started = False

    def start(self, data: PreferenceDataModule) -> None:
        """Let scorers load or reach what they need, once; judges are held against held-out pairs. Raises UserError."""
        if not self._is_started:
            start_scorers(self.scorers.values(), world=data.source, pairs=labelled_pairs_of(data))
            self._is_started = True

    def score(self, trainer: Trainer, samples: list[Sample]) -> None:
        """Score what can be scored at once; the rest is asked for."""
        step, epoch = trainer.global_step, trainer.current_epoch
        self._record(trainer, Scored(step, epoch, samples, score_all(self._fast, samples)))
        self._beside.submit(step, epoch, samples)

    def collect(self, trainer: Trainer) -> None:
        """Log what slow scorers have finished since the last call."""
        for scored in self._beside.take():
            self._record(trainer, scored)

    def finish(self, trainer: Trainer, *, wait_seconds: float) -> None:
        """Wait for slow scorers, so long at most."""
        if n_late := self._beside.wait(wait_seconds):
            logging.getLogger(__name__).warning(
                f"behaviour: {n_late} sets of samples were not judged within {wait_seconds:.0f} s of the end of training; "
                "analyze.py run=… analysis=behaviour scores them again"
            )
        self.collect(trainer)

    def _record(self, trainer: Trainer, scored: Scored) -> None:
        _keep(trainer, scored)
        log(trainer, as_metrics(scored.scores.figures) | {SCORED_STEP: scored.step})


def record_figures(trainer: Trainer, figures: list[Figure]) -> None:
    """Log and keep figures of the model as it is now that are not about generated text; on the first process."""
    _keep(trainer, Scored(trainer.global_step, trainer.current_epoch, [], Scores(figures)))
    log(trainer, as_metrics(figures))


def forget_steps_ahead(trainer: Trainer) -> None:
    """Drop what was scored at steps that a resumed run will take again, once it is accepted."""
    if trainer.is_global_zero:
        _tables_of(trainer).forget_after(trainer.global_step)


def _tables_of(trainer: Trainer) -> BehaviourTables:
    return BehaviourTables(Path(trainer.default_root_dir) / "report" / "tables")


def _keep(trainer: Trainer, scored: Scored) -> None:
    tables = _tables_of(trainer)
    try:
        tables.add(scored.step, scored.epoch, scored.samples, scored.scores)
    except (OSError, UserError) as error:
        report_failed_write(tables.folder, error, trainer)
