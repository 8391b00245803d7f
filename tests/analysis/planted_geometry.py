"""What callbacks would log and store, made from planted updates: metrics.csv rows and a snapshots/ folder."""

from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from analysis.open.observed import Observed
from tests.analysis.conftest import dpo_rows
from tiltmeter.files import write_json
from tiltmeter.models.layers import FINAL_POST_NORM, all_sites
from tiltmeter.pairs.batch import PROMPT
from tiltmeter.states.capture import HiddenStates, ReadPoint
from tiltmeter.states.observed_metrics import consistency_metrics, spectral_metrics
from tiltmeter.states.snapshots import BASE, SnapshotWriter
from tiltmeter.states.state_pair import StatePair

N_PAIRS, WIDTH = 24, 16
N_PARTING = 20
States = dict[ReadPoint, HiddenStates]


def base_states(n_layers: int = 3, *, position: str = "prompt_last", seed: int = 0) -> States:
    """Random states at every site."""
    generator = torch.Generator().manual_seed(seed)
    index, sides = torch.arange(N_PAIRS), torch.full((N_PAIRS,), PROMPT)
    return {
        ReadPoint(site, position): HiddenStates(  # type: ignore[arg-type]
            torch.randn(N_PAIRS, WIDTH, generator=generator), index, sides
        )
        for site in all_sites(n_layers)
    }


def moved(states: States, *, shift: float, noise: float = 0.1, seed: int = 1) -> States:
    """The states after an update that is a constant shift, growing with depth, and noise."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.zeros(WIDTH)
    direction[0] = 1.0
    found = {}
    for depth, (point, before) in enumerate(states.items()):
        update: Tensor = shift * (depth + 1) * direction + noise * torch.randn(N_PAIRS, WIDTH, generator=generator)
        found[point] = before._replace(rows=before.rows + update)
    return found


def projection_figures(site: str, delta: float) -> dict[str, float]:
    """What PreferenceProjection logs at one site."""
    figures = {}
    for kind, scale in (("projection", 1.0), ("projection_sequence", 0.5)):
        change = scale * delta
        figures |= {f"{kind}/base/{site}": 1.0, f"{kind}/policy/{site}": 1.0 + change, f"{kind}/delta/{site}": change}
        figures |= {f"{kind}/delta_low/{site}": change - 0.2, f"{kind}/delta_high/{site}": change + 0.2}
        figures |= {f"{kind}/share_grown/{site}": 0.8, f"{kind}/share_grown_low/{site}": 0.7}
        figures[f"{kind}/share_grown_high/{site}"] = 0.9
    return figures | {f"direction_cosine/token/{site}": 0.12, f"direction_cosine/sequence/{site}": 0.21}


def geometry_rows(
    n_layers: int = 3, shifts: tuple[float, ...] = (0.1, 0.4), *, delta: float = 0.5
) -> list[dict[str, float]]:
    """Rows of metrics.csv: the base before training, then an observation for each shift, every five steps."""
    base = base_states(n_layers)
    rows: list[dict[str, float]] = []

    def add(steps: int, epoch: int, figures: dict[str, float]) -> None:
        rows.append({"step": max(steps - 1, 0), "epoch": epoch, "probe/steps_taken": steps} | figures)

    for epoch, shift in enumerate((0.0, *shifts)):
        policy = base if epoch == 0 else moved(base, shift=shift)
        steps, spectra, consistency, projection = 5 * epoch, {}, {}, {}
        for point in base:
            spectra |= spectral_metrics(StatePair(base, policy), point)
            consistency |= consistency_metrics(StatePair(base, policy), point)
            if epoch:
                projection |= projection_figures(point.site, delta)
        for figures in (projection, spectra, consistency):  # a row a callback, as they write
            if figures:
                add(steps, max(epoch - 1, 0), figures)
    return rows


def run_rows(**options: object) -> list[dict[str, float]]:
    """A training log with the probe's rows among the others."""
    return sorted(dpo_rows() + geometry_rows(**options), key=lambda row: row["step"])  # type: ignore[arg-type]


def write_snapshots(
    folder: Path, *, n_layers: int = 3, shifts: tuple[float, ...] = (0.1, 0.4), dtype: str = "float32"
) -> None:
    """base and an epoch for each shift; beside them the pairs and the base's unembedding, as in a run folder."""
    base = base_states(n_layers)
    write_pairs(folder.parent)
    writer = SnapshotWriter(folder, dtype=dtype, pair_ids={i: f"pair/{i}" for i in range(N_PAIRS)})
    writer.write(BASE, base)
    for epoch, shift in enumerate(shifts):
        writer.write(f"epoch={epoch:03d}", moved(base, shift=shift))


def write_pairs(run_dir: Path) -> None:
    """probe_prompts.json and base/: the responses of the first :data:`N_PARTING` pairs differ from their first token on."""
    pairs = [
        {
            **dict.fromkeys(("source", "prompt", "chosen", "rejected"), "text"),
            "pair_id": f"pair/{i}",
            "group": f"prompt {i // 2}",
            "prompt_ids": [1],
            "chosen_ids": [2 + i % 5, 9] if i < N_PARTING else [1, 9],
            "rejected_ids": [8, 9] if i < N_PARTING else [1, 8],
            "attributes": {},
        }
        for i in range(N_PAIRS)
    ]
    write_json(run_dir / "probe_prompts.json", pairs)
    (run_dir / "base").mkdir(exist_ok=True)
    save_file({"lm_head.weight": unembedding_weight()}, run_dir / "base" / "model.safetensors")


def unembedding_weight() -> Tensor:
    """W_U of a vocabulary of ten."""
    return torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(5))


def noise(n: int, d: int, seed: int = 0) -> Tensor:
    """Independent normal entries."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


POINT = ReadPoint(FINAL_POST_NORM, "prompt_last")
"""Of :func:`one_site`."""


def one_site(base: Tensor, policy: Tensor) -> StatePair:
    """Planted rows at :data:`POINT`."""
    labels = torch.arange(len(base)), torch.full((len(base),), PROMPT)
    return StatePair({POINT: HiddenStates(base, *labels)}, {POINT: HiddenStates(policy, *labels)}, name="epoch=000")


def stored(folder: Path, rows: list[dict[str, float]] | None = None) -> Observed:
    """What is found in a folder, and in these rows of metrics.csv; None: those of a planted run."""
    return Observed.stored(folder, pd.DataFrame(rows or run_rows()))


def planted_run(folder: Path, **options: object) -> Observed:
    """What a run in that folder has logged and stored."""
    write_snapshots(folder / "snapshots", **options)  # type: ignore[arg-type]
    return stored(folder)


def of_pair(states: StatePair) -> Observed:
    """Rows alone, as if they had just been read."""
    return Observed(pd.DataFrame(), pd.DataFrame(), lambda: states, lambda: None, lambda ids, width: None)
