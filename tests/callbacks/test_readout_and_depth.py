"""Readout and depth while a tiny model trains, against the whole analysis of the same states and both models run by hand."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoraConfig
from transformers import PreTrainedModel

from callbacks.alignment_depth import AlignmentDepth
from callbacks.preference_projection import PreferenceProjection
from callbacks.preference_readout import PreferenceReadout
from callbacks.probe_session import model_of
from datamodules.preference import PreferenceDataModule
from tests.callbacks.watched import dpo, probe_data, watch
from tests.tiny_models import lightning_warnings, make_data
from tiltmeter.errors import UserError
from tiltmeter.geometry.readout import readout
from tiltmeter.pairs.batch import CHOSEN, TokenizedPair
from tiltmeter.states.capture import ReadPoint
from tiltmeter.states.state_pair import StatePair

pytestmark = lightning_warnings
SITE = "final_pre_norm"
AUC, AUC_OF_BASE = f"readout/auc/{SITE}", f"readout/auc_of_base/{SITE}"
SHARE, EVEN = "depth/first_token_share", "depth/even_share"


def large_probe(**options: Any) -> PreferenceDataModule:
    """Sixteen pairs to look at: 32 responses, enough for a readout."""
    return make_data(12 + 16, **({"pairs_per_step": 4, "probe_pairs": 16} | options))


class Base(Callback):
    """Keeps a copy of the model before its first step."""

    model: PreTrainedModel

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.model = copy.deepcopy(model_of(pl_module))


@torch.no_grad()
def shares_by_hand(base: PreTrainedModel, policy: PreTrainedModel, pairs: list[TokenizedPair]) -> tuple[float, float]:
    """Share of KL and of tokens among the first five, one response at a time, from the models' own logits."""
    first, whole, n_first, n = 0.0, 0.0, 0, 0
    for prompt, chosen, _ in pairs:
        ids = torch.tensor([[*prompt, *chosen]])
        ours, theirs = (
            model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for model in (policy, base)
        )
        kl = (ours.exp() * (ours - theirs)).sum(-1)
        first, whole = first + float(kl[:5].sum()), whole + float(kl.sum())
        n_first, n = n_first + min(5, len(chosen)), n + len(chosen)
    return first / whole, n_first / n


@pytest.mark.parametrize(
    ("module", "data", "family"),
    [
        ({}, {}, "llama"),
        ({"freeze_embeddings": False}, {"tokens_per_micro_batch": 90}, "llama"),
        ({"lora": LoraConfig(r=2, lora_alpha=4)}, {"layout": "concatenated", "packed": False}, "llama"),
        ({"lora": LoraConfig(r=2, lora_alpha=4, modules_to_save=["lm_head"])}, {}, "gemma2"),
    ],
)
def test_depth_is_that_of_both_models_own_logits(
    tmp_path: Path, module: dict[str, Any], data: dict[str, Any], family: str
) -> None:
    base, depth = Base(), AlignmentDepth(n_pairs=6)
    seen = watch(
        tmp_path,
        [base, depth],
        module=dpo(learning_rate=1e-2, **module),
        data=probe_data(**data),
        family=family,
        dtype="float64",
    )
    expected = shares_by_hand(base.model, model_of(seen.module), seen.data.splits["probe"].pairs[:6])
    (share,), (even,) = seen.logger.of(SHARE), seen.logger.of(EVEN)  # nothing before the first step
    assert (share, even) == pytest.approx(expected, abs=1e-9)
    assert share != pytest.approx(even, abs=1e-3)


def test_readout_is_that_of_the_whole_analysis(tmp_path: Path) -> None:
    callback, kept = PreferenceReadout(), {}
    plain = callback.on_observation

    def keep(trainer: Trainer, module: LightningModule, seen: StatePair) -> None:
        kept[seen.steps_taken] = seen
        plain(trainer, module, seen)

    callback.on_observation = keep  # type: ignore[method-assign]
    logger = watch(tmp_path, [callback], module=dpo(learning_rate=1e-2), data=large_probe()).logger
    assert len(kept) == len(logger.of(AUC)) == 2
    assert logger.of(AUC)[0] == logger.of(AUC_OF_BASE)[0], "one model before the first step"
    point = ReadPoint(SITE, "response_mean")
    for at, seen in enumerate(kept.values()):
        is_chosen = seen.policy[point].sides == CHOSEN
        whole = readout(*seen.rows(point), is_chosen, seen.clusters_of(point), n_permutations=1).quality.auc
        assert (logger.of(AUC)[at], logger.of(AUC_OF_BASE)[at]) == (whole["retrained"].value, whole["policy"].value)


def test_too_small_a_probe_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = watch(tmp_path, [PreferenceReadout(every_n_steps=1)], data=probe_data()).logger
    assert not {name for name in logger.names if name.startswith("readout")}
    assert capsys.readouterr().out.count("Readout: none of 18 responses to 9 prompts; it takes 30 to 5") == 1


def test_a_resumed_run_goes_on_with_the_first_base_and_its_unembedding(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [PreferenceReadout(), AlignmentDepth(), PreferenceProjection()]

    trained: dict[str, Any] = {"schedule": "constant", "freeze_embeddings": False, "learning_rate": 1e-2}
    half = watch(tmp_path, callbacks(), module=dpo(**trained), data=large_probe())
    checkpoint = tmp_path / "last.ckpt"
    half.module.trainer.save_checkpoint(checkpoint)
    options = {"max_epochs": 2, "data": half.data}
    resumed = watch(tmp_path, callbacks(), module=dpo(**trained), ckpt_path=str(checkpoint), **options).logger
    whole = watch(tmp_path / "whole", callbacks(), module=dpo(**trained), **options).logger
    for name in (AUC, AUC_OF_BASE, SHARE, EVEN, "projection/delta/final_post_norm", "hyperplane/share_preferred"):
        assert resumed.of(name)[-1] == pytest.approx(whole.of(name)[-1], rel=1e-5), name


def test_resuming_without_the_base_is_refused(tmp_path: Path) -> None:
    half = watch(tmp_path, [AlignmentDepth(n_pairs=2)])
    checkpoint = tmp_path / "last.ckpt"
    half.module.trainer.save_checkpoint(checkpoint)
    with pytest.raises(UserError, match="holds no states of the base model at the"):
        watch(tmp_path, [AlignmentDepth(n_pairs=3)], data=half.data, max_epochs=2, ckpt_path=str(checkpoint))


def test_wrong_options_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="n_pairs: expected at least 1, got 0"):
        AlignmentDepth(n_pairs=0)
    with pytest.raises(UserError, match="expected held-out pairs to probe, got none"):
        watch(tmp_path, [AlignmentDepth()], data=make_data(8, pairs_per_step=4))
