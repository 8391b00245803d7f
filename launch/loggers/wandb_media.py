"""Pictures of the hidden states and a table of samples for W&B while a run trains, and two small artifacts when it ends."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from safetensors import safe_open

from analysis.figures.fig3_consistency import EDGES, OF_PAIRS
from analysis.open.observed import Observed
from analysis.registry import ANALYSES, sections_of_states
from analysis.report.style import png_bytes
from launch.loggers.wandb_logger import RunLogger
from tiltmeter.metric_names import STEP_AXIS, metric
from tiltmeter.scoring.behaviour import SAMPLES, read_table

MOST_SAMPLES = 1000
"""Rows of a table of samples; W&B itself takes 10,000."""


class WandbMedia(Callback):
    """Uploads the report's figures of hidden states after every observation, histograms already binned, and scored samples.

    Some 100 kB a figure. At the end of training, as artifacts: the manifest of snapshots/ (what was read, of which pairs, with
    hashes; the rows stay in the run folder) and the steering vectors v*. Goes behind the callbacks that observe. A failure
    is reported once and ends the uploads, not the training.

    Args:
        logger: an open W&B run.
        run_dir: where metrics.csv, snapshots/ and vectors/ are.
    """

    def __init__(self, logger: RunLogger, run_dir: Path) -> None:
        self.logger = logger
        self.run_dir = run_dir
        self._shown: int | None = None
        self._n_scored = 0
        self._failed = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show what was observed after this step."""
        self._show(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what was observed after this epoch."""
        self._show(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand over the last scores and the small files."""
        self._show(trainer)
        self._attempt(self._send_artifacts)

    def _show(self, trainer: Trainer) -> None:
        if self.logger.observed_at != self._shown:
            self._shown = self.logger.observed_at
            self._attempt(lambda: self._send_figures(max(trainer.global_step - 1, 0)))

        if self.logger.n_scored != self._n_scored:
            self._n_scored = self.logger.n_scored
            self._attempt(lambda: self._send_samples(max(trainer.global_step - 1, 0)))

    def _attempt(self, send: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            send()
        except Exception as error:  # a picture is no reason to stop training
            self._failed = True
            warnings.warn(f"W&B got no figures or artifacts ({error}); the run folder has everything", stacklevel=2)

    def _send_figures(self, step: int) -> None:
        import wandb

        seen = Observed.stored(self.run_dir, pd.read_csv(self.run_dir / "metrics.csv"))
        media: dict[str, Any] = {}
        for section in sections_of_states(seen, [a for a in ANALYSES if a.while_training]):
            picture = Image.open(io.BytesIO(png_bytes(section.figure)))
            media[metric("figures", section.name)] = wandb.Image(picture, caption=". ".join(section.sentences))
            if section.name == "cosines":
                site = section.more_tables["cosines_about"]["site"].iloc[0]
                for side in OF_PAIRS:
                    counts = section.table[f"{side}_pairs"].to_numpy()
                    media[metric("cosines", side, site)] = wandb.Histogram(np_histogram=(counts, EDGES))
        if media:
            self.logger.experiment.log(media | {STEP_AXIS: step})

    def _send_samples(self, step: int) -> None:
        """Base and policy side by side with all scores, as they are in the run folder now."""
        import wandb

        table = read_table(self.run_dir / "report" / "tables" / SAMPLES)
        if not table.empty:
            rows = table[table["steps_taken"] == table["steps_taken"].max()].head(MOST_SAMPLES)
            self.logger.experiment.log({metric("samples"): wandb.Table(dataframe=rows), STEP_AXIS: step})

    def _send_artifacts(self) -> None:
        import wandb

        run = self.logger.experiment
        manifest, vectors = (
            self.run_dir / "snapshots" / "manifest.json",
            self.run_dir / "vectors" / "steering.safetensors",
        )
        if manifest.is_file():
            about = "What snapshots/ of the run folder holds, with hashes. The rows themselves stay there."
            self._send_file(
                wandb.Artifact(f"snapshots-{run.id}", type="snapshot-manifest", description=about), manifest
            )
        if vectors.is_file():
            with safe_open(vectors, framework="pt") as file:
                metadata = dict(file.metadata() or {})
            about = "v* of every site and position: mean change of the hidden state over the probe's pairs."
            self._send_file(
                wandb.Artifact(f"steering-{run.id}", type="steering-vectors", description=about, metadata=metadata),
                vectors,
            )

    def _send_file(self, artifact: Any, path: Path) -> None:
        artifact.add_file(str(path), policy="immutable", skip_cache=True)  # read where it is, not copied to a cache
        self.logger.experiment.log_artifact(artifact)
