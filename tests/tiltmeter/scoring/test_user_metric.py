"""Metric scripts of the user's own, through the evaluate library."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.text_samples import figure, samples_of
from tiltmeter.errors import UserError
from tiltmeter.scoring.user_metric import UserMetric

SCRIPT = """
import datasets
import evaluate


class Metric(evaluate.Metric):
    def _info(self):
        columns = {{{columns}}}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(columns))

    def _compute(self, predictions, references=None, bonus=0.0):
        {body}
"""
BOTH = '"predictions": datasets.Value("string"), "references": datasets.Value("string")'
ALONE = '"predictions": datasets.Value("string")'


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """evaluate copies scripts into its cache and imports them from there."""
    import evaluate

    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_MODULES_CACHE", "HF_EVALUATE_CACHE", "HF_METRICS_CACHE"):
            patch.setattr(evaluate.config, name, tmp_path_factory.mktemp(name))
        yield


def started(folder: Path, body: str, columns: str = BOTH, name: str = "mine", **options: Any) -> UserMetric:
    script = folder / f"{name}.py"
    script.write_text(SCRIPT.format(columns=columns, body=body), encoding="utf-8")
    metric = UserMetric(f"evaluate:{script}", **options)
    metric.start()
    return metric


def test_a_number_is_a_figure_of_all_samples_and_a_list_one_a_sample(tmp_path: Path) -> None:
    body = (
        "same = sum(p == r for p, r in zip(predictions, references)); "
        'return {"same": same, "each": [len(p) for p in predictions]}'
    )
    metric = started(tmp_path, body)
    samples = samples_of(["right", "wrong!!", "right"], ["right"] * 3, chosen="right")
    scores = metric.score(samples)
    same = figure(scores, "mine_same")
    assert (same.value, same.n, same.n_missing, same.scorer) == (2, 3, 0, metric.name)
    assert math.isnan(same.low)
    assert math.isnan(same.high)
    assert figure(scores, "mine_same", "base").value == 3
    assert scores.columns["mine_each/policy"] == [5, 7, 5]
    each = figure(scores, "mine_each")
    assert each.value == pytest.approx(17 / 3)
    assert each.low < each.value < each.high


def test_a_metric_without_references_gets_none_and_options_are_passed_on(tmp_path: Path) -> None:
    metric = started(
        tmp_path, 'assert references is None; return {"n": len(predictions) + bonus}', ALONE, options={"bonus": 0.5}
    )
    assert figure(metric.score(samples_of(["a", "b"])), "mine_n").value == 2.5
    assert metric.name.endswith("mine.py bonus=0.5")


def test_what_is_no_number_is_named_and_what_is_not_finite_is_missing(tmp_path: Path) -> None:
    body = 'return {"text": "x", "some": [1.0], "nan": float("nan"), "inf": float("inf"), "flag": True, "ok": 1}'
    metric = started(tmp_path, body)
    with pytest.warns(UserWarning, match="also gave flag, some, text: no number, nor one a sample"):
        scores = metric.score(samples_of(["a", "b"]))
    assert {f.name for f in scores.figures} == {"mine_nan", "mine_inf", "mine_ok"}
    for name in ("mine_nan", "mine_inf"):
        assert math.isnan(figure(scores, name).value)
        assert (figure(scores, name).n, figure(scores, name).n_missing) == (0, 2)


def test_a_metric_that_fails_is_missing_and_says_why(tmp_path: Path) -> None:
    metric = started(tmp_path, 'raise KeyError("oops\\nmore")')
    with pytest.warns(UserWarning, match="mine.py failed on the (policy|base)'s completions: 'oops"):
        scores = metric.score(samples_of(["a", "b"]))
    assert math.isnan(figure(scores, "mine").value)
    assert figure(scores, "mine").n_missing == 2


def test_no_samples_give_a_missing_figure(tmp_path: Path) -> None:
    assert math.isnan(figure(started(tmp_path, "return {}").score([]), "mine").value)


def test_a_folder_stands_for_the_script_of_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "counting"
    folder.mkdir()
    started(folder, 'return {"n": 1}', name="counting")
    metric = UserMetric(f"evaluate:{folder}")
    metric.start()
    assert figure(metric.score(samples_of(["a"])), "counting_n").value == 1


def test_a_script_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^metric: can't load .*mine\.py: ") as caught:
        started(tmp_path, "return {}", columns="this is no Python")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["rouge", "someone/a_metric"])
def test_a_name_on_the_hub_needs_trust_and_a_network(name: str) -> None:
    with pytest.raises(UserError, match=r"^trust: .* downloads from the hub and runs; read it, then set trust=true"):
        UserMetric(f"evaluate:{name}")
    metric = UserMetric(f"evaluate:{name}", trust=True, revision="v1")
    assert metric.name == f"evaluate:{name}@v1"
    with (
        pytest.warns(UserWarning, match=f"runs code of {name} from the Hugging Face hub"),
        pytest.raises(UserError, match=rf"^metric: can't get {name} from the Hugging Face hub \(.*\); check") as caught,
    ):
        metric.start()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("rouge", r"metric: expected evaluate:NAME or evaluate:PATH, got 'rouge'"),
        ("evaluate:", "expected evaluate:NAME"),
        ("evaluate:./no/such.py", r"metric: no such metric script: \./no/such\.py"),
        ("evaluate:a/b/c", "no such metric script"),
        ("evaluate:/tmp", "no such metric script"),
    ],
)
def test_what_is_no_metric_is_refused(metric: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        UserMetric(metric)


def test_a_revision_of_a_script_on_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"revision: only for a metric from the hub"):
        started(tmp_path, "return {}", revision="v1")
