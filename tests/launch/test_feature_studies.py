"""A study of sparse features: each seed's steering takes the autoencoder of that seed, and claim F1 is told of it."""

import json
from pathlib import Path

import pandas as pd
import pytest

from analysis.open.studies import open_study
from datamodules.synthetic_phrases import ATTRIBUTES
from launch.configuration import prepare_overrides
from launch.studies.running import run_study
from tests.cli import TINY
from tests.launch.test_studies import start
from tests.processes import run_script
from tiltmeter.errors import UserError
from tiltmeter.sparse.steering_file import load_steering

pytestmark = pytest.mark.slow
SHORT = (
    "trainer.max_steps=2",
    "trainer.max_epochs=1",
    "trainer.val_check_interval=1.0",
    "logger=csv",
    "callbacks=geometry",
)
OPTIONS = (
    'study.options={sparse_autoencoder:["callbacks=none","module.width=32","module.k=4","module.buffer_rows=300"],'
    'fsrl:["module.learning_rate=1e-2"]}'
)
STUDY = (
    *("--multirun", "study=fsrl", "study.arms={dpo:1,sparse_autoencoder:2,fsrl:2}", OPTIONS, "experiment=tiny_style"),
    *(*TINY, *SHORT, "~callbacks.random_update", "datamodule.probe_pairs=16"),
)


def train_study(root: Path, *options: str) -> Path:
    return run_study(prepare_overrides([*STUDY, *options, f"runs_root={root}"], config_name="train"), start=start)


def test_each_seed_steers_the_features_of_its_own_autoencoder_and_f1_is_told(tmp_path: Path) -> None:
    folder = train_study(tmp_path)
    study = open_study(folder)
    assert {arm: len(runs) for arm, runs in study.runs.items()} == {"dpo": 1, "fsrl": 2}
    assert study.left_out == []
    assert "sparse_autoencoder" not in study.planned
    saes = [load_steering(run.folder / "adapter" / "steering.safetensors").options.sae for run in study.runs["fsrl"]]
    seeds = [open_seed(Path(sae).parent) for sae in saes]
    assert seeds == [0, 1]
    options = (
        "sparse_features.n_random=3",
        "sparse_features.n_relabelled=2",
        f"sparse_features.dpo={study.runs['dpo'][0].folder}",
    )
    done = run_script("analyze.py", f"runs={folder}", "claims=fsrl", *options)
    assert done.returncode == 0, done.stderr
    tables = study.runs["fsrl"][0].report / "tables"
    ablations = pd.read_csv(tables / "sparse_features.csv").set_index("ablated")
    assert list(ablations.index) == ["none", "alignment", "style", "both", "all", *ATTRIBUTES]
    assert ablations["planted_weight"][["excitement", "tone", "length"]].tolist() == pytest.approx([0.8, 0.6, 0])
    assert (tables / "sparse_features_overlap.csv").is_file()
    assert not (study.runs["dpo"][0].report / "tables" / "sparse_features.csv").exists()
    (claim,) = json.loads((folder / "report" / "claims.json").read_text("utf-8"))["claims"]
    assert (claim["claim"], claim["verdict"]) == ("F1", "inconclusive"), (
        "two seeds, and no feature of a class in two steps"
    )


def open_seed(run: Path) -> int:
    config = (run / "config.yaml").read_text(encoding="utf-8")
    return int(next(line for line in config.splitlines() if line.startswith("seed:")).split()[1])


@pytest.mark.parametrize(
    "options", ['+study.options.sft_chosen=["a=1"]', 'study.options.fsrl="a=1"', "study.options.fsrl=[nothing]"]
)
def test_options_of_no_arm_or_no_words_are_one_line(options: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"study\.options\.(sft_chosen|fsrl): expected an arm of study\.arms with a list"
    ):
        train_study(tmp_path, options)
