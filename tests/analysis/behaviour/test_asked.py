import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from analysis.behaviour.asked import Answers, Behaviour, behaviour_section
from datamodules.oracle import PlantedOracle
from tests.analysis import asked
from tests.analysis import planted_behaviour as planted
from tests.analysis.legible import assert_legible
from tests.tiltmeter.scoring.fake_judge import FakeJudge, honest, sample
from tiltmeter.errors import UserError
from tiltmeter.judges.judge_scorer import JudgeScorer
from tiltmeter.models.generation import Decoding
from tiltmeter.scoring.degeneration import DegenerationScorer
from tiltmeter.scoring.overlap import OverlapScorer
from tiltmeter.scoring.scorer import Figure, Sample, Scores
from tiltmeter.scoring.toxicity import WordListToxicity
from tiltmeter.scoring.truthfulqa import TruthfulQA

ACCURACY = planted.figure("preference_accuracy", "both", 0.75, n=40, scorer="implicit reward")
SAMPLES = [sample("a", "tea", "rain"), sample("b", "kind", "blue")]


def answers(figures: list[Figure], **options: Any) -> Answers:
    options = {"decoding": Decoding(), "beta": 0.25} | options
    return Answers(SAMPLES, Scores(figures), **options)


def test_sentences_and_rows_have_the_figures_numbers() -> None:
    section = behaviour_section(answers([*planted.look(0.75, 0.125), ACCURACY]))
    assert section.sentences == [
        "By the planted oracle the aligned model’s win rate over its base is 75\u00a0% (70\u00a0% to 80\u00a0%)",
        "Mean word-list toxicity falls from 0.200 to 0.125 (0.115 to 0.135)",
    ]
    assert [headline.value for headline in section.headlines] == ["0.750"]
    rows = [text.get_text().replace("\n", " ") for axes in section.figure.axes for text in axes.get_yticklabels()]
    assert rows == [
        "win rate vs base, oracle",
        "win rate vs chosen, oracle",
        "preference accuracy",
        "toxicity (word list)",
        "ROUGE-L with chosen",
    ]
    assert section.shown is not None
    assert section.shown.set_index("figure").loc["preference_accuracy"].to_dict() == {
        "base": "–",
        "aligned": "0.750",
        "95 % interval": "0.700 … 0.800",
        "n": "40",
        "by": "4",
    }
    assert "steps_taken" not in section.table
    assert_legible(section)


def test_a_judge_s_agreement_is_a_row_of_the_win_rates() -> None:
    agreement = planted.figure("judge/agreement", "judge", 1.0, width=0.0, n=100)
    section = behaviour_section(answers([*planted.look(0.75, 0.125), agreement, ACCURACY]))
    assert section.sentences[0].endswith(
        "; the planted oracle agrees with 100\u00a0% (100\u00a0% to 100\u00a0%) of 100 held-out labels"
    )
    rows = [text.get_text().replace("\n", " ") for text in section.figure.axes[0].get_yticklabels()]
    assert rows[2:] == ["judge agrees with labels", "preference accuracy"]
    assert_legible(section)


def test_without_a_win_rate_the_preference_accuracy_leads() -> None:
    section = behaviour_section(answers([ACCURACY]))
    assert section.sentences == ["Preference accuracy is 75\u00a0% (70\u00a0% to 80\u00a0%)"]
    (headline,) = section.headlines
    assert headline.value == "0.750"
    assert "log-prob" in headline.name
    lost = behaviour_section(answers([planted.lost("preference_accuracy", "both")]))
    assert lost.sentences == ["Preference accuracy has no number: 54 of 64 scores are missing"]
    assert not lost.headlines


def test_what_is_no_share_is_not_drawn_as_one() -> None:
    low = [planted.figure(name, of, 0.5) for name in ("bleu", "length", "oracle_utility") for of in ("base", "policy")]
    assert len(behaviour_section(answers([ACCURACY, *low])).figure.axes) == 1


def test_a_number_that_is_missing_of_one_model_is_no_crash() -> None:
    figures = [planted.figure("toxicity", "base", 0.5), planted.lost("toxicity", "policy"), ACCURACY]
    assert "has no number: 54 of 64" in behaviour_section(answers(figures)).sentences[1]


def test_intervals_without_ends_are_left_out() -> None:
    endless = Figure("geval_win_rate", "both", 0.5, -math.inf, math.inf, 1, 0, "judge")
    section = behaviour_section(answers([endless, ACCURACY]))
    assert section.sentences[0] == "By the judge the aligned model’s win rate over its base is 50\u00a0%"
    assert section.headlines[0].source.startswith("n = 1, ties half")


def test_the_page_says_how_and_with_what_the_numbers_came_about() -> None:
    kl = planted.figure("kl", "both", 2.0)
    for decoding, words in (
        (Decoding(temperature=1.0), "an unbiased estimate"),
        (Decoding(), "no estimate of KL"),
        (Decoding(temperature=1.0, top_p=0.9), "no estimate of KL"),
    ):
        reading = behaviour_section(answers([ACCURACY, kl], decoding=decoding, silent=["bertscore"])).reading
        assert any(line.startswith("kl: ") and words in line for line in reading)
        assert ("random numbers" in reading[0]) == (decoding.temperature > 0)
        assert "the same 2 prompts" in reading[0]
    assert any("β = 0.25" in line for line in reading)
    assert any(line.startswith("No figure from bertscore") for line in reading)


def test_both_models_are_asked_scored_and_kept() -> None:
    judge = JudgeScorer(FakeJudge(honest), score_mode="integer", evaluation_steps=["Look."])
    scorers = {"overlap": OverlapScorer(), "judge": judge, "none": None, "words": WordListToxicity()}
    two = asked.checkpoints(6)
    behaviour = Behaviour(scorers=scorers, decoding=Decoding(max_new_tokens=8), n_prompts=4, beta=0.5, probe_sites="")
    behaviour.start(two)
    found = behaviour.table(two)
    names = {figure.name for figure in found.scores.figures}
    assert {"rougeL", "geval_score", "geval_win_rate", "toxicity_word_list", "preference_accuracy", "kl"} <= names
    assert [s.pair_id for s in found.samples] == [pair.pair_id for pair in two.pairs[:4]]
    assert (found.beta, list(found.silent)) == (0.5, [])
    section = behaviour_section(found)
    rows = section.more_tables["behaviour_samples"]
    assert rows["pair_id"].tolist() == [s.pair_id for s in found.samples]
    assert {"geval_win", "toxicity_word_list/policy"} <= set(rows.columns)
    assert [scorer for scorer in section.notes if "fake@here" in scorer]


def test_a_scorer_that_breaks_is_named_on_the_page() -> None:
    class Broken:
        name, is_slow = "broken", False

        def start(self) -> None: ...

        def score(self, samples: Sequence[Sample]) -> Scores:
            raise RuntimeError("no memory")

    behaviour = Behaviour(scorers={"mine": Broken()}, decoding=Decoding(max_new_tokens=4), probe_sites="")
    with pytest.warns(UserWarning, match="mine .broken. could not score"):
        found = behaviour.table(asked.checkpoints(5))
    assert found.silent == ["mine"]


def test_truthfulqa_is_asked_of_both(tmp_path: Path) -> None:
    row = {"question": "Is tea wet?", "mc1_targets": {"Yes": 1, "No": 0}, "mc2_targets": {"Yes": 1, "No": 0}}
    (tmp_path / "mc.json").write_text(json.dumps([row] * 3), encoding="utf-8")
    two = asked.checkpoints(5)
    questions = TruthfulQA(str(tmp_path / "mc.json"))
    behaviour = Behaviour(
        scorers={}, truthfulqa=questions, decoding=Decoding(max_new_tokens=4), probe_sites="", n_prompts=None
    )
    behaviour.start(two)
    of = {(f.name, f.of) for f in behaviour.table(two).scores.figures if f.name.startswith("truthfulqa_mc2")}
    assert {side for _, side in of} == {"policy", "base"}


def prompts_file(folder: Path) -> str:
    rows = [
        {"prompt": {"text": f"So {word} said", "toxicity": t}} for word, t in (("he", 0.9), ("she", 0.1), ("it", None))
    ]
    (folder / "rtp.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder / "rtp.jsonl")


def ask_prompts(path: str, n_prompts: int) -> Answers:
    scorers = {"overlap": OverlapScorer(), "degeneration": DegenerationScorer(), "toxicity": WordListToxicity()}
    decoding = Decoding(max_new_tokens=8, temperature=1.0, n_samples=3)
    behaviour = Behaviour(scorers=scorers, prompts=path, decoding=decoding, n_prompts=n_prompts, probe_sites="")
    two = asked.checkpoints(5)
    behaviour.start(two)
    return behaviour.table(two)


def test_prompts_without_preferences_have_the_worst_of_n_and_no_overlap(tmp_path: Path) -> None:
    found = ask_prompts(prompts_file(tmp_path), 3)
    figures = {f.name: f for f in found.scores.figures if f.of == "policy"}
    assert figures["exp_max_toxicity_word_list@3"].n == 9
    assert figures["exp_max_toxicity_word_list@3_toxic_prompts"].n == 3
    assert figures["toxicity_word_list_probability@3"].n == 9
    assert not {"rougeL", "bleu"} & set(figures)
    assert found.silent == ["overlap"]
    assert len(found.samples) == 9
    section = behaviour_section(found)
    assert "the same 3 prompts (temperature 1, 3 each, at most 8 tokens, up to “Human:”)" in section.reading[0]
    labels = [text.get_text().replace("\n", " ") for text in section.figure.axes[1].get_yticklabels()]
    assert "exp max toxicity word list@3" in labels
    assert not [label for label in labels if "std" in label]


def test_real_toxicity_prompts(shared_data: Path) -> None:
    (path, *_) = sorted((shared_data / "real-toxicity-prompts").rglob("*.jsonl*"))
    found = ask_prompts(str(path), 4)
    assert {"exp_max_toxicity_word_list@3"} <= {f.name for f in found.scores.figures}
    assert len(found.samples) == 12


def test_the_oracle_has_nothing_to_say_of_other_prompts(tmp_path: Path) -> None:
    behaviour = Behaviour(scorers={"judge": PlantedOracle()}, prompts=prompts_file(tmp_path))
    with pytest.raises(UserError, match=r"behaviour\.prompts: the planted oracle"):
        behaviour.start(asked.checkpoints(5))
    with pytest.raises(UserError, match=r"judge=oracle: only for data=synthetic"):
        Behaviour(scorers={"judge": PlantedOracle()}).start(asked.checkpoints(5))


def test_a_missing_prompts_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"behaviour\.prompts: no such file"):
        ask_prompts(str(tmp_path / "none.jsonl"), 3)
