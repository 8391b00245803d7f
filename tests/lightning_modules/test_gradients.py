import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from datamodules.preference import PreferenceDataModule
from datamodules.splits import Split
from lightning_modules.base import LogProbModule
from lightning_modules.dpo import DPOModule
from lightning_modules.pair_metrics import PairResults
from lightning_modules.sft import SFTModule
from tests.tiny_models import fit, lightning_warnings, make_data
from tiltmeter.models.layers import embedding_parameters
from tiltmeter.pairs.batch import PreferenceBatch

pytestmark = lightning_warnings
BUDGETS = {"one micro-batch": 10**6, "ragged": 150, "one pair each": 1}


class Recorded:
    """What a module saw in its training step: gradients before clipping, micro-batches, results."""

    def __init__(self, module: LogProbModule) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.batches: list[PreferenceBatch] = []
        self.results: list[PairResults] = []
        self._module, self._clip, self._results = module, module._clip_gradients, module.pair_results
        module._clip_gradients = self.clip  # type: ignore[method-assign]
        module.pair_results = self.pair_results  # type: ignore[method-assign]

    def clip(self) -> Tensor:
        named = self._module.trained_policy.model.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
        return self._clip()

    def pair_results(self, batch: PreferenceBatch, split: Split) -> PairResults:
        results = self._results(batch, split)
        self.batches.append(batch)
        self.results.append(results)
        return results


def one_step(module: LogProbModule, data: PreferenceDataModule, family: str, dtype: str) -> Recorded:
    recorded = Recorded(module)
    fit(module, data, family=family, dtype=dtype, max_steps=1)
    return recorded


def dpo(**options: Any) -> DPOModule:
    return DPOModule(**({"learning_rate": 1e-3, "freeze_embeddings": False} | options))


@pytest.mark.parametrize(
    ("objective", "layout", "packed", "family", "dtype", "tolerance"),
    [
        ("dpo", "shared_prefix", True, "gpt2", "float64", 1e-12),
        ("dpo", "shared_prefix", False, "llama", "float32", 1e-6),
        ("dpo", "concatenated", True, "llama", "float32", 1e-6),
        ("dpo", "concatenated", False, "gpt2", "float64", 1e-12),
        ("sft", "shared_prefix", True, "llama", "float32", 1e-6),
        ("sft", "shared_prefix", False, "gpt2", "float64", 1e-12),
    ],
)
def test_gradients_are_the_same_for_every_cut_into_micro_batches(
    objective: str, layout: str, packed: bool, family: str, dtype: str, tolerance: float
) -> None:
    runs = {}
    for name, budget in BUDGETS.items():
        sft = SFTModule(learning_rate=1e-3, freeze_embeddings=False, predict_prompt=True)
        module = dpo() if objective == "dpo" else sft
        data = make_data(11, pairs_per_step=11, tokens_per_micro_batch=budget, layout=layout, packed=packed)
        runs[name] = one_step(module, data, family, dtype)
    counts = {name: len(run.batches) for name, run in runs.items()}
    assert counts["one micro-batch"] == 1 < counts["ragged"] < counts["one pair each"] == 11
    whole = runs.pop("one micro-batch").gradients
    assert max(g.abs().max().item() for g in whole.values()) > 1e-3
    for run in runs.values():
        assert_close(run.gradients, whole, rtol=0, atol=tolerance)


def test_the_gradient_is_the_mean_of_the_gradients_of_single_pairs() -> None:
    data = make_data(6, pairs_per_step=6, tokens_per_micro_batch=150)
    step = one_step(dpo(), data, "gpt2", "float64")
    alone = []
    for row in range(6):
        single = make_data(6, pairs_per_step=1)
        single.splits["train"].pairs[:] = [single.splits["train"].pairs[row]]
        alone.append(one_step(dpo(), single, "gpt2", "float64").gradients)
    mean = {name: torch.stack([gradients[name] for gradients in alone]).mean(0) for name in step.gradients}
    assert_close(step.gradients, mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
@pytest.mark.parametrize(("family", "budget"), [("gpt2", "ragged"), ("llama", "ragged"), ("llama", "one pair each")])
def test_the_first_loss_is_ln_2_and_the_first_rewards_are_0(layout: str, family: str, budget: str) -> None:
    module = dpo(freeze_embeddings=True)
    data = make_data(16, pairs_per_step=16, tokens_per_micro_batch=BUDGETS[budget], layout=layout)
    step = one_step(module, data, family, "float32")
    columns = torch.cat([results.columns for results in step.results])
    figures = dict(zip(module.columns, columns.unbind(1), strict=True))
    assert figures["loss"].double().mean().item() == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert_close(figures[name], torch.zeros(16), rtol=0, atol=1e-5)
    logged = module.trainer.callback_metrics
    assert logged["train/loss"].item() == pytest.approx(math.log(2), abs=1e-6)


def test_reference_log_probs_do_not_depend_on_how_pairs_were_batched() -> None:
    tables = []
    for budget in BUDGETS.values():
        module = dpo()
        fit(module, make_data(9, pairs_per_step=4, tokens_per_micro_batch=budget), family="gpt2", dtype="float64")
        tables.append(module.reference["train"])
    assert tables[0].shape == (9, 2)
    assert tables[0].dtype == torch.float64
    assert_close(tables[1:], [tables[0]] * 2, rtol=0, atol=1e-11)


def test_the_reference_stays_the_model_before_the_first_step() -> None:
    module = dpo(learning_rate=0.01, warmup_share=0.0)
    trainer = fit(module, make_data(8, pairs_per_step=2), family="gpt2", dtype="float64")
    before = module.reference["train"].clone()
    assert trainer.global_step == 4
    after = module.sequence_log_probs_of("train", range(8))
    assert (after - before).abs().min() > 1e-4
    untouched = dpo(learning_rate=1e-30)
    fit(untouched, make_data(8, pairs_per_step=2), family="gpt2", dtype="float64")
    assert_close(untouched.reference["train"], before, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_frozen_embeddings_do_not_move_and_everything_else_does(family: str) -> None:
    def trained(**options: Any) -> tuple[dict[str, Tensor], set[str]]:
        module = dpo(warmup_share=0.0, **options)
        fit(module, make_data(8, pairs_per_step=2), family=family, dtype="float32")
        model = module.trained_policy.model
        frozen = {id(p) for p in embedding_parameters(model)}
        return dict(model.named_parameters()), {name for name, p in model.named_parameters() if id(p) in frozen}

    start, _ = trained(learning_rate=1e-30)
    end, embeddings = trained(learning_rate=0.01, freeze_embeddings=True)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert embeddings
    assert moved == set(start) - embeddings


def test_the_supervised_term_is_the_mean_over_pairs_of_the_cross_entropy_per_token_of_chosen_responses() -> None:
    module = dpo(learning_rate=1e-30, sft_weight=0.7)
    data = make_data(7, pairs_per_step=7, tokens_per_micro_batch=120)
    step = one_step(module, data, "gpt2", "float64")
    model, terms = module.trained_policy.model, []
    for prompt, chosen, _ in data.splits["train"].pairs:
        ids = torch.tensor([*prompt, *chosen])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        terms.append(F.cross_entropy(logits[len(prompt) - 1 : -1], ids[len(prompt) :]).item())
    expected = sum(terms) / len(terms)
    assert len(step.batches) > 1
    assert sum(r.objective.item() for r in step.results) / 7 == pytest.approx(math.log(2) + 0.7 * expected, abs=1e-12)
    assert module.trainer.callback_metrics["train/sft_loss"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("predict_prompt", [False, True])
def test_sft_loss_is_the_cross_entropy_over_the_same_tokens(predict_prompt: bool) -> None:
    module = SFTModule(learning_rate=1e-30, predict_prompt=predict_prompt)
    data = make_data(7, pairs_per_step=7, tokens_per_micro_batch=120)
    step = one_step(module, data, "gpt2", "float64")
    model = module.trained_policy.model
    nll, count = 0.0, 0
    for prompt, chosen, _ in data.splits["train"].pairs:
        ids = torch.tensor([*prompt, *chosen])
        first = 1 if predict_prompt else len(prompt)
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        nll += F.cross_entropy(logits[first - 1 : -1], ids[first:], reduction="sum").item()
        count += len(ids) - first
    total = sum(results.objective.item() for results in step.results)
    assert len(step.batches) > 1
    assert total / count == pytest.approx(nll / count, abs=1e-12)
    assert module.trainer.callback_metrics["train/loss"].item() == pytest.approx(nll / count, rel=1e-6)
