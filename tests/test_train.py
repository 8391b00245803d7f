"""The main job from the command line: the run folder, what W&B gets, the base found again, resuming, sweeping."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli import TINY, logged, metrics_of, only_run, run_train
from tests.wandb_file import history_rows, metric_definitions, run_config
from tiltmeter.checkpoint_files import verify

pytestmark = pytest.mark.slow
CANARY = "canary-secret-0123456789abcdef"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", CANARY)
        done = run_train(*TINY, f"runs_root={root}", "trainer.max_epochs=2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return root, done.stdout


def test_the_run_folder_holds_what_the_contract_says(finished: tuple[Path, str]) -> None:
    run = only_run(finished[0])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run.name)
    found = {path.name for path in run.iterdir()}
    assert found == {
        "config.yaml",
        "metrics.csv",
        "checkpoints",
        "base",
        "aligned",
        "wandb",
        "provenance.json",
        "held_out.csv",
    } | {"probe_prompts.json", "snapshots", "vectors", "report"}
    assert {path.name for path in (run / "report" / "tables").iterdir()} == {"behaviour_by_step.csv", "samples.csv"}
    links = {path.name: verify(path).step for path in (run / "checkpoints").iterdir() if path.is_symlink()}
    assert links.keys() == {"last.ckpt", "best.ckpt"}
    assert links["last.ckpt"] >= links["best.ckpt"] > 0
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["name"] == "tiny_synthetic"
    assert config["run_dir"] == str(run)
    assert "${" not in (run / "config.yaml").read_text(encoding="utf-8")


def test_the_last_checkpoint_is_the_last_validation_s_whether_it_was_the_best_or_not(
    finished: tuple[Path, str],
) -> None:
    run = only_run(finished[0])
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == len(logged(run, "train/loss"))


def test_base_and_aligned_open_with_transformers_and_differ_in_the_blocks_only(finished: tuple[Path, str]) -> None:
    run = only_run(finished[0])
    base, aligned = (AutoModelForCausalLM.from_pretrained(run / name).state_dict() for name in ("base", "aligned"))
    changed = {name for name in base if not torch.equal(base[name], aligned[name])}
    assert changed
    assert all(".layers." in name or name == "model.norm.weight" for name in changed), changed
    tokenizer = AutoTokenizer.from_pretrained(run / "aligned")
    text = "\n\nHuman: Hello?\n\nAssistant: Yes."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_first_loss_is_ln_2_and_rewards_start_at_0(finished: tuple[Path, str]) -> None:
    first = next(row for row in metrics_of(only_run(finished[0])) if row["train/loss"])
    assert first["step"] == "0"
    assert float(first["train/loss"]) == pytest.approx(math.log(2), abs=1e-6)
    for side in ("chosen", "rejected", "margins"):
        assert float(first[f"train/rewards/{side}"]) == pytest.approx(0, abs=1e-6)


def test_metric_names_are_those_of_the_contract(finished: tuple[Path, str]) -> None:
    rewards = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    logps = {"logps/chosen", "logps/rejected"}
    expected = {f"{stage}/{name}" for stage in ("train", "val") for name in {"loss"} | rewards | logps}
    expected |= {"throughput/tokens_per_second", "throughput/pairs_per_second", "step", "epoch"}
    expected |= {"throughput/padding_share", "throughput/saved_prompt_share"}
    sites = ("layer_00", "final_pre_norm", "final_post_norm")
    expected |= {f"projection/{of}/{site}" for of in ("base", "policy", "delta") for site in sites}
    spectra = {f"spectral_entropy/{of}/{kind}" for of in ("delta", "policy", "base") for kind in ("energy", "singular")}
    spectra |= {f"{what}/delta" for what in ("top1_energy", "shift_share", "sigma_ratio")}
    spectra |= {f"effective_rank/delta/{kind}" for kind in ("energy", "singular")}
    spectra |= {"shift_share/random_update", "shift_share/delta/content", "shift_share/base/content"}
    spectra |= {"mean_cosine/in_sample", "mean_cosine/leave_one_out", "top1_energy/delta_centred"}
    expected |= {f"{name}/{site}" for name in spectra for site in sites}
    expected |= {"projection/share_grown", "hyperplane/share_preferred"}
    texts = {"bleu", "rougeL", "degeneration", "length", "toxicity_word_list", "oracle_utility"}
    expected |= {f"behaviour/{name}{of}" for name in texts for of in ("", "/base")}
    expected |= {"behaviour/oracle_preference_rate", "behaviour/preference_accuracy", "behaviour/of_steps_taken"}
    assert expected <= set(metrics_of(only_run(finished[0]))[0])


def test_wandb_gets_the_rows_of_metrics_csv_on_its_own_step_axis(finished: tuple[Path, str]) -> None:
    run = only_run(finished[0])
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    media = ("figures/", "samples/")
    logged_rows = [row for row in history_rows(file) if not any(name.startswith(media) for name in row)]
    csv_rows = metrics_of(run)
    assert len(logged_rows) == len(csv_rows)
    for sent, row in zip(logged_rows, csv_rows, strict=True):
        values = {name: float(value) for name, value in row.items() if value and name != "step"}
        assert sent["trainer/global_step"] == int(row["step"])
        assert {name: sent[name] for name in values} == pytest.approx(values, rel=1e-12, nan_ok=True)
        assert {name for name in sent if "/" in name} - {"trainer/global_step"} <= set(values)
    axes = metric_definitions(file)
    assert axes["train/*"] == axes["val/*"] == axes["throughput/*"] == "trainer/global_step"


def test_wandb_config_says_what_the_run_was_made_from(finished: tuple[Path, str]) -> None:
    (file,) = only_run(finished[0]).glob("wandb/offline-run-*/*.wandb")
    config = run_config(file)
    assert {"git_commit", "versions", "data_sha256", "data_sources", "model_revision", "module", "seed"} <= set(config)
    assert len(config["data_sha256"]["train"]) == 64
    assert config["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_no_secret_of_the_environment_reaches_the_run_folder(finished: tuple[Path, str]) -> None:
    for path in only_run(finished[0]).rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path


def test_the_terminal_ends_with_results_and_the_next_command(finished: tuple[Path, str]) -> None:
    run, out = only_run(finished[0]), finished[1]
    assert "held-out preference accuracy" in out
    assert "95 % CI" in out
    assert "wandb sync" in out
    assert f"python analyze.py run={run}" in out


def test_a_second_run_finds_the_base_and_a_resumed_one_goes_on(finished: tuple[Path, str]) -> None:
    root = finished[0]
    run = only_run(root)
    before = logged(run, "train/loss")
    resumed = run_train(*TINY, f"runs_root={root}", "trainer.max_epochs=3", "ckpt_path=last", "logger=csv")
    assert resumed.returncode == 0, resumed.stderr
    assert "Base: found" in resumed.stdout
    steps = [row["step"] for row in metrics_of(run) if row["train/loss"]]
    assert len(steps) == len(set(steps)) == len(before) // 2 * 3
    looks = [row["probe/steps_taken"] for row in metrics_of(run) if row["shift_share/delta/layer_00"]]
    assert looks == ["3", "6", "9"], "once each, the one that the checkpoint was too early for included"
    assert logged(run, "train/loss")[: len(before)] == before
    rates = logged(run, "train/learning_rate")[len(before) :]
    assert all(rate > 0 for rate in rates), "the schedule must know the new end"


@pytest.mark.parametrize("change", ["arm=dpo_swapped", "seed=9", "data.seed=5"])
def test_resuming_under_other_settings_is_refused_and_changes_nothing(change: str, finished: tuple[Path, str]) -> None:
    run = only_run(finished[0])
    before = (run / "config.yaml").read_text(encoding="utf-8"), len(metrics_of(run))
    refused = run_train(*TINY, f"runs_root={finished[0]}", f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", change)
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    assert "would make it another run" in line
    assert ((run / "config.yaml").read_text(encoding="utf-8"), len(metrics_of(run))) == before


def test_a_run_whose_numbers_go_wrong_stops_with_exit_code_4_and_exports_nothing(tmp_path: Path) -> None:
    done = run_train(*TINY, f"runs_root={tmp_path}", "module.learning_rate=1e30", "module.warmup_share=0", "logger=csv")
    assert done.returncode == 4
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("tiltmeter: step ")
    assert "not finite" in line
    assert "synthetic/" in line, "the pairs are named"
    assert not (only_run(tmp_path) / "aligned").exists()


def test_reference_log_probs_are_found_by_a_run_with_another_loss_beta_rate_and_seed(
    finished: tuple[Path, str],
) -> None:
    other = ("module.loss=ipo", "module.beta=0.3", "module.learning_rate=1e-4", "seed=3")
    done = run_train(*TINY, *other, f"runs_root={finished[0]}", "trainer.max_steps=1", "logger=csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pairs found in") == 2
    assert done.stdout.count(", 0 computed") == 2


def test_a_sweep_makes_one_run_per_arm_from_one_base(tmp_path: Path) -> None:
    short = ("logger=csv", "callbacks=none", "trainer.max_steps=2", f"runs_root={tmp_path}")
    swept = run_train("--multirun", *TINY, *short, "arm=dpo,dpo_swapped,dpo_shuffled,sft_chosen")
    assert swept.returncode == 0, swept.stderr
    runs = sorted((tmp_path / "tiny_synthetic").iterdir())
    arms = [yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["arm"] for run in runs]
    assert arms == ["dpo", "dpo_swapped", "dpo_shuffled", "sft_chosen"]
    assert len(list((tmp_path / "cache" / "bases").glob("[0-9a-f]*"))) == 1
    chosen = {arm: logged(run, "train/logps/chosen")[0] for arm, run in zip(arms, runs, strict=True)}
    rejected = {arm: logged(run, "train/logps/rejected")[0] for arm, run in zip(arms[:3], runs, strict=False)}
    assert chosen["dpo"] == pytest.approx(rejected["dpo_swapped"], abs=1e-4)
    assert json.loads((runs[0] / "probe_prompts.json").read_text(encoding="utf-8"))
