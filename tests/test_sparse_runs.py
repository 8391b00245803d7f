"""Sparse autoencoders from the command line: what the run folder holds, what is logged, and resuming."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from analysis.open.checkpoints import checkpoints_of_run
from analysis.open.runs import open_run
from launch.parts import build_parts
from launch.training import train
from tests.cli import TINY, composed, logged, metrics_of, only_run, run_train, run_train_together
from tests.test_bad_input import fails_with
from tiltmeter.errors import UserError
from tiltmeter.metric_names import find
from tiltmeter.sparse.files import load_sae
from tiltmeter.sparse.steering_file import load_steering

pytestmark = pytest.mark.slow
EIGHT = "datamodule.pairs_per_step=8"  # of the base, too, which all runs here share
SAE = ("experiment=tiny_sae", *TINY, EIGHT, "logger=csv", "module.width=48", "module.k=4", "module.schedule=constant",
       "module.buffer_rows=500", "trainer.enable_progress_bar=false")  # fmt: skip
SHORT, LONG = (
    ("trainer.max_steps=6", "trainer.val_check_interval=3"),
    ("trainer.max_steps=9", "trainer.val_check_interval=3"),
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sae")
    ended = run_train(*SAE, *SHORT, f"runs_root={root}")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert "adapter/ is the result, without aligned/: an autoencoder reads" in " ".join(ended.stdout.split())
    return root


def test_the_run_keeps_an_autoencoder_of_its_base(done: Path) -> None:
    run = only_run(done, "tiny_sae")
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(run / "base")
    sae = load_sae(run / "adapter")
    assert (sae.kind, sae.width, sae.site, sae.options()) == ("topk", 48, "layer_01", {"k": 4})
    sae.check_fits(base)
    torch.testing.assert_close(sae.decoder_weight.norm(dim=1), torch.ones(48))
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.add_(1e-3)
    with pytest.raises(UserError, match="with other weights than"):
        sae.check_fits(base)
    assert not (run / "aligned").exists()
    kept = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(kept["state_dict"]) == {
        f"sae.{part}_{kind}" for part in ("encoder", "decoder") for kind in ("weight", "bias")
    }
    assert kept["sparse"]["buffer"]["rows"].shape == (500, 32), "the buffer, and no more states"
    assert pd.read_csv(run / "adapter" / "density.csv")["features"].sum() == 48


def test_metrics_are_declared_and_those_of_the_dictionary_move(done: Path) -> None:
    run = only_run(done, "tiny_sae")
    names = {name for row in metrics_of(run) for name, value in row.items() if value and "/" in name}
    assert {f"sparse/{name}" for name in ("loss", "l0", "explained_variance", "dead_share", "ce_recovered")} <= names
    assert all(find(name) is not None for name in names)
    assert not [name for name in names if name.startswith("val/")]
    assert logged(run, "sparse/unexplained")[-1] < logged(run, "sparse/unexplained")[0]
    assert all(0 < x <= 4 for x in logged(run, "sparse/l0"))


def test_held_out_losses_are_those_of_transformers_alone(done: Path) -> None:
    """A second implementation: texts one by one, states replaced by a hook on the block, no code of ours but the autoencoder."""
    run = open_run(only_run(done, "tiny_sae"))
    held_out = run.held_out
    assert held_out is not None
    with pytest.raises(UserError, match="a sparse autoencoder, no model"):
        checkpoints_of_run(run)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(run.folder / "base")
    sae = load_sae(run.folder / "adapter")
    texts = held_out_ids(run.folder)
    for column, change in (("nll", None), ("nll_spliced", sae), ("nll_ablated", torch.zeros_like)):
        for (pair, ids), expected in zip(
            texts.items(), (held_out.set_index("pair_id")[column][p] for p in texts), strict=True
        ):
            assert nll_of(model, ids, change) == pytest.approx(float(expected), rel=1e-4), (column, pair)


def held_out_ids(run: Path) -> dict[str, Tensor]:
    """Token ids of the first validation pairs' chosen transcripts, by the run's own data module."""
    config = composed(*SAE, *SHORT, f"runs_root={run.parent.parent}")
    config.run_dir = str(run)
    split = build_parts(config).data.splits["val"]
    rows = list(zip(split.records, split.pairs, strict=True))[:4]
    return {record.pair_id: torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]]) for record, pair in rows}


@torch.no_grad()
def nll_of(model: PreTrainedModel, ids: Tensor, change: object) -> float:
    def hook(_module: object, _inputs: object, output: object) -> object:
        hidden = output[0] if isinstance(output, tuple) else output
        assert isinstance(hidden, Tensor)
        assert callable(change)
        new = torch.cat([hidden[:, :1], change(hidden[:, 1:])], dim=1)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.model.layers[1].register_forward_hook(hook) if change is not None else None
    logits = model(ids).logits[0, :-1].log_softmax(-1)
    if handle is not None:
        handle.remove()
    return -float(logits.gather(1, ids[0, 1:, None]).sum())


def test_a_resumed_run_ends_where_a_whole_one_does(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "cache", tmp_path / "whole" / "cache")
    shutil.copytree(done, tmp_path / "resumed")
    roots = [tmp_path / name for name in ("whole", "resumed")]
    for root, more in zip(roots, ((), ("ckpt_path=last",)), strict=True):
        ended = run_train(*SAE, *LONG, *more, f"runs_root={root}")
        assert ended.returncode == 0, ended.stderr
    whole, resumed = (pd.read_csv(only_run(root, "tiny_sae") / "metrics.csv") for root in roots)
    for name in ("sparse/loss", "sparse/explained_variance", "sparse/ce_spliced"):
        assert whole[name].dropna().tolist() == resumed[name].dropna().tolist(), name
    states = [load_sae(only_run(root, "tiny_sae") / "adapter").state_dict() for root in roots]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["module.k=50"], "k: expected 1 … 48, the number of features, got 50"),
        (["module.site=layer_7"], "site: expected one such as layer_07"),
        (["module.dead_after=0"], "module.dead_after: expected at least 1, got 0"),
        (["module.buffer_rows=0"], "module.buffer_rows: expected at least 1, got 0"),
        (["adapter=lora"], "module.lora: the model is frozen here; leave it out"),
        (["adapter=vector"], "module.vector: the model is frozen here; leave it out"),
        (["module.freeze_embeddings=false"], "module.freeze_embeddings: the model is frozen here; leave it out"),
    ],
)
def test_options_that_make_no_autoencoder_are_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert words in fails_with(capsys, tmp_path / "r", *SAE, *options)


def test_a_site_that_the_model_lacks_is_refused_before_a_step(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train(composed(*SAE, *SHORT, f"runs_root={done}", "name=other", "module.site=layer_05"))
    assert "layer_05: this model has 2 blocks" in capsys.readouterr().err


FSRL = ("experiment=tiny_fsrl", "name=tiny_synthetic", *TINY, EIGHT, "logger=csv", "callbacks=none", "module.schedule=constant",
        "module.learning_rate=1e-2", "trainer.enable_progress_bar=false")  # fmt: skip


def fsrl(done: Path, root: Path, *more: str) -> Path:
    sae = only_run(done, "tiny_sae") / "adapter"
    ended = run_train(*FSRL, *more, f"runs_root={root}", f"module.sparse.sae={sae}")
    assert ended.returncode == 0, ended.stderr
    return only_run(root)


@pytest.fixture(scope="module")
def steered(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fsrl")
    shutil.copytree(done / "cache", root / "cache")
    return fsrl(done, root, "trainer.max_steps=2", "trainer.val_check_interval=1")


def test_a_steering_alone_is_kept_and_opens_as_the_aligned_model(steered: Path, done: Path) -> None:
    assert {path.name for path in (steered / "adapter").iterdir()} == {"steering.safetensors"}
    assert not (steered / "aligned").exists()
    opened = checkpoints_of_run(open_run(steered))
    ids = torch.arange(3, 40)[None]
    stored = load_steering(steered / "adapter" / "steering.safetensors")
    sae, (weight, bias, threshold) = stored.sae, (stored.tensors[name] for name in ("weight", "bias", "threshold"))

    def literal(_module: object, _inputs: object, output: Tensor) -> Tensor:
        f, a = sae.encode(output), output @ weight.t() + bias
        s = torch.sign(a) * torch.maximum(a.abs() - threshold, torch.zeros_like(a))
        return sae.decode(torch.relu(f + s), like=output) + sae.error(output)

    with torch.no_grad():
        base, aligned = (one.model(ids).logits for one in (opened.base, opened.aligned))
        handle = opened.base.model.model.layers[1].register_forward_hook(literal)
        expected = opened.base.model(ids).logits
        handle.remove()
    torch.testing.assert_close(aligned, expected, rtol=0, atol=1e-5)
    assert (aligned - base).abs().max() > 1e-4
    kept = torch.load(steered / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert set(kept) == {f"policy.model.sparse_steering.{name}" for name in ("weight", "bias", "threshold")}


def test_what_is_steered_is_logged_and_begins_at_next_to_nothing(steered: Path) -> None:
    first, last = (logged(steered, "sparse/steering_l1")[i] for i in (0, -1))
    assert 0 <= first < 1e-3 < last
    effective, all_of_it = (logged(steered, f"sparse/steering_l0{of}") for of in ("_effective", ""))
    assert all(0 <= a <= b <= 48 for a, b in zip(effective, all_of_it, strict=True))
    assert logged(steered, "train/rewards/margins")[0] == pytest.approx(0, abs=1e-4)


def test_a_resumed_steering_ends_where_a_whole_one_does(steered: Path, done: Path, tmp_path: Path) -> None:
    shutil.copytree(steered.parent.parent / "cache", tmp_path / "cache")
    longer = ("trainer.max_steps=4", "trainer.val_check_interval=1")
    whole = fsrl(done, tmp_path, *longer)
    resumed = fsrl(done, steered.parent.parent, *longer, "ckpt_path=last")
    assert logged(whole, "train/loss") == logged(resumed, "train/loss")
    assert len(logged(whole, "sparse/steering_l1")) == 4
    numbers = [load_steering(run / "adapter" / "steering.safetensors").tensors for run in (whole, resumed)]
    assert all(torch.equal(numbers[0][name], numbers[1][name]) for name in numbers[0])


def test_an_autoencoder_that_is_missing_or_of_another_base_is_one_line(
    done: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "no such folder" in fails_with(capsys, tmp_path / "r", *FSRL, f"module.sparse.sae={tmp_path / 'nowhere'}")
    assert "module.sparse.threshold: expected more than 0" in fails_with(
        capsys, tmp_path / "r", *FSRL, "module.sparse.sae=x", "module.sparse.threshold=0.0"
    )
    sae = only_run(done, "tiny_sae") / "adapter"
    with pytest.raises(SystemExit):
        train(composed(*FSRL, "base.seed=5", f"module.sparse.sae={sae}", f"runs_root={tmp_path / 'other'}"))
    assert "with other weights than" in capsys.readouterr().err


TWO_PROCESSES = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")


def test_two_processes_steer_as_one_does(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "cache", tmp_path / "cache")
    options = (
        "trainer.max_steps=3",
        f"module.sparse.sae={only_run(done, 'tiny_sae') / 'adapter'}",
        f"runs_root={tmp_path}",
    )
    ended = (
        run_train(*FSRL, *options, "name=one"),
        run_train_together(*FSRL, *options, "name=two", "trainer=ddp", *TWO_PROCESSES),
    )
    assert [each.returncode for each in ended] == [0, 0], ended[1].stderr
    one, two = (only_run(tmp_path, name) for name in ("one", "two"))
    for name in ("train/loss", "sparse/steering_l1", "sparse/steering_l0_effective", "train/gradient_norm"):
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-4, abs=1e-6), name
    numbers = [load_steering(run / "adapter" / "steering.safetensors").tensors for run in (one, two)]
    for name in numbers[0]:
        torch.testing.assert_close(numbers[1][name], numbers[0][name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((*FSRL, "trainer=fsdp"), "module.vector, module.sparse: neither is sharded; use trainer=ddp, gpu or cpu"),
        ((*SAE, "trainer=ddp"), "trainer.devices: a sparse autoencoder is trained in one process; set it to 1"),
    ],
)
def test_what_several_processes_cannot_do_is_one_line(
    options: tuple[str, ...], words: str, done: Path, tmp_path: Path
) -> None:
    shutil.copytree(done / "cache", tmp_path / "cache")
    sae = (f"module.sparse.sae={only_run(done, 'tiny_sae') / 'adapter'}",) if "experiment=tiny_fsrl" in options else ()
    ended = run_train_together(*options, *sae, *TWO_PROCESSES, f"runs_root={tmp_path}")
    assert ended.returncode == 2
    assert words in ended.stderr
