"""HiddenStateSnapshot: the probe's hidden states on disk, once before training and after every epoch."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks.observer import Observer
from callbacks.probe_session import data_of, report_failed_write
from tiltmeter.states.snapshots import BASE, SnapshotWriter, check_dtype, epoch_name
from tiltmeter.states.state_pair import StatePair


class HiddenStateSnapshot(Observer):
    """Writes ``snapshots/`` of the run folder; :class:`tiltmeter.states.snapshots.SnapshotReader` reads it.

    A full disk raises the alarm ``alarm/snapshot`` and training goes on.

    Args:
        dtype: ``float32``, or ``bfloat16``, whose rounding is 5 to 74 % of small updates.
        sites, positions, every_n_steps: see :class:`~callbacks.observer.Observer`.
    """

    def __init__(self, *, dtype: str = "float32", **options: Any) -> None:
        super().__init__(**options)
        self.dtype = dtype
        check_dtype(dtype)

    def on_observation(self, trainer: Trainer, module: LightningModule, seen: StatePair) -> None:
        """Write the rows of this moment."""
        if not trainer.is_global_zero:
            return
        data = data_of(trainer)
        folder = Path(trainer.default_root_dir) / "snapshots"
        writer = SnapshotWriter(
            folder,
            dtype=self.dtype,
            pair_ids=dict(enumerate(seen.pair_ids or ())),
            about={"probe_sha256": data.digest("probe")},
        )
        points = self.points(module, seen)
        moments = {self._name(trainer): seen.policy} if seen.steps_taken else {BASE: seen.base}
        if seen.steps_taken and not (folder / f"{BASE}.safetensors").exists():
            moments = {BASE: seen.base} | moments
        for name, states in moments.items():
            try:
                writer.write(name, {point: states[point] for point in points})
            except OSError as error:
                report_failed_write(folder, error, trainer)
                return

    def _name(self, trainer: Trainer) -> str:
        ends_epoch = trainer.global_step % data_of(trainer).steps_per_epoch == 0
        n_epochs = trainer.global_step // data_of(trainer).steps_per_epoch
        return epoch_name(n_epochs - 1) if ends_epoch else f"step={trainer.global_step:06d}"
