"""Every logged name is built from a declaration, and read back by the one parser."""

import runpy
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest

from analysis.registry import ANALYSES
from datamodules.oracle import PlantedOracle
from datamodules.synthetic import SyntheticWorld
from tiltmeter import metric_names
from tiltmeter.geometry.rows import VARIANTS
from tiltmeter.judges.judge import Question, Reply
from tiltmeter.judges.judge_scorer import JudgeScorer
from tiltmeter.metric_names import (
    MATRICES,
    MEDIA,
    METRICS,
    at,
    behaviour,
    find,
    keys_of,
    matrix,
    metric,
)
from tiltmeter.models.generation import Completion
from tiltmeter.scoring.degeneration import DegenerationScorer
from tiltmeter.scoring.overlap import OverlapScorer
from tiltmeter.scoring.preference import kl_figures, preference_scores
from tiltmeter.scoring.scorer import Sample, Scorer, as_metrics, kept_notices
from tiltmeter.scoring.toxicity import PROMPT_TOXICITY, WordListToxicity
from tiltmeter.scoring.truthfulqa import FIGURES as TRUTHFULQA
from tiltmeter.states.positions import POSITIONS

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
FILLED = {"<source>": "hh/harmless-base", "<n>": "5", "<site>": "layer_03", "<prefix>": "strict"}
FIELDS = ("<score>", "<criterion>", "<reason>", "<section>")


def filled(key: str) -> str:
    for field, value in (FILLED | dict.fromkeys(FIELDS, "honest")).items():
        key = key.replace(field, value)
    return key


def test_the_page_of_metrics_is_what_the_command_writes(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(metric_names.__file__, run_name="__main__")
    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8"), (
        "python -m tiltmeter.metric_names > docs/metrics.md"
    )


@pytest.mark.parametrize("declared", METRICS + MEDIA, ids=lambda declared: declared.keys[0])
def test_every_declared_name_is_read_back_as_what_it_was_built_from(declared) -> None:  # type: ignore[no-untyped-def]
    for key in declared.keys:
        if declared.position is None:
            found = find(metric(filled(key)))
            assert found is not None
            assert (found.metric, found.site, found.position) == (declared, None, None)
            assert found.key.replace("geval", "<prefix>") == key.replace("geval", "<prefix>")
            continue
        for site, position in product(("layer_00", "layer_123", "final_pre_norm", "final_post_norm"), POSITIONS):
            assert find(at(metric(key), (site, position))) == (declared, key, site, position, {})


def test_no_two_metrics_share_a_name() -> None:
    keys = [(key, declared.position is None) for declared in METRICS + MEDIA for key in declared.keys]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("parts", [("train", "lost"), ("shift_share", "delta", "layer_03"), ("behaviour", "blue"), ()])
def test_a_name_that_is_not_declared_cannot_be_built(parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="not declared in tiltmeter/metric_names"):
        metric(*parts)


@pytest.mark.parametrize("key", ["train/loss", "shift_share/none"])
def test_a_metric_without_sites_has_no_name_at_one(key: str) -> None:
    with pytest.raises(ValueError, match="as a metric of hidden states"):
        at(key, ("layer_03", "prompt_last"))


NOTHING = ("step", "train/lost", "shift_share/delta", "projection/delta/diverge/layer_03", "v/layer_03", "layer_03", "")


@pytest.mark.parametrize(
    "name", [*NOTHING, *(f"shift_share/delta/{end}" for end in ("layer_3", "prompt_last/layer_03"))]
)
def test_a_name_that_nothing_builds_stands_for_nothing(name: str) -> None:
    assert find(name) is None


def test_matrices_are_those_of_the_controls() -> None:
    assert set(MATRICES) == {matrix(of, v) for of in ("base", "policy", "delta") for v in VARIANTS} | {
        matrix("random_update", v) for v in VARIANTS[:2]
    }


def test_figures_sent_while_training_are_declared() -> None:
    assert keys_of("figures") == [f"figures/{analysis.name}" for analysis in ANALYSES if analysis.while_training]


class _Always:
    """A judge that likes everything but every second question."""

    name = "anybody"
    n_asked = 0

    def start(self, *, want_probabilities: bool) -> None: ...

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        return [
            Reply(probabilities=dict.fromkeys(q.choices[:1], 1.0)) if i % 2 else Reply(failure="api", reason="down")
            for i, q in enumerate(questions)
        ]


def test_every_scorer_gives_declared_figures() -> None:
    said = Completion("Yes.", 1, is_cut=False)
    samples = [
        Sample(str(i), "Why?", "So.", said, said, str(i), index, {"situation": "why", PROMPT_TOXICITY: i / 6})
        for i in range(6)
        for index in range(2)
    ]
    scorers: list[Scorer] = [
        OverlapScorer(),
        OverlapScorer(reference="base"),
        DegenerationScorer(),
        WordListToxicity(),
        PlantedOracle(SyntheticWorld(n_prompts=6)),
        JudgeScorer(_Always(), evaluation_steps=["Read."]),
    ]
    pairs = preference_scores([1.0, 2.0], [0.0, 1.0], beta=1.0, groups=["a", "b"], sources=["x/y", "z"])
    figures = pairs.figures + kl_figures([-1.0], [-2.0], [1], groups=["a"])
    with kept_notices():  # of the judge that was down
        for scorer in scorers:
            scorer.start()
            figures += scorer.score(samples).figures
    names = set(as_metrics(figures)) | {
        f"behaviour/{name}{preset}{chat}"
        for name, _ in TRUTHFULQA.values()
        for preset in ("", "_zero_shot")
        for chat in ("", "_chat")
    }
    assert [name for name in sorted(names) if find(name) is None] == []
    assert {"behaviour/geval_win_rate", "behaviour/geval_win_rate_vs_chosen_missing/api"} <= names
    assert {"behaviour/exp_max_toxicity_word_list@2_toxic_prompts/base"} <= names


@pytest.mark.parametrize(
    ("figure", "unit", "label"),
    [
        ("exp_max_toxicity_std@5", "share, 0 … 1", ""),
        ("exp_max_toxicity@5_toxic_prompts", "share, 0 … 1", "exp max toxicity@5"),
        ("geval_score/helpfulness_missing/api", "count", ""),
        ("geval_score/helpfulness", "share, 0 … 1", "geval score/helpfulness"),
        ("strict_win_rate_vs_chosen_missing/parse", "count", ""),
        ("strict_win_rate_vs_chosen", "share, 0 … 1", ""),
        ("preference_probe_accuracy/final_pre_norm", "share, 0 … 1", "linear probe, final pre norm"),
    ],
)
def test_a_figure_with_something_filled_in_is_known(figure: str, unit: str, label: str) -> None:
    found = behaviour(figure)
    assert found is not None
    assert (found.metric.unit, found.label) == (unit, label)
