"""What a run logs about hidden states is the same on two processes, and is what its stored snapshots say.

The model is float64, so that training itself differs by rounding alone and the figures can be held to 1e-6: they are of
differences between hidden states, in which the float32 noise of two processes would be a hundred times larger.
"""

from pathlib import Path

import pytest
import torch

from tests.cli import TINY, metrics_of, run_train, run_train_together
from tiltmeter.states.capture import ReadPoint
from tiltmeter.states.snapshots import BASE, SnapshotReader

pytestmark = pytest.mark.slow

OBSERVERS = ("snapshot", "projection", "spectra", "consistency")
# 13 pairs a step and 17 to probe: uneven shares on two processes, and fillers where one has fewer micro-batches.
RUN = (
    *(option for option in TINY if not option.startswith("datamodule.probe_pairs")),
    *("datamodule.probe_pairs=17", "datamodule.pairs_per_step=13", "datamodule.tokens_per_micro_batch=600"),
    *("model.dtype=float64", "callbacks=geometry", "callbacks.gradients.every_n_steps=2", "logger=csv"),
    "callbacks.random_update.n_draws=2",
    *(f"callbacks.{name}.every_n_steps=3" for name in OBSERVERS),
    "+callbacks.readout._target_=callbacks.preference_readout.PreferenceReadout",
    *("+callbacks.depth._target_=callbacks.alignment_depth.AlignmentDepth", "+callbacks.depth.n_pairs=9"),
    *("trainer.max_epochs=1", "trainer.val_check_interval=1.0"),
)
TWO_PROCESSES = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
NO_GEOMETRY = ("train/", "val/", "throughput/", "alarm/")

Figures = dict[tuple[int, str], float]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process; the others find its base in the cache beside it."""
    return train(tmp_path_factory.mktemp("runs"))


def train(root: Path, *options: str) -> Path:
    folder = root / "tiny_synthetic"
    before = set(folder.iterdir()) if folder.exists() else set()
    launch = run_train_together if "trainer.devices=2" in options else run_train
    done = launch(*RUN, *options, f"runs_root={root}")
    assert done.returncode == 0, done.stderr
    (run,) = set(folder.iterdir()) - before
    return run


def geometry(run: Path) -> Figures:
    """(optimizer steps taken, name) → value of every figure of hidden states or gradients."""
    rows = [row for row in metrics_of(run) if row["probe/steps_taken"]]
    return {
        (int(row["probe/steps_taken"]), name): float(value)
        for row in rows
        for name, value in row.items()
        if value and "/" in name and not name.startswith(NO_GEOMETRY)
    }


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_processes_log_the_geometry_of_one(trainer: str, single: Path) -> None:
    alone = geometry(single)
    families = {name.split("/")[0] for _, name in alone}
    assert {"spectral_entropy", "shift_share", "projection", "hyperplane", "mean_cosine", "gradient"} <= families
    assert {"direction_settled", "direction_cosine", "update_norm", "readout", "depth"} <= families
    run = train(single.parents[1], f"trainer={trainer}", *TWO_PROCESSES)
    together = geometry(run)
    if trainer == "fsdp":  # whose weights are in pieces: random ones are left to analyze.py
        alone = {key: value for key, value in alone.items() if "random_update" not in key[1]}
    assert together.keys() == alone.keys()
    for key, value in alone.items():
        assert together[key] == pytest.approx(value, rel=1e-6, abs=1e-6), key
    theirs, ours = (SnapshotReader(folder / "snapshots") for folder in (single, run))
    assert (ours.names, ours.manifest.labels) == (theirs.names, theirs.manifest.labels)
    for name in ours.names:
        a, b = ours.load(name), theirs.load(name)
        assert a.keys() == b.keys()
        for point in a:
            assert torch.equal(a[point].pair_index, b[point].pair_index)
            torch.testing.assert_close(a[point].rows, b[point].rows, rtol=1e-6, atol=1e-6)


def test_stored_snapshots_say_what_was_logged(single: Path) -> None:
    reader = SnapshotReader(single / "snapshots")
    logged = geometry(single)
    n_steps = max(steps for steps, _ in logged)
    steps_of = {name: int(name.removeprefix("step=")) for name in reader.names if name.startswith("step=")}
    steps_of["epoch=000"] = n_steps
    assert set(reader.names) == {BASE, *steps_of}
    assert len(steps_of) > 1
    base = reader.load(BASE)
    assert {point.position for point in reader.points} == {"prompt_last", "content"}
    sites = [point.site for point in reader.points if point.position == "prompt_last"]
    assert sites == ["layer_00", "final_pre_norm", "final_post_norm"]
    for name, steps in steps_of.items():
        policy = reader.load(name)
        for site in sites:
            point = ReadPoint(site, "prompt_last")
            before, after = base[point].rows.double(), policy[point].rows.double()
            assert len(before) == 17
            for of, rows in (("base", before), ("policy", after), ("delta", after - before)):
                for key, value in by_hand(rows, of, site).items():
                    assert logged[steps, key] == pytest.approx(value, rel=1e-6, abs=1e-6), (steps, key)


def by_hand(rows: torch.Tensor, of: str, site: str) -> dict[str, float]:
    """Entropies, top energy and shift share by a singular value decomposition, which shares no code with tiltmeter."""
    figures: dict[str, float] = {}
    for matrix, x in ((of, rows), (f"{of}_centred", rows - rows.mean(0))):
        sigma = torch.linalg.svdvals(x)
        sigma = sigma[sigma > 1e-9 * sigma[0]]
        for kind, weights in (("energy", sigma**2), ("singular", sigma)):
            p = weights / weights.sum()
            figures[f"spectral_entropy/{matrix}/{kind}/{site}"] = float(-(p * p.log()).sum())
        figures[f"top1_energy/{matrix}/{site}"] = float(sigma[0] ** 2 / (sigma**2).sum())
    shift = len(rows) * rows.mean(0).square().sum() / rows.square().sum()
    return figures | {f"shift_share/{of}/{site}": float(shift)}
