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
from tests.cli import TINY, composed, logged, metrics_of, only_run, run_train
from tests.test_bad_input import fails_with
from tiltmeter.errors import UserError
from tiltmeter.metric_names import find
from tiltmeter.sparse.files import load_sae

pytestmark = pytest.mark.slow
SAE = ("experiment=tiny_sae", *TINY, "logger=csv", "module.width=48", "module.k=4", "module.schedule=constant",
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
