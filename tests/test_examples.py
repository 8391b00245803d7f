"""The examples run as they stand, log what Hugging Face's own hidden states give by hand, and are quoted truly."""

import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.processes import ROOT, run_script
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.states.snapshots import SnapshotReader

LAYERS = 3
IN_HUGGING_FACE = {"layer_00": 1, "layer_01": 2, "final_post_norm": 3}
"""Site → index of ``hidden_states``; the state before the final norm is not among them."""


def n_shared(pair: TokenizedPair) -> int:
    """Tokens that both responses begin with."""
    return next(i for i, (a, b) in enumerate(zip(*pair[1:], strict=False)) if a != b)


@torch.no_grad()
def by_hand(model: PreTrainedModel, pairs: Sequence[TokenizedPair]) -> dict[str, tuple[Tensor, Tensor]]:
    """Site → states at the prompt's last token and where the responses part, one sequence at a time, without padding."""
    states = []
    for pair in pairs:
        ids = [*pair.prompt_ids, *pair.chosen_ids]
        outputs = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        at = len(pair.prompt_ids) - 1
        states.append(torch.stack(outputs.hidden_states)[:, 0, [at, at + n_shared(pair)]].double())
    rows = torch.stack(states)
    return {site: (rows[:, i, 0], rows[:, i, 1]) for site, i in IN_HUGGING_FACE.items()}


def check(metrics: Mapping[str, float], base: Any, policy: Any, pairs: Sequence[TokenizedPair]) -> None:
    """Figures of every kind against their definitions."""
    before, after = by_hand(base, pairs), by_hand(policy, pairs)
    words = base.get_output_embeddings().weight.detach().double()
    chosen, rejected = ([pair[side][n_shared(pair)] for pair in pairs] for side in (1, 2))
    v = words[chosen] - words[rejected]
    for site in IN_HUGGING_FACE:
        delta = after[site][0] - before[site][0]
        mean = delta.mean(0)
        p = torch.linalg.svdvals(delta).square()
        p = p / p.sum()
        expected = {
            "spectral_entropy/delta/energy": -(p * p.log()).sum(),
            "top1_energy/delta": p[0],
            "shift_share/delta": len(delta) * mean.square().sum() / delta.square().sum(),
            "mean_cosine/in_sample": torch.cosine_similarity(delta, mean[None]).mean(),
            "update_norm": delta.norm(dim=1).mean(),
            "projection/base": (before[site][1] * v).sum(1).div(v.norm(dim=1)).mean(),
            "projection/delta": ((after[site][1] - before[site][1]) * v).sum(1).div(v.norm(dim=1)).mean(),
        }
        for name, value in expected.items():
            assert metrics[f"{name}/{site}"] == pytest.approx(float(value), rel=1e-4, abs=1e-5), (name, site)
    moved = ((after["final_post_norm"][1] - before["final_post_norm"][1]) * v).sum(1)
    assert metrics["hyperplane/share_preferred"] == pytest.approx(float((moved > 0).double().mean()))


@pytest.mark.slow
def test_a_loop_of_ones_own_logs_what_the_models_hidden_states_say(tmp_path: Path) -> None:
    from examples import watch_any_loop

    model, seen = watch_any_loop.main(tmp_path)
    assert len(seen) == watch_any_loop.EPOCHS
    pairs = watch_any_loop.make_pairs(24, seed=2)
    check(seen[-1], watch_any_loop.make_model(), model, pairs)
    assert seen[-1]["direction_settled/final_post_norm"] > 0.5
    assert "direction_settled/final_post_norm" not in seen[0]
    assert SnapshotReader(tmp_path).names == ["base", "epoch=000", "epoch=001", "epoch=002"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl_logs_what_the_models_hidden_states_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from the command line, in this process."""
    trl = pytest.importorskip("trl")
    trained, train = [], trl.DPOTrainer.train
    monkeypatch.setattr(trl.DPOTrainer, "train", lambda trainer: trained.append(trainer) or train(trainer))
    monkeypatch.setattr("sys.argv", ["watch_trl.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "watch_trl.py"), run_name="__main__")
    (trainer,) = trained
    check_lines(capsys.readouterr().out)
    history = trainer.state.log_history
    seen = [row for row in history if "shift_share/delta/final_post_norm" in row]
    assert [row["epoch"] for row in seen] == [1, 2]
    rows: Any = trainer.eval_dataset
    pairs = [TokenizedPair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
    check(seen[-1], trainer.ref_model, trainer.model, pairs)
    assert SnapshotReader(tmp_path / "snapshots").names == ["base", "epoch=000", "epoch=001"]
    assert any("rewards/margins" in row for row in history), "TRL's own figures are still there"


@pytest.mark.slow
def test_a_loop_of_ones_own_runs_from_the_command_line(tmp_path: Path) -> None:
    done = run_script("examples/watch_any_loop.py", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    check_lines(done.stdout)


def check_lines(said: str) -> None:
    """A line of figures for each epoch."""
    lines = [line for line in said.splitlines() if line.startswith("epoch ")]
    assert len(lines) >= 2
    assert "shift_share/delta" in lines[-1]


def test_the_page_quotes_the_examples_as_they_are() -> None:
    page = (ROOT / "docs" / "any_trainer.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (examples/\w+\.py)\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == page.count("```python") >= 2
    for file, code in blocks:
        assert code.strip("\n") in (ROOT / file).read_text(encoding="utf-8"), f"{file} has changed; quote it anew"
    for name in re.findall(r"examples/\w+\.py", page):
        assert (ROOT / name).is_file()
