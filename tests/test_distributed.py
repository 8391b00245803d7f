"""Two processes over gloo, however they are started, give the numbers of one: `trainer=ddp` and `trainer=fsdp`."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.cli import (
    TINY,
    logged,
    metrics_of,
    only_run,
    run_train,
    run_train_by_srun,
    run_train_by_torchrun,
    run_train_together,
)

pytestmark = pytest.mark.slow
# 13 pairs a step: uneven shares on two processes, and fillers where one has fewer micro-batches.
STEPS = (
    "trainer.max_steps=3",
    "datamodule.pairs_per_step=13",
    "datamodule.tokens_per_micro_batch=600",
    "logger=csv",
    "callbacks=none",
)
TWO_PROCESSES = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(run / "aligned").state_dict()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, and the base that the others find in its cache."""
    root = tmp_path_factory.mktemp("single")
    done = run_train(*TINY, *STEPS, f"runs_root={root}")
    assert done.returncode == 0, done.stderr
    return root


LAUNCHERS: dict[str, Callable[..., subprocess.CompletedProcess[str]]] = {
    "python": run_train,
    "torchrun": run_train_by_torchrun,
    "srun": run_train_by_srun,
    "forked": run_train_together,
}


@pytest.mark.parametrize(("trainer", "launcher"), [("ddp", "srun"), ("fsdp", "torchrun")])
def test_two_processes_give_the_losses_and_weights_of_one(trainer: str, launcher: str, single: Path) -> None:
    before = set((single / "tiny_synthetic").iterdir())
    done = LAUNCHERS[launcher](*TINY, *STEPS, f"trainer={trainer}", *TWO_PROCESSES, f"runs_root={single}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Result") == 1, "only the first process speaks"
    (run,) = set((single / "tiny_synthetic").iterdir()) - before
    (alone,) = [r for r in before if (r / "metrics.csv").read_text(encoding="utf-8") and _is_single(r)]
    assert set(metrics_of(run)[0]) == set(metrics_of(alone)[0])
    for name in ("train/loss", "val/loss", "train/rewards/margins", "train/gradient_norm", "train/logps/chosen"):
        assert logged(run, name) == pytest.approx(logged(alone, name), rel=1e-5, abs=1e-6), name
    ours, theirs = weights(run), weights(alone)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_modules_trained_whole_beside_adapters_are_sharded_as_they_are_trained_by_one_process(single: Path) -> None:
    whole = (
        "adapter=lora",
        "module.lora.r=4",
        "module.lora.modules_to_save=[lm_head,model.norm]",
        "module.learning_rate=3e-3",
    )
    before = set((single / "tiny_synthetic").iterdir())
    runs = []
    for launch, trainer in ((run_train, ()), (run_train_together, ("trainer=fsdp", *TWO_PROCESSES))):
        done = launch(*TINY, *STEPS, *whole, *trainer, f"runs_root={single}")
        assert done.returncode == 0, done.stderr
        runs += set((single / "tiny_synthetic").iterdir()) - before - set(runs)
    for name in ("train/loss", "val/loss", "train/gradient_norm"):
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), rel=1e-4, abs=1e-6), name
    before_training = load_file(runs[1] / "base" / "model.safetensors")
    for name, start in (("lm_head.weight", "model.embed_tokens.weight"), ("model.norm.weight", "model.norm.weight")):
        assert not torch.equal(weights(runs[1])[name], before_training[start]), name  # the head was tied


def test_a_sharded_run_resumes_with_more_steps_where_the_uninterrupted_one_would_be(single: Path) -> None:
    steady = (
        "callbacks=geometry",
        "+callbacks.depth._target_=callbacks.alignment_depth.AlignmentDepth",
        "module.schedule=constant",
        "module.warmup_share=0",
        "logger=csv",
        "datamodule.pairs_per_step=13",
    )
    common = (
        *TINY,
        *steady,
        "trainer=fsdp",
        *TWO_PROCESSES,
        f"runs_root={single}",
        "name=resumed",
        "trainer.val_check_interval=2",
    )
    for arguments in ((*common, "trainer.max_steps=4"), (*common, "trainer.max_steps=2")):
        done = run_train_together(*arguments)
        assert done.returncode == 0, done.stderr
    whole, part = sorted((single / "resumed").iterdir())
    resumed = run_train_together(*common, "trainer.max_steps=4", "ckpt_path=last")
    assert resumed.returncode == 0, resumed.stderr
    assert logged(part, "train/loss") == pytest.approx(logged(whole, "train/loss"), rel=1e-6)
    shares = [logged(run, "depth/first_token_share") for run in (part, whole)]
    assert shares[0][-1] == pytest.approx(shares[1][-1], rel=1e-3), "by the first base, which the checkpoint holds"


def first_run(root: Path) -> Path:
    return min((root / "tiny_synthetic").iterdir(), key=lambda run: run.name)


def _is_single(run: Path) -> bool:
    return "strategy" not in (run / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(("trainer", "launcher"), [("ddp", "forked"), ("fsdp", "python")])
def test_a_base_is_trained_by_two_processes_too_and_wrong_input_is_said_once(
    trainer: str, launcher: str, tmp_path: Path, single: Path
) -> None:
    launch = LAUNCHERS[launcher]
    done = launch(*TINY, *STEPS, f"trainer={trainer}", *TWO_PROCESSES, f"runs_root={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "Base: trained by SFT" in done.stdout
    base, theirs = (load_file(root / "base" / "model.safetensors") for root in (only_run(tmp_path), first_run(single)))
    for name in theirs:
        torch.testing.assert_close(base[name], theirs[name], rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    refused = launch(*TINY, *STEPS, f"trainer={trainer}", *TWO_PROCESSES, f"runs_root={tmp_path}", "seed=-1x")
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
