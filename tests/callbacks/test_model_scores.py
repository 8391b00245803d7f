"""What callbacks say of the model itself while it trains: pairs ranked, a probe of hidden states, TruthfulQA."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from callbacks.behaviour.acceptance import Acceptance
from callbacks.behaviour.preference_metrics import PreferenceMetrics
from callbacks.behaviour.scoring import forget_steps_ahead
from callbacks.behaviour.truthfulqa_metrics import TruthfulQAMetrics
from callbacks.hidden_state_snapshot import HiddenStateSnapshot
from callbacks.preference_probe import PreferenceProbe
from datamodules.preference import PreferenceDataModule
from datamodules.records import LoadReport, PreferencePair
from lightning_modules.sft import SFTModule
from tests.callbacks.watched import Watched, dpo, probe_data, watch
from tests.harness import score_all
from tests.tiny_models import MemorySource, lightning_warnings, make_tokenizer
from tiltmeter.errors import UserError
from tiltmeter.pairs.batch import CHOSEN
from tiltmeter.scoring.behaviour import FIGURES, read_table
from tiltmeter.scoring.preference_classifier import classifier_figures
from tiltmeter.scoring.scorer import Figure
from tiltmeter.scoring.truthfulqa import TruthfulQA
from tiltmeter.states.capture import ReadPoint
from tiltmeter.states.snapshots import SnapshotReader

pytestmark = lightning_warnings
QUESTIONS: list[dict[str, Any]] = [
    {
        "question": f"Is tea {word} or seven maps?",
        "mc1_targets": {"blue": 0, "rain": 1, "kind": 0},
        "mc2_targets": {"kind": 0, "rain": 1, "tea": 1, "blue": 0},
    }
    for word in ("rain", "map", "blue", "kind", "seven")
]
"""Few enough that a figure of one question shows."""


def figures(folder: Path) -> Any:
    return read_table(folder / "report" / "tables" / FIGURES)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "mc_task.json"
    path.write_text(json.dumps(QUESTIONS), encoding="utf-8")
    return path


def test_preference_accuracy_is_the_validation_s_own_and_has_an_interval(tmp_path: Path) -> None:
    data = probe_data(val_pairs=7)
    run = watch(tmp_path, [PreferenceMetrics()], data=data, limit_val_batches=1.0, max_epochs=2)
    assert len(run.logger.of("val/rewards/accuracies")) == 2
    for ours, theirs in (
        ("preference_accuracy", "val/rewards/accuracies"),
        ("reward_margin", "val/rewards/margins"),
    ):
        assert run.logger.of(f"behaviour/{ours}") == pytest.approx(run.logger.of(theirs), rel=1e-5), ours
    table = figures(tmp_path)
    accuracy = table[table["metric"] == "preference_accuracy"]
    assert accuracy["steps_taken"].tolist() == [2, 4]
    assert accuracy["n"].tolist() == [7, 7]
    assert (accuracy["ci_low"] <= accuracy["value"]).all()
    beta = run.module.loss.beta  # type: ignore[union-attr]
    drift = run.logger.of("behaviour/logp_drift_chosen")[-1]
    assert drift == pytest.approx(run.logger.of("val/rewards/chosen")[-1] / beta, rel=1e-5)


class TwoSources(MemorySource):
    """Every third pair is from elsewhere."""

    def load(self) -> tuple[list[PreferencePair], list[LoadReport]]:
        pairs, reports = super().load()
        return [replace(pair, source="memory" if i % 3 else "elsewhere") for i, pair in enumerate(pairs)], reports


def test_each_source_has_its_own_accuracy_and_pairs_left_out_are_left_out(tmp_path: Path) -> None:
    data = PreferenceDataModule(TwoSources(40), val_pairs=12, probe_pairs=0, pairs_per_step=4)
    data.load()
    data.tokenize(make_tokenizer())
    run = watch(tmp_path, [PreferenceMetrics()], data=data, limit_val_batches=2, max_steps=2, val_check_interval=2)
    table = figures(tmp_path)
    counts = {row["metric"]: row["n"] for _, row in table.iterrows()}
    assert counts["preference_accuracy"] == 8, "two steps of four pairs"
    sources = {name.removeprefix("preference_accuracy/") for name in counts if name.startswith("preference_accuracy/")}
    assert sources == {"memory", "elsewhere"}
    assert counts["preference_accuracy/memory"] + counts["preference_accuracy/elsewhere"] == 8
    for source in sources:
        ours, theirs = (
            run.logger.of(f"{name}/{source}") for name in ("behaviour/preference_accuracy", "val/rewards/accuracies")
        )
        assert ours == pytest.approx(theirs)


def test_sft_ranks_no_pairs(tmp_path: Path) -> None:
    module = SFTModule(learning_rate=3e-3, warmup_share=0.0)
    run = watch(tmp_path, [PreferenceMetrics()], module=module, limit_val_batches=1.0)
    assert run.logger.of("val/loss")
    assert not [name for name in run.logger.names if name.startswith("behaviour/")]


def test_a_probe_is_fitted_to_what_snapshots_hold(tmp_path: Path) -> None:
    watchers = [
        PreferenceProbe(sites=["layer_00", "final_pre_norm"], every_n_steps=2),
        HiddenStateSnapshot(positions=["response_last"], dtype="float32"),
    ]
    run = watch(tmp_path, watchers)
    name = "behaviour/preference_probe_accuracy/layer_00"
    assert [row["probe/steps_taken"] for row in run.logger.rows if name in row] == [0, 2, 3]
    assert "behaviour/preference_probe_null/final_pre_norm" in run.logger.names
    found = SnapshotReader(tmp_path / "snapshots").load("epoch=000")[ReadPoint("layer_00", "response_last")]
    is_chosen = found.sides == CHOSEN
    difference = (found.rows[is_chosen].double() - found.rows[~is_chosen].double()).numpy()
    groups = run.data.splits["probe"].groups
    assert run.logger.of(name)[-1] == pytest.approx(accuracy_by_hand(difference, groups), abs=1e-9)
    table = figures(tmp_path)
    assert set(table["metric"]) >= {"preference_probe_accuracy/layer_00", "preference_probe_null/layer_00"}
    assert (table["n"] == len(groups)).all()


def accuracy_by_hand(rows: Any, groups: list[str]) -> float:
    """Each difference and its mirror image, which needs no signs drawn; C halved, since every pair stands twice."""
    hits = 0
    for train, test in GroupKFold(5, shuffle=True, random_state=0).split(rows, groups=groups):
        scale = (rows[train] ** 2).mean(0) ** 0.5 * rows.shape[1] ** 0.5
        x = rows[train] / scale
        both = [*x, *-x]
        probe = LogisticRegression(C=0.5, fit_intercept=False, max_iter=5000, tol=1e-10)
        probe.fit(both, [1] * len(x) + [0] * len(x))
        hits += int(((rows[test] / scale) @ probe.coef_[0] > 0).sum())
    return hits / len(rows)


def test_too_few_prompts_for_a_probe_is_missing_and_no_number(tmp_path: Path) -> None:
    run = watch(tmp_path, [PreferenceProbe()], data=probe_data(probe_pairs=3), max_steps=1)
    assert all(math.isnan(value) for value in run.logger.of("behaviour/preference_probe_accuracy/final_pre_norm"))


@pytest.mark.parametrize("packed", [None, False])
def test_truthfulqa_is_that_of_the_model_afterwards_and_training_does_not_notice(
    packed: bool | None, questions: Path, tmp_path: Path
) -> None:
    watcher = TruthfulQAMetrics(questions=TruthfulQA(str(questions)), epochs=[1])
    run = watch(tmp_path, [watcher], data=probe_data(packed=packed), max_epochs=2)
    model, tokenizer = run.module.trained_policy.model, run.data.tokenizer
    assert tokenizer is not None
    expected = score_all(model, tokenizer, QUESTIONS)
    assert len(run.logger.of("behaviour/truthfulqa_mc1_zero_shot")) == 2, "the base, and after the second epoch"
    assert run.logger.of("behaviour/truthfulqa_mc1_zero_shot")[-1] == sum(expected["mc1"]) / 5
    assert run.logger.of("behaviour/truthfulqa_mc2_zero_shot")[-1] == pytest.approx(sum(expected["mc2"]) / 5, abs=1e-5)
    plain = watch(tmp_path / "plain", [], data=probe_data(packed=packed), max_epochs=2)
    assert plain.logger.of("train/loss") == run.logger.of("train/loss")
    for a, b in zip(plain.module.parameters(), run.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_no_questions_are_no_work_and_no_file_is_one_line(tmp_path: Path) -> None:
    run = watch(tmp_path, [TruthfulQAMetrics(questions=None)], max_steps=1)
    assert not [name for name in run.logger.names if name.startswith("behaviour/")]
    with pytest.raises(UserError, match=r"path: cannot read gone.json"):
        watch(tmp_path, [TruthfulQAMetrics(questions=TruthfulQA("gone.json"))])


def test_rows_of_steps_that_are_taken_again_are_dropped(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[list[Figure]] = []

    def fit_once(*states: Any, **options: Any) -> list[Figure]:
        """Which rows there are is the question, not what stands in them."""
        fitted.extend([] if fitted else [classifier_figures(*states, **options)])
        return fitted[0]

    monkeypatch.setattr("callbacks.preference_probe.classifier_figures", fit_once)

    def go(every: int | None, checkpoint: str | None = None) -> Watched:
        watchers = [
            Acceptance(forget_steps_ahead),
            TruthfulQAMetrics(questions=TruthfulQA(str(questions)), every_n_steps=every),
            PreferenceProbe(every_n_steps=every),
            PreferenceMetrics(),
        ]
        options = {"max_epochs": 1 if every is None else 2, "limit_val_batches": 1.0}
        return watch(tmp_path, watchers, module=dpo(schedule="constant"), ckpt_path=checkpoint, **options)

    checkpoint = tmp_path / "last.ckpt"
    go(None).module.trainer.save_checkpoint(checkpoint)
    go(1)
    assert set(figures(tmp_path)["steps_taken"]) == {0, 1, 2, 3, 4, 5, 6}
    resumed = go(3, str(checkpoint))
    assert set(figures(tmp_path)["steps_taken"]) == {0, 1, 2, 3, 6}
    assert resumed.logger.of("behaviour/truthfulqa_mc1_zero_shot")
