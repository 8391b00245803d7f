"""GenerationMetrics in a training run: when it asks, what it keeps, that training doesn't notice, and resuming."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig

from callbacks.behaviour.acceptance import Acceptance
from callbacks.behaviour.generation_metrics import GenerationMetrics
from callbacks.behaviour.scoring import forget_steps_ahead
from lightning_modules.base import LogProbModule
from lightning_modules.sft import SFTModule
from tests.callbacks.scorers import Fails, Held, Lengths, Missing
from tests.callbacks.watched import N_PROBE, Watched, dpo, watch
from tests.processes import HANGS
from tests.tiny_models import lightning_warnings, make_data
from tiltmeter.errors import UserError
from tiltmeter.metric_names import SCORED_STEP
from tiltmeter.models.generation import Decoding, generate
from tiltmeter.scoring.behaviour import FIGURES, SAMPLES, as_cell, read_table
from tiltmeter.scoring.degeneration import DegenerationScorer
from tiltmeter.scoring.overlap import OverlapScorer
from tiltmeter.scoring.toxicity import WordListToxicity

pytestmark = lightning_warnings
GREEDY = Decoding(max_new_tokens=8)
SAMPLED = Decoding(max_new_tokens=8, temperature=1.0, n_samples=2)


def asking(*, decoding: Decoding = GREEDY, **options: Any) -> GenerationMetrics:
    return GenerationMetrics(**({"scorers": {"lengths": Lengths()}, "decoding": decoding} | options))


def table(folder: Path, name: str) -> pd.DataFrame:
    return read_table(folder / "report" / "tables" / name)


def steps_of(run: Watched, name: str = "behaviour/characters") -> list[float]:
    return [row[SCORED_STEP] for row in run.logger.rows if name in row]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Watched, Path, Lengths]:
    """Two epochs of three steps, sampled completions, the scorers of callbacks=behaviour and one that remembers."""
    folder, lengths = tmp_path_factory.mktemp("run"), Lengths()
    scorers = {
        "overlap": OverlapScorer(),
        "degeneration": DegenerationScorer(),
        "toxicity": WordListToxicity(),
        "judge": None,
        "lengths": lengths,
    }
    return watch(folder, [asking(decoding=SAMPLED, scorers=scorers)], max_epochs=2), folder, lengths


def test_base_and_policy_are_asked_at_the_start_and_after_every_epoch(asked: tuple[Watched, Path, Lengths]) -> None:
    run, _, lengths = asked
    assert steps_of(run) == [0, 3, 6]
    assert [row["step"] for row in run.logger.rows if "behaviour/characters" in row] == [0, 2, 5]
    assert lengths.n_starts == 1
    for samples in lengths.seen:
        assert [(s.base, s.pair_id) for s in samples] == [(s.base, s.pair_id) for s in lengths.seen[0]]
    assert all(s.policy == s.base for s in lengths.seen[0]), "the first look is at the base"
    assert any(s.policy != s.base for s in lengths.seen[-1])


def test_figures_are_logged_for_both_models_and_null_is_left_out(asked: tuple[Watched, Path, Lengths]) -> None:
    run, _, _ = asked
    for name in ("bleu", "rougeL", "degeneration", "length", "toxicity_word_list", "characters"):
        base = run.logger.of(f"behaviour/{name}/base")
        assert len(run.logger.of(f"behaviour/{name}")) == len(base) == 3, name
        assert base == [base[0]] * 3, f"{name}: the base's completions don't change"
        assert run.logger.of(f"behaviour/{name}")[0] == base[0]


def test_completions_are_what_the_model_itself_says(asked: tuple[Watched, Path, Lengths]) -> None:
    run, _, lengths = asked
    model, tokenizer, probe = run.module.trained_policy.model, run.data.tokenizer, run.data.splits["probe"]
    assert tokenizer is not None
    keys = [record.pair_id for record in probe.records]
    said = generate(model, tokenizer, [pair.prompt_ids for pair in probe.pairs], SAMPLED, keys=keys)
    assert [s.policy for s in lengths.seen[-1]] == [one for both in said for one in both]
    assert [s.pair_id for s in lengths.seen[-1]] == [key for key in keys for _ in range(2)]


def test_the_report_s_tables_hold_every_figure_and_completion(asked: tuple[Watched, Path, Lengths]) -> None:
    run, folder, lengths = asked
    figures, samples = table(folder, FIGURES), table(folder, SAMPLES)
    assert list(samples.columns[:8]) == [
        "steps_taken",
        "epoch",
        "pair_id",
        "sample",
        "prompt",
        "base",
        "policy",
        "chosen",
    ]
    assert len(samples) == 3 * 2 * N_PROBE
    assert samples["steps_taken"].unique().tolist() == [0, 3, 6]
    assert samples["policy"].tolist()[-2 * N_PROBE :] == [as_cell(s.policy.text) for s in lengths.seen[-1]]
    assert samples["characters/policy"].tolist()[-1] == len(lengths.seen[-1][-1].policy.text)
    assert set(figures["steps_taken"]) == {0, 3, 6}
    for of, name in (("policy", "behaviour/bleu"), ("base", "behaviour/bleu/base")):
        rows = figures[(figures["metric"] == "bleu") & (figures["of"] == of)]
        assert rows["value"].tolist() == pytest.approx(run.logger.of(name))
        assert (rows["n"] == 2 * N_PROBE).all()


def test_training_is_the_same_to_the_last_bit(asked: tuple[Watched, Path, Lengths], tmp_path: Path) -> None:
    run, _, _ = asked
    plain = watch(tmp_path, [], max_epochs=2)
    assert plain.logger.of("train/loss") == run.logger.of("train/loss")
    for a, b in zip(plain.module.parameters(), run.module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every_n_steps": 2}, [0, 2, 3, 4, 6]),
        ({"epochs": [1]}, [0, 6]),
        ({"epochs": []}, [0]),
        ({"every_n_steps": 3, "epochs": [0]}, [0, 3, 6]),
    ],
)
def test_it_asks_when_it_was_told_to_and_once_a_step(
    options: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    assert steps_of(watch(tmp_path, [asking(n_prompts=2, **options)], max_epochs=2)) == expected


def test_prompts_are_the_first_of_the_probe_or_of_validation(tmp_path: Path) -> None:
    lengths = Lengths()
    run = watch(tmp_path, [asking(scorers={"x": lengths}, n_prompts=3)], max_steps=1)
    assert [s.pair_id for s in lengths.seen[0]] == [r.pair_id for r in run.data.splits["probe"].records][:3]
    without = watch(tmp_path, [asking(scorers={"x": lengths})], data=make_data(8, pairs_per_step=4), max_steps=1)
    assert [s.pair_id for s in lengths.seen[-1]] == [r.pair_id for r in without.data.splits["val"].records]


def test_a_scorer_that_breaks_or_finds_nothing_stops_nobody(tmp_path: Path) -> None:
    scorers = {"bad": Fails(), "none": Missing(), "lengths": Lengths()}
    with pytest.warns(UserWarning, match="behaviour: bad .* could not score these samples: 'out of order'"):
        run = watch(tmp_path, [asking(scorers=scorers)])
    assert steps_of(run) == [0, 3]
    assert all(math.isnan(value) for value in run.logger.of("behaviour/missing"))
    figures = table(tmp_path, FIGURES)
    missing = figures[figures["metric"] == "missing"]
    assert missing["value"].isna().all()
    assert missing["n_missing"].tolist() == [N_PROBE] * 2


def test_what_can_not_be_written_is_an_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tiltmeter.scoring.behaviour.write_atomically", full)
    with pytest.warns(UserWarning, match=r"tables: could not be written \(No space left on device\)"):
        run = watch(tmp_path, [asking()])
    assert steps_of(run) == [0, 3]
    assert run.module.trainer.global_step == 3


def test_a_table_that_somebody_damaged_does_not_end_training(tmp_path: Path) -> None:
    class Damages(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            (tmp_path / "report" / "tables" / FIGURES).write_text("nothing,known\n1,2\n", encoding="utf-8")

    with pytest.warns(UserWarning, match=rf"{FIGURES}: expected a column steps_taken"):
        run = watch(tmp_path, [asking(), Damages()])
    assert steps_of(run) == [0, 3]


def test_slow_scorers_are_logged_late_with_the_step_they_are_about(tmp_path: Path) -> None:
    held = Held()

    class LetsGo(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 1:
                held.go.set()

    run = watch(tmp_path, [LetsGo(), asking(scorers={"held": held}, wait_seconds=HANGS)], max_epochs=2)
    assert steps_of(run) == [0, 3, 6]
    late = next(row for row in run.logger.rows if "behaviour/characters" in row)
    assert late["probe/steps_taken"] > 0
    assert late[SCORED_STEP] == 0
    figures, samples = table(tmp_path, FIGURES), table(tmp_path, SAMPLES)
    assert figures["steps_taken"].unique().tolist() == [0, 3, 6]
    assert not samples["characters/policy"].isna().any()


def test_the_end_of_training_does_not_wait_for_ever(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = Held()
    run = watch(tmp_path, [asking(scorers={"held": held, "lengths": Lengths()}, wait_seconds=0.2)])
    assert "2 sets of samples were not judged within 0 s of the end of training" in caplog.text
    held.go.set()
    assert steps_of(run) == [0, 3], "the quick ones are there"
    assert len(table(tmp_path, SAMPLES)) == 2 * N_PROBE


WAYS: dict[str, tuple[Callable[[], LogProbModule], dict[str, Any]]] = {
    "lora": (lambda: dpo(lora=LoraConfig(r=2, lora_alpha=4), learning_rate=0.05), {}),
    "activation checkpointing": (lambda: dpo(activation_checkpointing=True), {}),
    "bf16-mixed": (dpo, {"precision": "bf16-mixed"}),
    "bf16-true": (dpo, {"precision": "bf16-true"}),
    "float64": (dpo, {"dtype": "float64"}),
    "gpt2": (dpo, {"family": "gpt2"}),
    "sft": (lambda: SFTModule(learning_rate=3e-3, warmup_share=0.0), {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_train_are_asked_too(way: str, tmp_path: Path) -> None:
    make, options = WAYS[way]
    torch.manual_seed(0)  # adapters start at random
    with_it = watch(tmp_path / "asked", [asking(decoding=SAMPLED)], module=make(), **options)
    assert steps_of(with_it) == [0, 3]
    texts = table(tmp_path / "asked", SAMPLES)
    assert (texts["base"] == texts["policy"])[: 2 * N_PROBE].all()
    assert (texts["base"] != texts["policy"]).any()
    torch.manual_seed(0)
    without = watch(tmp_path / "plain", [], module=make(), **options)
    assert without.logger.of("train/loss") == with_it.logger.of("train/loss")


def checkpointed(folder: Path, callbacks: list[Callback], **options: Any) -> tuple[str, Watched]:
    run = watch(folder, callbacks, module=dpo(schedule="constant"), **options)
    path = folder / "checkpoints" / "last.ckpt"
    run.module.trainer.save_checkpoint(path)
    return str(path), run


def resume(folder: Path, callbacks: list[Callback], checkpoint: str, **options: Any) -> Watched:
    module = dpo(schedule="constant")
    return watch(folder, callbacks, module=module, max_epochs=2, ckpt_path=checkpoint, **options)


def test_a_resumed_run_compares_with_the_first_base_and_has_each_row_once(tmp_path: Path) -> None:
    checkpoint, first = checkpointed(tmp_path, [asking(decoding=SAMPLED)])
    lost = watch(tmp_path, [asking(decoding=SAMPLED, every_n_steps=1)], module=dpo(schedule="constant"), max_epochs=2)
    assert steps_of(lost)[-1] == 6
    resumed = resume(tmp_path, [Acceptance(forget_steps_ahead), asking(decoding=SAMPLED)], checkpoint)
    whole = watch(tmp_path / "whole", [asking(decoding=SAMPLED)], module=dpo(schedule="constant"), max_epochs=2)
    assert steps_of(first) + steps_of(resumed) == [0, 3, 6]
    assert resumed.logger.of("behaviour/characters")[-1] == whole.logger.of("behaviour/characters")[-1]
    kept = table(tmp_path, SAMPLES)
    kept = kept[kept["steps_taken"].isin([0, 3, 6])].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, table(tmp_path / "whole", SAMPLES))
    assert (table(tmp_path, FIGURES)["steps_taken"] != 5).all(), "rows of steps that are taken again are dropped"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, {}),
        ({"n_prompts": 4}, {}),
        ({}, {"decoding": SAMPLED}),
        ({}, {"decoding": Decoding(max_new_tokens=9)}),
        ({"decoding": SAMPLED}, {"decoding": Decoding(max_new_tokens=8, temperature=0.5, n_samples=2)}),
    ],
)
def test_resuming_without_the_same_completions_of_the_base_is_refused(
    before: dict[str, Any] | None, after: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint, _ = checkpointed(tmp_path, [] if before is None else [asking(**before)])
    with pytest.raises(UserError, match="callbacks: this checkpoint holds no completions of the base model") as caught:
        resume(tmp_path, [asking(**after)], checkpoint)
    assert "\n" not in str(caught.value)
    assert "callbacks=none" in str(caught.value)


def test_a_run_may_go_on_with_fewer_prompts_or_other_scorers(tmp_path: Path) -> None:
    checkpoint, _ = checkpointed(tmp_path, [asking()])
    resumed = resume(tmp_path, [asking(n_prompts=3, scorers={"degeneration": DegenerationScorer()})], checkpoint)
    assert resumed.logger.of("behaviour/length")


def test_nothing_to_complete_and_wrong_options_are_one_line(tmp_path: Path) -> None:
    for options, words in (
        ({"n_prompts": 0}, "callbacks: n_prompts from 1, wait_seconds from 0; got 0, 300"),
        ({"wait_seconds": -1.0}, "callbacks: n_prompts from 1, wait_seconds from 0; got 128, -1"),
        ({"every_n_steps": 0}, "callbacks: every_n_steps: expected at least 1 or null, got 0"),
        ({"epochs": [-1]}, r"callbacks: epochs: expected whole numbers from 0 or null, got \[-1\]"),
    ):
        with pytest.raises(UserError, match=words):
            asking(**options)
