"""The command line on real data and a real checkpoint: Anthropic HH files, OASST trees, their mixture, stories260K."""

import math
from pathlib import Path

import pytest

from tests.cli import TINY, logged, only_run, run_train
from tests.stories260k import convert

pytestmark = pytest.mark.slow
SMALL = ("datamodule.val_pairs=20", "datamodule.probe_pairs=8", "datamodule.max_length=256", "logger=csv")
TINY_MODEL = tuple(o for o in TINY if o.startswith(("model.", "base.")))


@pytest.fixture(scope="module")
def stories260k(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(shared_data / "models" / "stories260K", tmp_path_factory.mktemp("models") / "stories260K")


def test_stories260k_learns_the_synthetic_preferences(stories260k: Path, tmp_path: Path) -> None:
    done = run_train(
        f"model.name_or_path={stories260k}", f"runs_root={tmp_path}", "data.n_prompts=260", "datamodule.max_length=400",
        "datamodule.val_pairs=60", "datamodule.probe_pairs=10", "datamodule.pairs_per_step=10", "module.learning_rate=2e-3",
        "trainer.max_epochs=1", "logger=csv", "callbacks=none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Base:" not in done.stdout, "a pretrained model is its own base"
    run = only_run(tmp_path)
    assert logged(run, "train/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(run, "val/rewards/accuracies")[-1] > 0.65
    for name in ("base", "aligned"):
        assert (run / name / "model.safetensors").is_file()


def test_stories260k_trains_on_real_hh(shared_data: Path, stories260k: Path, tmp_path: Path) -> None:
    done = run_train(
        "experiment=tiny_hh", f"data.path={shared_data / 'hh-rlhf'}", f"model.name_or_path={stories260k}", f"runs_root={tmp_path}",
        *SMALL, "datamodule.train_pairs=64", "trainer.max_steps=3", "trainer.val_check_interval=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = logged(only_run(tmp_path, "tiny_hh"), "train/loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(losses) == 3


def test_a_mixture_of_hh_and_oasst_reports_metrics_per_source(shared_data: Path, tmp_path: Path) -> None:
    done = run_train(
        "data=hh_oasst1", f"data.sources.hh.path={shared_data / 'hh-rlhf' / 'helpful-base_test.jsonl.gz'}",
        f"data.sources.oasst1.path={shared_data / 'oasst' / 'oasst1_en100_trees.part80.jsonl.gz'}", f"runs_root={tmp_path}",
        *SMALL, *TINY_MODEL, "datamodule.train_pairs=48", "trainer.max_steps=3",
        "datamodule.pairs_per_step=16", "trainer.val_check_interval=3", "callbacks=none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    for source in ("hh/helpful-base_test", "oasst1"):
        assert logged(run, f"val/rewards/accuracies/{source}"), source
        assert logged(run, f"train/loss/{source}")[0] == pytest.approx(math.log(2), abs=1e-5)


def test_the_concatenated_layout_gives_the_losses_of_the_shared_prefix_on_hh(shared_data: Path, tmp_path: Path) -> None:
    common = (
        "data=hh", f"data.path={shared_data / 'hh-rlhf' / 'harmless-base_test.part80.jsonl.gz'}", *SMALL, *TINY_MODEL,
        "datamodule.train_pairs=48", "datamodule.pairs_per_step=12", "trainer.max_steps=4", "trainer.val_check_interval=2",
        "callbacks=none",
        f"runs_root={tmp_path}",
    )  # fmt: skip
    losses = []
    for layout in ("shared_prefix", "concatenated"):
        done = run_train(*common, f"datamodule.layout={layout}", f"name={layout}")
        assert done.returncode == 0, done.stderr
        run = only_run(tmp_path, layout)
        losses.append(logged(run, "train/loss") + logged(run, "val/loss"))
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
