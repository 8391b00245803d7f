import io
from pathlib import Path

import pytest
from rich.console import Console

from launch.results import behaviour_of
from launch.screen import behaviour_table
from tests.analysis import planted_behaviour as planted


def printed(folder: Path, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(behaviour_table(behaviour_of(folder)))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_closing_table_has_a_line_for_every_leading_figure(tmp_path: Path, width: int) -> None:
    probe = planted.figure("preference_probe_accuracy/final_pre_norm", "policy", 0.987)
    planted.write(tmp_path, {**planted.LOOKS, 10: [*planted.LOOKS[10], probe]})
    lines = printed(tmp_path, width).splitlines()
    assert "Behaviour: policy beside its base, after 10 steps" in lines[0]
    table = {line[:28].strip(): line[28:].split() for line in lines}
    assert table["win rate vs base, oracle"] == ["0.500", "0.750", "0.700", "…", "0.800", "64", "1"]
    assert table["win rate vs chosen, oracle"] == ["0.300", "0.625", "0.575", "…", "0.675", "64", "1"]
    assert table["toxicity (word list)"] == ["0.200", "0.125", "0.115", "…", "0.135", "64", "2"]
    assert [line.strip() for line in lines if "sha256" in line] == ["2 word list sha256=1"]
    assert "0.987" not in "".join(lines)
    assert max(map(len, lines)) <= width


def test_a_long_scorer_and_missing_scores_fit_80_characters(tmp_path: Path) -> None:
    scorer = f"helpfulness by {'model' * 20}, logprob in both orders"
    looks = {0: planted.LOOKS[0], 10: [planted.lost("geval_win_rate_vs_chosen", "both", scorer=scorer)]}
    looks[10] += [planted.figure("truthfulqa_mc2_zero_shot", "policy", 0.5, n=817, n_missing=20, scorer=scorer)]
    said = printed(tmp_path) if planted.write(tmp_path, looks) else ""
    table = {line[:28].strip(): line[28:].split() for line in said.splitlines()}
    assert table["TruthfulQA MC2, 0-shot"] == ["10", "–", "0.500", "0.450", "…", "0.550", "817", "of", "837", "2"]
    assert table["win rate vs chosen, oracle"][0] == "0"
    assert table["win rate vs chosen, judge"] == ["10", "–", "–", "–", "10", "of", "64", "2"]
    assert [line[:19] for line in said.splitlines() if "modelmodel" in line] == [" 2 helpfulness by m"]
    assert max(map(len, said.splitlines())) <= 80


def test_a_win_rate_over_the_base_begins_at_chance_even_if_nobody_looked(tmp_path: Path) -> None:
    planted.write(tmp_path, {10: planted.LOOKS[10]})
    table = {line[:28].strip(): line[28:].split() for line in printed(tmp_path).splitlines()}
    assert table["win rate vs base, oracle"][:2] == ["0.500", "0.750"]
    assert table["win rate vs chosen, oracle"][:2] == ["–", "0.625"]


def test_a_judge_s_agreement_stands_below_its_win_rates(tmp_path: Path) -> None:
    planted.write(tmp_path, {10: [*planted.LOOKS[10], planted.figure("judge/agreement", "judge", 0.875, n=100)]})
    lines = printed(tmp_path).splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip().startswith("judge agrees with labels"))
    assert lines[at].split()[4:] == ["–", "0.875", "0.825", "…", "0.925", "100", "2"]
    assert lines[at - 1].strip().startswith("win rate vs chosen")


def test_a_run_without_scores_has_none(tmp_path: Path) -> None:
    assert behaviour_of(tmp_path) == []
    planted.write(tmp_path, {10: [planted.figure("preference_accuracy", "both", 0.9)]})
    assert behaviour_of(tmp_path) == []
