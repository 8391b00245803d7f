import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis.behaviour.by_step import behaviour_by_step_section, decoding_of, scores_by_step
from analysis.open.runs import Run, open_run
from analysis.open.subject import subject_of_run
from analysis.report.page import Section, write_report
from analysis.report.samples import Samples
from tests.analysis import planted_behaviour as planted
from tests.analysis.legible import assert_legible
from tests.tiltmeter.scoring.fake_judge import sample
from tiltmeter.errors import UserError
from tiltmeter.models.generation import Decoding
from tiltmeter.scoring.behaviour import BehaviourTables
from tiltmeter.scoring.scorer import Figure, Scores

MakeRun = Callable[..., Path]
GENERATION: dict[str, Any] = {"_target_": "callbacks.behaviour.generation_metrics.GenerationMetrics"}


def drawn(run: Run) -> Section:
    scores = scores_by_step(run)
    assert scores is not None
    return behaviour_by_step_section(scores)


def section_of(make_run: MakeRun, looks: dict[int, list[Figure]], **options: Any) -> Section:
    folder = make_run(**options)
    planted.write(folder, looks)
    return drawn(open_run(folder))


def shown(section: Section) -> dict[str, dict[str, str]]:
    """figure → its row in the page's table."""
    assert section.shown is not None
    rows = section.shown.set_index("figure")
    return {str(name): dict(row) for name, row in rows.iterrows()}


def test_sentences_have_the_tables_numbers(make_run: MakeRun) -> None:
    section = section_of(make_run, planted.LOOKS)
    assert section.sentences == [
        "By the planted oracle the policy’s win rate over its base is 75\u00a0% (70\u00a0% to 80\u00a0%)",
        "Mean word-list toxicity falls from 0.200 to 0.125 (0.115 to 0.135)",
        "Overlap with the chosen response (ROUGE-L) is 0.250 before and after",
    ]
    assert_legible(section)


def test_the_table_has_both_models_the_interval_and_the_scorers_number(make_run: MakeRun) -> None:
    section = section_of(make_run, planted.LOOKS)
    rows = shown(section)
    assert rows["toxicity_word_list"] == {
        "base": "0.200",
        "policy": "0.125",
        "95 % interval": "0.115 … 0.135",
        "n": "64",
        "by": "2",
    }
    assert rows["oracle_preference_rate_vs_chosen"]["policy"] == "0.625"
    assert rows["oracle_preference_rate_vs_chosen"]["base"] == "–"
    assert list(section.notes) == ["rouge", "word list sha256=1", "planted oracle"]


def test_the_headline_is_the_win_rate_with_its_scorer(make_run: MakeRun) -> None:
    (headline,) = section_of(make_run, planted.LOOKS).headlines
    assert headline.value == "0.750"
    assert "by the planted oracle" in headline.name
    unknown = "its agreement with labels: not measured"
    assert headline.source.startswith(f"95 % CI 0.700 … 0.800, n = 64, ties half; {unknown}; behaviour_by_step.csv")


def test_a_judge_s_agreement_with_labels_stands_beside_its_win_rates_and_scores(make_run: MakeRun) -> None:
    judged = [planted.figure("geval_win_rate", "both", 0.75, scorer="judge")]
    judged += [planted.figure("geval_score", side, 0.5, scorer="judge") for side in ("policy", "base")]
    agreement = planted.figure("judge/agreement", "judge", 0.625, n=100, scorer="judge")
    section = section_of(make_run, {0: [*judged, agreement], 10: [*judged, agreement]})
    said = "; the judge agrees with 62\u00a0% (57\u00a0% to 68\u00a0%) of 100 held-out labels"
    assert section.sentences == [
        f"By the judge the policy’s win rate over its base is 75\u00a0% (70\u00a0% to 80\u00a0%){said}",
        f"Mean G-Eval score (0 to 1) is 0.500 before and after{said}",
    ]
    (headline,) = section.headlines
    assert "its agreement with 100 held-out labels: 0.625 (0.575 … 0.675)" in headline.source
    assert shown(section)["judge/agreement"]["policy"] == "0.625"
    assert any(line.startswith("judge/agreement: the judge asked about held-out pairs") for line in section.reading)
    assert_legible(section)
    without = section_of(make_run, {0: judged}, stamp="2026-01-31_13-00-00")
    assert not any("agrees" in sentence for sentence in without.sentences)
    assert any("held-out pairs: not measured" in line for line in without.reading)


def test_a_missing_figure_is_said_and_not_drawn(make_run: MakeRun) -> None:
    looks = {0: planted.look(0.5, 0.2), 10: [planted.lost("oracle_preference_rate", "both"), *planted.look(0.9, 0.1)]}
    looks[10] = [f for i, f in enumerate(looks[10]) if i == 0 or f.name != "oracle_preference_rate"]
    section = section_of(make_run, looks)
    assert section.sentences[0] == (
        "The policy’s win rate over its base by the planted oracle has no number: 54 of 64 scores are missing"
    )
    assert shown(section)["oracle_preference_rate"] | {"by": ""} == {
        "base": "–",
        "policy": "–",
        "95 % interval": "–",
        "n": "10 of 64",
        "by": "",
    }
    assert not section.headlines
    assert any("left out and counted" in line for line in section.reading)


def test_nothing_to_score_is_not_called_missing(make_run: MakeRun) -> None:
    looks = {0: [planted.lost("toxicity", "policy", n=0, n_missing=0)]}
    assert section_of(make_run, looks).sentences == ["Mean toxicity has no number: there was nothing to score"]


def test_several_families_have_a_panel_each_and_both_judges_a_headline(make_run: MakeRun) -> None:
    more = [planted.figure("geval_win_rate", "both", 0.625, scorer="judge")]
    more += [planted.figure("geval_score", side, value) for side, value in (("policy", 0.5), ("base", 0.25))]
    more += [planted.figure("toxicity", side, 0.125, width=0) for side in ("policy", "base")]
    section = section_of(make_run, {10: [*planted.look(0.75, 0.1), *more]})
    assert section.figure.axes[0].get_ylabel() == "win rate"
    assert len(section.figure.axes) == len(section.sentences) == 6
    assert "Mean G-Eval score (0 to 1) rises from 0.250 to 0.500 (0.450 to 0.550)" in section.sentences
    assert [headline.value for headline in section.headlines] == ["0.750", "0.625"]


@pytest.mark.parametrize("of", ["policy", "both"])
def test_metrics_of_a_users_own_are_drawn_when_there_is_nothing_else(make_run: MakeRun, of: Any) -> None:
    looks = {step: [planted.figure("my_$\\frac{$", of, 2.0 + step)] for step in (0, 10)}
    if of == "policy":
        looks = {s: [*f, planted.figure("my_$\\frac{$", "base", 2.0)] for s, f in looks.items()}
    section = section_of(make_run, looks)
    assert section.sentences == ["My $\\frac{$ rises from 2.000 to 12.000 (11.950 to 12.050)"]


def test_one_look_alone(make_run: MakeRun) -> None:
    section = section_of(make_run, {10: [planted.figure("toxicity", "policy", 0.25)]})
    assert section.sentences == ["Mean toxicity is 0.250 (0.200 to 0.300)"]
    assert section_of(make_run, {0: planted.look(0.5, 0.2)}, stamp="2026-01-31_13-00-00").sentences[0].endswith("%)")


def test_a_single_prompt_has_no_interval(make_run: MakeRun) -> None:
    section = section_of(make_run, {10: [Figure("toxicity", "policy", 0.25, -math.inf, math.inf, 1, 0, "x")]})
    assert section.sentences == ["Mean toxicity is 0.250"]
    assert shown(section)["toxicity"]["95 % interval"] == "–"


def test_a_figure_that_stopped_early_says_at_which_step(make_run: MakeRun) -> None:
    section = section_of(make_run, {5: planted.look(0.75, 0.1), 10: [planted.figure("toxicity", "policy", 0.25)]})
    assert section.sentences[0].endswith("(70\u00a0% to 80\u00a0%) after step 5")
    assert "oracle_preference_rate (step 5)" in shown(section)
    assert "toxicity" in shown(section)


def test_the_number_of_prompts_is_that_of_the_completions(make_run: MakeRun) -> None:
    folder = make_run(config={"callbacks": {"x": GENERATION | {"decoding": {"temperature": 0.5, "n_samples": 2}}}})
    samples = [sample(str(i), "a", "b", index=k) for i in range(3) for k in range(2)]
    pairs = planted.figure("preference_accuracy", "both", 0.9, n=400)
    BehaviourTables(folder / "report" / "tables").add(10, 0, samples, Scores([*planted.look(0.75, 0.1), pairs]))
    found = drawn(open_run(folder))
    asked = "temperature 0.5, 2 each, at most 96 tokens, up to “Human:”"
    assert found.reading[0] == f"Both models complete the same 3 prompts ({asked}), with the same random numbers."


def test_decoding_is_what_the_callback_had(make_run: MakeRun) -> None:
    none = open_run(make_run("a"))
    assert decoding_of(none) is None
    defaults = open_run(make_run("b", config={"callbacks": {"generation": GENERATION | {"decoding": None}}}))
    assert decoding_of(defaults) == Decoding()
    callbacks = {"mine": GENERATION | {"decoding": {"_target_": "os.system", "temperature": 1.0}}, "other": None}
    assert decoding_of(open_run(make_run("c", config={"callbacks": callbacks}))) == Decoding(temperature=1.0)


@pytest.mark.parametrize("value", [{"max_new_tokens": "ten"}, {"top_k": 3}, {"temperature": -1}])
def test_a_decoding_that_no_run_has_is_named_by_its_file(make_run: MakeRun, value: dict[str, Any]) -> None:
    run = open_run(make_run(config={"callbacks": {"generation": GENERATION | {"decoding": value}}}))
    with pytest.raises(UserError, match=r"config\.yaml: callbacks\.generation\.decoding: "):
        decoding_of(run)


def test_without_scores_there_is_no_table(make_run: MakeRun) -> None:
    assert scores_by_step(open_run(make_run())) is None


@pytest.mark.parametrize(
    "content",
    [
        "step,metric\n1,a\n",
        "steps_taken,metric\n1,a\n",
        "steps_taken,epoch,metric,of,value,ci_low,ci_high,n,n_missing,scorer\n,0,a,policy,1,1,1,1,0,x\n",
        "steps_taken,epoch,metric,of,value,ci_low,ci_high,n,n_missing,scorer\n1,0,a,policy,many,1,1,1,0,x\n",
        '"',
    ],
)
def test_a_damaged_table_is_named(make_run: MakeRun, content: str) -> None:
    folder = make_run()
    path = folder / "report" / "tables" / "behaviour_by_step.csv"
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"behaviour_by_step\.csv: .*delete it") as caught:
        scores_by_step(open_run(folder))
    assert "\n" not in str(caught.value)


def test_the_page_shows_the_table_and_its_scorers_as_text(make_run: MakeRun) -> None:
    folder = make_run()
    looks = {10: [*planted.look(0.75, 0.1), planted.figure("<b>x</b>", "policy", 1.0, scorer="<script>")]}
    planted.write(folder, looks)
    run = open_run(folder)
    page = write_report(subject_of_run(run), [drawn(run)], Samples([])).read_text(encoding="utf-8")
    assert "Every figure as last taken" in page
    assert "The numbers by site" not in page
    assert "<li>&lt;script&gt;</li>" in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    again = scores_by_step(run)
    assert again is not None
    assert again.figures.equals(drawn(run).table), "the report rewrites the table that it read"
