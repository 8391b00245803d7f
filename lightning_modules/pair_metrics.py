"""Figures of pairs as metrics: exact means over a step or a whole split, over all pairs and over each source's."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.preference import PreferenceDataModule
from datamodules.splits import Split
from tiltmeter.metric_names import metric
from tiltmeter.pairs.batch import PreferenceBatch


class PairResults(NamedTuple):
    """Results of one micro-batch."""

    objective: Tensor
    """Scalar to minimise: a SUM over real pairs (or tokens); the step divides it."""
    columns: Tensor
    """[pair, len(module.columns)] detached figures per pair, float32."""


class PairMetrics:
    """Sums of figures per pair, by source; each pair counts once, whatever batches and processes."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._sources: dict[Split, Tensor] = {}

    def collect(self, batch: PreferenceBatch, columns: Tensor) -> None:
        """Keep the figures of a held-out batch until :meth:`collected`."""
        real = batch.weights > 0
        self._rows.append((batch.pair_index[real], columns[real]))

    def collected(self, n_rows: int, n_columns: int, device: torch.device) -> Tensor:
        """[row of the split, column + 1] what this process collected, the last column 1 for rows that were scored."""
        table = torch.zeros(n_rows, n_columns + 1, device=device)
        for rows, values in self._rows:
            table[rows, :-1] = values
            table[rows, -1] = 1.0
        self._rows.clear()
        return table

    def sums_of_table(self, data: PreferenceDataModule, split: Split, table: Tensor) -> Tensor:
        """[source, column + 1] sums over the rows of a table of the whole split."""
        return self._add_up(data, self._source_of(data, split, table.device), table)

    def sums_of_batch(
        self, data: PreferenceDataModule, split: Split, batch: PreferenceBatch, columns: Tensor
    ) -> Tensor:
        """[source, column + 1] sums over the batch's real pairs, their number last."""
        source = self._source_of(data, split, columns.device)[batch.pair_index]
        values = torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1) * batch.weights[:, None]
        return self._add_up(data, source, values)

    @staticmethod
    def _add_up(data: PreferenceDataModule, source: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(len(data.sources), values.shape[1]).index_add(0, source, values)

    def _source_of(self, data: PreferenceDataModule, split: Split, device: torch.device) -> Tensor:
        if split not in self._sources:
            self._sources[split] = torch.tensor(data.source_index(split), device=device)
        return self._sources[split]


def metrics_by_source(
    sums: Tensor, sources: list[str], stage: str, from_sums: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Metrics over all pairs and, where pairs come from several sources, over each source's."""
    metrics = {metric(stage, name): value for name, value in from_sums(sums.sum(0)).items()}
    if len(sums) > 1:
        for source, row in zip(sources, sums, strict=True):
            if row[-1] > 0:
                metrics |= {metric(stage, name, source): value for name, value in from_sums(row).items()}
    return metrics
