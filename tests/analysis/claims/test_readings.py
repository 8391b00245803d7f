"""What a study reads of its models: KL from the base, by hand, the noise floor, and a number of a report's table."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from analysis.claims.claim import OfTable, Within
from analysis.claims.readings import (
    _noise_readings,
    _of_tables,
    _parting,
    _probe,
    _unrelated,
    figure_of,
    kl_from_base,
    noise_ratio,
)
from tests.analysis.asked import checkpoints


def test_kl_from_the_base_is_that_of_the_distributions_token_by_token() -> None:
    models, by_hand = checkpoints(3), []
    for pair in models.pairs:
        prompt, chosen, _ = pair.ids
        ids = torch.tensor([[*prompt, *chosen]])
        with torch.no_grad():
            q, p = (one.model(ids).logits[0].double().softmax(-1) for one in (models.base, models.aligned))
        for at in range(len(prompt) - 1, len(prompt) + len(chosen) - 1):
            by_hand.append(sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p[at], q[at], strict=True)))
    pairs = [pair.ids for pair in models.pairs]
    base, aligned = models.base.model, models.aligned.model
    assert kl_from_base(base, aligned, pairs) == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-9)
    assert kl_from_base(base, base, pairs) == pytest.approx(0.0, abs=1e-12)


def test_another_model_is_far_above_the_noise_floor_and_the_kernel_is_put_back() -> None:
    models = checkpoints(8)
    before = models.base.model.config._attn_implementation
    probe = _probe(models)
    moved = probe.read_pair(models.base.model, models.aligned.model)
    assert noise_ratio(moved, _noise_readings(models, probe)) > 1000
    assert noise_ratio(moved, [moved.policy]) == pytest.approx(1.0)
    assert models.base.model.config._attn_implementation == before


def test_states_of_unrelated_text_and_where_responses_part_are_read_of_both_models() -> None:
    models = checkpoints(8)
    assert _unrelated(models).has_changed()
    found = _parting(models)
    assert found is not None
    assert len(found.v) == found.states.n_rows


def test_number_of_a_table_is_the_mean_of_the_rows_that_are_meant(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = {"site": ["a", "a", "b"], "lambda": [1.0, 2.0, 1.0], "r": [0.5, 0.7, 9.0]}
    ends = {"r_low": [0.5 - 1.96, 0.7 - 1.96, 9.0], "r_high": [0.5 + 1.96, 0.7 + 1.96, 9.0]}
    pd.DataFrame(rows | ends).to_csv(path, index=False)
    mean = figure_of(path, OfTable("t", "r", {"site": "a"}))
    assert mean == pytest.approx((0.6, 1.0), abs=1e-4), "the standard error behind the interval of the table"
    difference = figure_of(path, OfTable("t", "r", {"site": "a", "lambda": 2}, {"lambda": 1}))
    assert difference == pytest.approx((0.2, math.sqrt(2)), abs=1e-4)
    pd.DataFrame(rows).to_csv(path, index=False)
    plain = figure_of(path, OfTable("t", "r", {"site": "a"}))
    assert plain is not None
    assert math.isnan(plain.error)
    assert figure_of(path, OfTable("t", "r", {"site": "c"})) is None
    assert figure_of(path, OfTable("t", "x", {})) is None


def test_figure_within_a_margin_is_the_farthest_end_of_all_rows_in_margins(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = {"site": ["a", "a", "b", "c"], "r": [0.98, 0.9, math.nan, 0.9], "r_low": [0.97, 0.85, math.nan, math.nan]}
    pd.DataFrame(rows | {"r_high": [0.99, 0.95, math.nan, math.nan]}).to_csv(path, index=False)
    asked = OfTable("t", "r", {"site": "a"}, within=Within(1.0, 0.05))
    assert figure_of(path, asked) == pytest.approx((3.0, math.nan), nan_ok=True), "0.15 below 1"
    assert figure_of(path, replace(asked, where={"site": "b"})) is None
    assert figure_of(path, replace(asked, where={"site": "c"})) is None, "a number without an interval proves nothing"
    assert figure_of(path, replace(asked, column="site")) is None


def test_table_without_a_number_is_made_again_once(tmp_path: Path) -> None:
    """Such as one that was made without the other corpus that is there now."""
    path, asked, calls = tmp_path / "tables" / "t.csv", OfTable("t", "r", {"site": "b"}), list[str]()
    path.parent.mkdir()
    pd.DataFrame({"site": ["a"], "r": [1.0]}).to_csv(path, index=False)
    run = SimpleNamespace(report=tmp_path, folder=tmp_path, setting=lambda name: 0)
    study = SimpleNamespace(runs={"dpo": [run]})

    def make(_: object, name: str) -> None:
        calls.append(name)
        pd.DataFrame({"site": ["a", "b"], "r": [1.0, 2.0]}).to_csv(path, index=False)

    ask = partial(_of_tables, study, make, calls.append, set(), "dpo")  # type: ignore[arg-type]
    assert [figure.value for figure in ask(asked)] == [2.0]  # type: ignore[union-attr]
    assert calls == ["t of dpo, seed 0, again", "t"]
    for _ in range(2):
        assert ask(replace(asked, where={"site": "c"})) == f"{path} has no such number"
    assert len(calls) == 2
