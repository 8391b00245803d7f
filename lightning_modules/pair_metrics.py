"""Figures of pairs as metrics: exact means over a step or a whole split, over all pairs and over each source's."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from datamodules.preference import PreferenceDataModule
from datamodules.splits import Split
from lightning_modules.step_guard import CURE, some
from tiltmeter.errors import NumericalStop
from tiltmeter.metric_names import metric
from tiltmeter.pairs.batch import PreferenceBatch, StepBatch


class PairResults(NamedTuple):
    """What one micro-batch yields."""

    objective: Tensor
    """Scalar to minimise: a SUM over real pairs (or tokens); the step divides it."""
    columns: Tensor
    """[pair, len(module.columns)] detached figures per pair, float32."""


class PairMetrics(LightningModule):
    """A Lightning module that yields figures per pair; each pair counts once, whatever batches and processes."""

    columns: tuple[str, ...]
    """Names of the per-pair figures, which are also the metric names behind the stage."""

    def __init__(self) -> None:
        super().__init__()
        self.validation_table: Tensor | None = None
        """[row of the validation split, column] of the last validation, the same on every process; NaN: not scored."""
        self.validated_at_step = 0
        self._validation_rows: list[tuple[Tensor, Tensor]] = []
        self._source_cache: dict[Split, Tensor] = {}

    @abstractmethod
    def pair_results(self, batch: PreferenceBatch, split: Split) -> PairResults:
        """Objective and per-pair figures of one micro-batch."""

    @property
    def data(self) -> PreferenceDataModule:
        """The data module of the current fit."""
        return cast(PreferenceDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]

    def validation_step(self, step: StepBatch, batch_idx: int) -> None:
        """Collect per-pair figures; they are averaged over the whole split at the end."""
        for batch in step.micro_batches:
            results = self.pair_results(batch, "val")
            real = batch.weights > 0
            self._validation_rows.append((batch.pair_index[real], results.columns[real]))

    def on_validation_epoch_end(self) -> None:
        """Means over all held-out pairs, each counted once, whatever batches and processes."""
        n_rows = len(self.data.splits["val"].pairs)
        table = torch.zeros(
            n_rows, len(self.columns) + 1, device=self.device
        )  # last column: 1 for rows that were scored
        for rows, values in self._validation_rows:
            table[rows, :-1] = values
            table[rows, -1] = 1.0
        self._validation_rows.clear()
        table = self._reduce(table)
        if self.trainer.sanity_checking:
            return
        if not table[table[:, -1] > 0].isfinite().all(1).any():
            raise NumericalStop(
                f"step {self.trainer.global_step}: the loss of every held-out pair is not finite "
                f"({some([record.pair_id for record in self.data.splits['val'].records])}), so the weights are of no use any "
                f"more. {CURE}"
            )
        self.validation_table = table[:, :-1].masked_fill(table[:, -1:] == 0, torch.nan).cpu()
        self.validated_at_step = self.trainer.global_step
        sums = table.new_zeros(len(self.data.sources), table.shape[1]).index_add(0, self._source_of("val"), table)
        self.log_dict(self._metrics_by_source(sums, "val"), batch_size=n_rows)

    def metrics_from_sums(self, sums: Tensor) -> dict[str, Tensor]:
        """Metric → value from [column + 1] sums over pairs, the last of which counts them. Default: means over pairs."""
        return {name: sums[i] / sums[-1] for i, name in enumerate(self.columns)}

    def _sums_by_source(self, batch: PreferenceBatch, columns: Tensor, split: Split) -> Tensor:
        """[source, column + count]: sums over the batch's real pairs, by source."""
        source = self._source_of(split)[batch.pair_index]
        values = torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1) * batch.weights[:, None]
        return values.new_zeros(len(self.data.sources), values.shape[1]).index_add(0, source, values)

    def _source_of(self, split: Split) -> Tensor:
        if split not in self._source_cache:
            self._source_cache[split] = torch.tensor(self.data.source_index(split), device=self.device)
        return self._source_cache[split]

    def _metrics_by_source(self, sums: Tensor, stage: str) -> dict[str, Tensor]:
        """Metrics over all pairs and, where pairs come from several sources, over each source's."""
        metrics = {metric(stage, name): value for name, value in self.metrics_from_sums(sums.sum(0)).items()}
        if len(sums) > 1:
            for source, row in zip(self.data.sources, sums, strict=True):
                if row[-1] > 0:
                    of_source = self.metrics_from_sums(row).items()
                    metrics |= {metric(stage, name, source): value for name, value in of_source}
        return metrics

    def not_finite(self, seen: Sequence[tuple[Tensor, Tensor]], split: Split) -> list[str]:
        """Ids of the pairs, of all processes, with a figure that isn't finite; of ([pair] rows, [pair, column] figures)."""
        records = self.data.splits[split].records
        marked = torch.zeros(len(records), device=self.device)
        for rows, columns in seen:
            marked[rows[~columns.isfinite().all(1)]] = 1
        return [records[row].pair_id for row in self._reduce(marked).nonzero()[:, 0].tolist()]

    def _reduce(self, tensor: Tensor) -> Tensor:
        """Sum over processes."""
        if self.trainer.world_size == 1:
            return tensor
        return cast(Tensor, self.trainer.strategy.reduce(tensor, reduce_op="sum"))
