"""The hidden states that a run stored last, beside those of its base model: the rows behind figures drawn pair by pair."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analysis.open.observations import USUAL_POSITION
from analysis.open.probe_pairs import PROMPTS_FILE, read_probe_pairs
from tiltmeter.metric_names import STEPS_TAKEN
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM, site_depth
from tiltmeter.states.snapshots import BASE, MANIFEST, SnapshotReader

_STEP_NAME = re.compile(r"(epoch|step)=(\d+)")
_ANY_DEPTH = 10**6


@dataclass(frozen=True)
class StoredRows:
    """Rows of the same tokens under both models, at one position and every site, in the order of the forward pass.

    Args:
        snapshot: name of the observation after training.
        position: which token.
        dtype: that they were stored in.
        pair_ids: of each row; a pair has two rows where each response has its own token.
        clusters: prompt of each row, for intervals; the pair's id where the run didn't keep its prompts.
        base, policy: by site.
        n_left_out: rows with NaN or infinity under either model, which are not here.
    """

    snapshot: str
    position: str
    dtype: str
    pair_ids: Sequence[str]
    clusters: Sequence[str]
    base: Mapping[str, Float[Tensor, "row d_model"]]
    policy: Mapping[str, Float[Tensor, "row d_model"]]
    n_left_out: int

    @property
    def sites(self) -> list[str]:
        """In the order of the forward pass."""
        return list(self.base)

    @property
    def n_rows(self) -> int:
        """N."""
        return len(self.pair_ids)

    def update(self, site: str) -> Float[Tensor, "row d_model"]:
        """ΔH = h_π − h_0 in float64."""
        return self.policy[site].double() - self.base[site].double()

    def shown_sites(self) -> list[str]:
        """The two sites of figures that have no room for all: the middle decoder block, and the one furthest along."""
        blocks = [site for site in self.sites if site not in (FINAL_PRE_NORM, FINAL_POST_NORM)]
        middle = [blocks[len(blocks) // 2]] if blocks else []
        return list(dict.fromkeys([*middle, self.sites[-1]]))

    def notes(self) -> list[str]:
        """What a reader has to know of these rows, for the report."""
        lines = []
        if self.n_left_out:
            lines.append(f"{self.n_left_out} rows hold NaN or infinity and are left out.")
        if self.dtype != "float32":
            lines.append(f"States were kept as {self.dtype}, whose rounding is 5 to 74 % of small updates.")
        return lines


def latest_rows(snapshots: Path, metrics: pd.DataFrame, *, position: str | None = None) -> StoredRows | None:
    """The last stored observation; None without one, without a base, or before anything changed.

    Args:
        snapshots: the folder of a run.
        metrics: metrics.csv, which says when an epoch ended.
        position: None: ``prompt_last``, or the first one stored when it is not among them.

    Raises:
        UserError: a snapshot or the run's file of prompts is damaged; names the file.
    """
    if not (snapshots / MANIFEST).is_file():
        return None
    reader = SnapshotReader(snapshots)
    name = latest_name(reader.names, metrics)
    if name is None or BASE not in reader.names or not reader.points:
        return None
    if position is None:
        position = USUAL_POSITION if USUAL_POSITION in reader.manifest.labels else reader.points[0].position
    points = [p for p in reader.points if p.position == position]
    if not points:
        return None
    points.sort(key=lambda point: site_depth(point.site, _ANY_DEPTH))
    before, after = reader.load(BASE), reader.load(name)
    there = torch.stack([(before[p].rows + after[p].rows).isfinite().all(1) for p in points]).all(0)
    base = {p.site: before[p].rows[there] for p in points}
    policy = {p.site: after[p].rows[there] for p in points}
    ids = [i for i, kept in zip(reader.manifest.labels[position].pair_ids, there.tolist(), strict=True) if kept]
    groups = {pair.pair_id: pair.group for pair in read_probe_pairs(snapshots.parent / PROMPTS_FILE)}
    clusters = [groups.get(i, i) for i in ids]
    n_left_out = int((~there).sum())
    return changed_rows(StoredRows(name, position, reader.manifest.dtype, ids, clusters, base, policy, n_left_out))


def changed_rows(rows: StoredRows) -> StoredRows | None:
    """The same; None with fewer than two rows, or where nothing changed at any site."""
    is_same = all(torch.equal(rows.base[site], rows.policy[site]) for site in rows.sites)
    return None if rows.n_rows < 2 or is_same else rows


def latest_name(names: Sequence[str], metrics: pd.DataFrame) -> str | None:
    """The stored observation that was taken last; names tell steps or epochs, metrics.csv when each epoch ended.

    >>> seen = pd.DataFrame({STEPS_TAKEN: [0, 5, 10], "epoch": [0, 0, 1]})
    >>> latest_name(["base", "epoch=000", "step=000007"], seen), latest_name(["base"], seen)
    ('step=000007', None)
    """
    ends: dict[int, float] = {}
    if STEPS_TAKEN in metrics and "epoch" in metrics:
        ends = metrics.groupby("epoch")[STEPS_TAKEN].max().dropna().to_dict()
    taken = {}
    for name in names:
        if match := _STEP_NAME.fullmatch(name):
            number = int(match[2])
            taken[name] = float(number) if match[1] == "step" else float(ends.get(number, number))
    return max(taken, key=lambda name: taken[name]) if taken else None
