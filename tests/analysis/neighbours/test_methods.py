"""Methods on the same tokens against passes written out; what is exact at its ends; the table of a synthetic world."""

import math
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from analysis.neighbours import methods
from analysis.neighbours.lines import BASE, Line, Source, mean_change, measure
from analysis.neighbours.methods import BEST_OF, BIAS, CFGRL, DPO, LINEAR, PROMPT, VECTOR, Neighbours
from analysis.neighbours.section import neighbours_section
from analysis.open.checkpoints import Checkpoints
from analysis.open.pair_log_probs import sums_of_pairs, tokens_of_pairs
from analysis.steering.directions import split_by_prompt
from tests.analysis import asked
from tests.analysis.belief.test_shift import of_world
from tests.analysis.legible import assert_legible
from tests.tiny_models import reference_log_probs
from tiltmeter.errors import UserError
from tiltmeter.models.generation import Decoding
from tiltmeter.models.layers import FINAL_POST_NORM
from tiltmeter.pairs.preference_losses import make_preference_loss
from tiltmeter.steering.intervene import Intervention, steer

FEW = Decoding(max_new_tokens=4)


def sources(models: Checkpoints) -> dict[str, Source]:
    ids = [pair.ids for pair in models.pairs]
    return {BASE: Source(models.base, ids), DPO: Source(models.aligned, ids)}


def exact(models: Checkpoints) -> Checkpoints:
    """In float64."""
    for opened in (models.base, models.aligned):
        opened.model.double()
    return models


def test_every_line_is_what_a_straight_computation_gives() -> None:
    models = exact(asked.checkpoints(5))
    ids, n = [pair.ids for pair in models.pairs], 5
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(32, generator=draw, dtype=torch.float64)
    b = torch.randn(len(asked.TOKENIZER), generator=draw, dtype=torch.float64)
    lines = [
        Line(BASE, 0.0),
        Line(DPO, 1.0, DPO),
        Line(CFGRL, 2.5, DPO),
        Line(VECTOR, 2.0, state=v),
        Line(BIAS, 0.5, logits=b),
    ]
    found = measure(lines, sources(models))
    with torch.no_grad():
        base, aligned = (reference_log_probs(of.model, ids) for of in (models.base, models.aligned))
        with steer(models.base.model, [Intervention(FINAL_POST_NORM, 2 * v[None])]):
            steered = reference_log_probs(models.base.model, ids)
    for i, expected in ((0, base), (1, aligned), (3, steered)):
        torch.testing.assert_close(found.log_probs[i].T.flatten(), expected, rtol=1e-9, atol=1e-9)
    assert found.kl[0].abs().max() < 1e-12
    pair = ids[2]
    whole, first = torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]]), len(pair.prompt_ids) - 1
    with torch.no_grad():
        z, z_aligned = (
            of.model(input_ids=whole, use_cache=False).logits[0, first:-1] for of in (models.base, models.aligned)
        )
    for i, mixed in ((2, z + 2.5 * (z_aligned - z)), (4, z + 0.5 * b)):
        p, q = mixed.log_softmax(-1), z.log_softmax(-1)
        said = p.gather(1, whole[0, first + 1 :, None]).sum()
        assert float(found.log_probs[i, 2, 0]) == pytest.approx(float(said), rel=1e-9)
        assert float(found.kl[i, 2]) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-9)
    assert found.odds.shape == (5, n)


def test_bias_is_the_mean_change_of_centred_logits_over_all_response_tokens() -> None:
    models = exact(asked.checkpoints(3))
    changes = []
    for pair in (p.ids for p in models.pairs):
        for response in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([[*pair.prompt_ids, *response]])
            with torch.no_grad():
                z, other = (of.model(input_ids=ids, use_cache=False).logits[0] for of in (models.base, models.aligned))
            change = (other - z)[len(pair.prompt_ids) - 1 : -1]
            changes.append(change - change.mean(1, keepdim=True))
    torch.testing.assert_close(
        mean_change(sources(models), DPO).double(), torch.cat(changes).mean(0), rtol=1e-5, atol=1e-6
    )


@pytest.fixture(scope="module")
def found() -> tuple[pd.DataFrame, pd.DataFrame]:
    return Neighbours(decoding=FEW, best_of=2, principles=["Be kind.", "Be brief."]).table(of_world(24))


def test_table_has_every_method_and_says_what_was_not_given(found: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table, prompts = found
    assert set(table["method"]) == {DPO, VECTOR, BIAS, CFGRL, PROMPT, LINEAR, BEST_OF, *methods.NOT_GIVEN}
    assert table[table["missing"].notna()]["method"].tolist() == list(methods.NOT_GIVEN)
    assert prompts["principle"].tolist() == ["Be kind.", "Be brief."]
    spoken = table[table["behaviour"].notna()].set_index("method")
    assert spoken["behaviour"].between(0, 1).all()
    assert set(spoken.index) == {DPO, VECTOR, CFGRL, PROMPT, LINEAR, BEST_OF}
    dpo = table[table["method"] == DPO].iloc[0]
    assert dpo["gained_at_equal_kl"] == pytest.approx(dpo["preference_gained"])
    fits = table.dropna(subset=["parameters"]).drop_duplicates("method").set_index("method")["parameters"]
    assert (fits[VECTOR], fits[BIAS], fits[PROMPT]) == (32, len(asked.TOKENIZER), 0)
    assert table[table["method"].isin([PROMPT, LINEAR])]["loss_neutral"].isna().all(), "neutral text answers no prompt"


def test_section_is_legible(found: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    section = neighbours_section(found)
    assert_legible(section)
    assert {"methods", "methods_prompts"} == set(section.more_tables)
    assert any(line.startswith("Not measured, lora: no run of it was given") for line in section.reading)


def test_numbers_are_of_the_test_half_alone() -> None:
    models = asked.checkpoints(12)
    table, _ = Neighbours(n_prompts=None).table(models)
    test = split_by_prompt(models.pairs, seed=0).test
    with torch.no_grad():
        base, aligned = (reference_log_probs(of.model, [p.ids for p in test]) for of in (models.base, models.aligned))
    change = (aligned - base).view(2, -1)
    dpo = table[table["method"] == DPO].iloc[0]
    assert dpo["preference_gained"] == pytest.approx(float((change[0] - change[1]).mean()), rel=1e-4)
    assert dpo["n"] == len(test)
    assert "behaviour" not in table, "nobody judges"
    assert_legible(neighbours_section((table, pd.DataFrame([{"principle": "x", "preference_gained": 0.1}]))))


def test_prompts_that_can_not_be_written_again_leave_the_other_methods() -> None:
    models = asked.checkpoints(12)
    cut = [replace(pair, ids=pair.ids._replace(prompt_ids=pair.ids.prompt_ids[1:])) for pair in models.pairs]
    table, prompts = Neighbours().table(replace(models, pairs=cut))
    missing = table.dropna(subset=["missing"]).set_index("method")["missing"]
    assert missing[PROMPT].startswith("shift: 0 of 12 prompts come out as they were trained")
    assert not len(prompts)
    assert_legible(neighbours_section((table, prompts)))


def test_preference_loss_of_every_method_is_that_of_the_run_that_is_asked() -> None:
    models = replace(asked.checkpoints(12), loss=make_preference_loss("sigmoid", beta=0.5))
    table = Neighbours(best_of=0).table(models)[0].set_index(["method", "strength"])
    test = split_by_prompt(models.pairs, seed=0).test
    sums = [sums_of_pairs(tokens_of_pairs(of, [pair.ids for pair in test])) for of in (models.base, models.aligned)]
    margins = (sums[1] - sums[0])[:, 0] - (sums[1] - sums[0])[:, 1]
    expected = float(-torch.nn.functional.logsigmoid(0.5 * margins).mean())
    assert table["preference_loss"][DPO, 1.0] == pytest.approx(expected, rel=1e-4)
    assert table["preference_loss_low"][DPO, 1.0] < expected < table["preference_loss_high"][DPO, 1.0]
    assert table["minutes"].isna().all(), "of two checkpoints it isn't known"


def test_runs_are_rows_and_one_of_another_base_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "metrics.csv").touch()
    os.utime(tmp_path / "config.yaml", (1000, 1000))
    os.utime(tmp_path / "metrics.csv", (1090, 1090))
    run = SimpleNamespace(folder=tmp_path, node=lambda path: {}, setting={"arm": "sft_chosen"}.get)
    monkeypatch.setattr(methods, "open_run", lambda folder: run)
    for base in (0, 3):
        monkeypatch.setattr(
            methods, "checkpoints_of_run", lambda run, base=base, **how: asked.checkpoints(4, base=base, aligned=2)
        )
        asking = Neighbours(runs=["a"], decoding=FEW)
        if base:
            with pytest.raises(UserError, match="its base is another model; give runs of one base"):
                asking.table(asked.checkpoints(12))
        else:
            row = asking.table(asked.checkpoints(12))[0].set_index("method").loc["sft_chosen"]
            assert math.isfinite(row["preference_gained"])
            assert row["parameters"] > 0
            assert row["minutes"] == 1.5


def test_bad_option_is_one_line() -> None:
    for options, said in (
        ({"n_prompts": 3}, r"neighbours\.n_prompts: expected at least 4, got 3"),
        ({"weights": []}, r"neighbours\.weights: expected numbers above 0"),
        ({"lambdas": [0.0]}, r"neighbours\.lambdas: expected numbers above 0"),
        ({"principles": []}, r"neighbours\.principles: expected at least 1, got 0"),
        ({"runs": ["nowhere"]}, "run: no such folder: nowhere"),
    ):
        with pytest.raises(UserError, match=said):
            Neighbours(**options)  # type: ignore[arg-type]
