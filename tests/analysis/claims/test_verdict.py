"""Verdicts: each kind for its reason, in worlds whose truth is planted, and claims files that are wrong."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from analysis.claims.claim import Bound, Claim, OfTable, Unchanged, read_claims
from analysis.claims.evidence import Arms, Figure, HeldOut, evidence_of, judge_all
from analysis.claims.section import check_table, claims_section, write_claims
from analysis.claims.statistics import Statistic, lower_sites, upper_sites
from analysis.claims.verdict import INCONCLUSIVE, REFUTED, SAME, SUPPORTED, Evidence, judge
from benchmarks.verdicts import CLAIMS, JUDGED, study_of
from launch.configuration import CONF
from tiltmeter.errors import UserError
from tiltmeter.stats.arms import Arm

CLAIM = Claim("K", "it is so", None, Bound("at_least", 0.9), {"sft_chosen": None, "base_states": None}, ())


def arm(*values: float, is_population: bool = False) -> Arm:
    return Arm(torch.tensor([values], dtype=torch.float64), is_population)


HIGH, LOW = arm(0.95, 0.951, 0.949), arm(0.3, 0.31, 0.29)


@pytest.mark.parametrize(
    ("evidence", "kind", "words"),
    [
        (
            Evidence(HIGH, {"sft_chosen": LOW, "base_states": LOW}),
            SUPPORTED,
            "passes ≥ 0.9, beats sft_chosen, base_states",
        ),
        (Evidence(HIGH, {"sft_chosen": HIGH, "base_states": LOW}), SAME, "sft_chosen has 0.95, a difference of"),
        (Evidence(LOW, {"sft_chosen": LOW}), REFUTED, "against a threshold of ≥ 0.9"),
        (Evidence(arm(0.8, 0.9, 1.0), {"sft_chosen": LOW}), INCONCLUSIVE, "straddles"),
        (Evidence(HIGH, {"sft_chosen": "train it", "base_states": LOW}), INCONCLUSIVE, "sft_chosen (train it)"),
        (Evidence(arm(0.95), {"sft_chosen": LOW}), INCONCLUSIVE, "1 of 3 seeds of dpo"),
        (Evidence("no run of it"), INCONCLUSIVE, "T is not known: no run of it"),
        (Evidence(HIGH, {"sft_chosen": LOW}, {}, 2.0), INCONCLUSIVE, "2 times the noise floor"),
    ],
)
def test_each_verdict_has_its_reason(evidence: Evidence, kind: str, words: str) -> None:
    found = judge(replace(CLAIM, beats=dict.fromkeys(evidence.beats)), evidence)
    assert found.kind == kind
    assert words in found.sentence


def test_bound_from_above_turns_the_sign_of_every_difference() -> None:
    claim = replace(CLAIM, bound=Bound("below", 0.0), beats={"sft_chosen": None})
    falls, rises = arm(-0.5, -0.51, -0.49), arm(0.1, 0.11, 0.09)
    assert judge(claim, Evidence(falls, {"sft_chosen": rises})).kind == SUPPORTED
    assert judge(claim, Evidence(falls, {"sft_chosen": arm(-0.9, -0.91, -0.89)})).kind == SAME


def test_too_few_draws_are_said() -> None:
    claim = replace(CLAIM, beats={"random_update": None})
    found = judge(claim, Evidence(HIGH, {"random_update": arm(0.1, 0.2, is_population=True)}))
    assert "2 draws, expected 5" in found.sentence


@pytest.mark.parametrize(
    ("world", "expected"),
    [
        ("pure shift", {"K3": SUPPORTED, "K4": SUPPORTED, "K5": SAME}),
        ("α(x) v", {"K5": SUPPORTED}),
        ("isotropic noise", {"K3": REFUTED, "K4": REFUTED, "K5": REFUTED}),
        ("four outlier dimensions", {"K4": SAME, "K5": SAME}),
        ("shift of each token type", {"K4": SAME, "K5": SAME}),
        ("dpo = sft + seed", {"K3": SAME, "K4": SAME, "K5": SAME}),
        ("dpo = random weights", {"K4": SAME, "K5": SAME}),
        ("collapse of entropy", {"K6": SUPPORTED, "K4": REFUTED}),
    ],
)
def test_planted_worlds_are_told_apart(world: str, expected: dict[str, str]) -> None:
    claims = [claim for claim in read_claims(CLAIMS) if claim.key in JUDGED]
    found = {verdict.claim.key: verdict for verdict in judge_all(claims, study_of(world, 0))}
    assert {key: found[key].kind for key in expected} == expected, {k: v.sentence for k, v in found.items()}
    if world == "four outlier dimensions":
        assert "outliers_removed" in found["K4"].sentence
    if world == "shift of each token type":
        named = {check.name: check.passed for check in found["K4"].checks}
        assert (named["content"], named["token_types"], named["random_update"]) == (False, False, True)


def test_missing_arms_are_named_and_never_supported() -> None:
    whole = study_of("pure shift", 0)
    alone = Arms({"dpo": whole.reads["dpo"][:1]}, missing={"sft_chosen": "train arm=sft_chosen"})
    found = judge_all(read_claims(CLAIMS), alone)
    assert {verdict.kind for verdict in found} == {INCONCLUSIVE}
    assert "train arm=sft_chosen" in next(v for v in found if v.claim.key == "K4").sentence


def test_section_table_and_file_hold_every_verdict(tmp_path: Path) -> None:
    found = judge_all(read_claims(CLAIMS), study_of("pure shift", 0))
    section = claims_section(found)
    assert len(section.table) == len(found)
    assert set(check_table(found)["passed"]) == {"yes", "no"}
    write_claims(tmp_path, found)
    assert '"verdict": "supported"' in (tmp_path / "claims.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(("share", "kind"), [(0.95, SUPPORTED), (0.4, REFUTED)])
def test_constant_vector_is_enough_where_it_gains_what_dpo_does(share: float, kind: str) -> None:
    """Held-out losses from log 2 down to 0.2; prompts and runs vary."""
    rng, start = torch.Generator().manual_seed(0), math.log(2)
    prompts = 0.1 * torch.randn(120, 1, generator=rng, dtype=torch.float64)

    def losses(arm: str) -> HeldOut | str:
        gain = {"dpo": 1.0, "constant_vector": share, "constant_vector_shuffled": 0.1}.get(arm)
        if gain is None:
            return "no run"
        noise = 0.02 * torch.randn(120, 3, generator=torch.Generator().manual_seed(len(arm)), dtype=torch.float64)
        return HeldOut(start - gain * (start - 0.2 + prompts) + noise, [f"p{i // 2}" for i in range(120)], start)

    (claim,) = (claim for claim in read_claims(CLAIMS) if claim.key == "K10")
    arms = Arms({}, losses=losses)
    found = judge(claim, evidence_of(claim, arms))
    assert found.kind == kind, found.sentence
    assert found.value.value == pytest.approx(share, abs=0.02)
    assert found.value.high - found.value.low < 0.1
    own, dpo = losses("constant_vector"), losses("dpo")
    assert isinstance(own, HeldOut)
    assert isinstance(dpo, HeldOut)
    by_hand = (start - own.losses.mean(0)) / (start - dpo.losses.mean())
    arm = arms.of_losses("constant_vector")
    assert isinstance(arm, Arm)
    torch.testing.assert_close(arm.values[0], by_hand)
    assert arms.of_losses("lm_continued") == "no run"


def test_sites_of_claims_are_thirds_of_the_blocks() -> None:
    sites = [f"layer_{i:02d}" for i in range(7)] + ["final_pre_norm", "final_post_norm"]
    assert upper_sites(sites) == ["layer_04", "layer_05", "layer_06", "final_pre_norm"]
    assert lower_sites(sites) == ["layer_00", "layer_01", "layer_02"]


def test_shipped_claims_are_those_of_the_reference() -> None:
    claims = {claim.key: claim for claim in read_claims(CONF / "claims" / "dsteer.yaml")}
    assert list(claims) == [f"K{i}" for i in range(1, 12)]
    thresholds = {key: str(claim.bound) for key, claim in claims.items()}
    assert thresholds | {} == {
        "K1": "> 0", "K2": "≥ 0.5", "K3": "≥ 0.8", "K4": "≥ 0.9", "K5": "≥ 0.9", "K6": "< 0", "K7": "≥ 0.8", "K8": "≥ 0.8",
        "K9": "> 0", "K10": "≥ 0.8", "K11": "≤ 1",
    }  # fmt: skip
    assert isinstance(claims["K7"].statistic, OfTable)
    assert claims["K4"].beats["base_states"] == Statistic("mean_cosine", condition="base_states")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("K: {says: x, statistic: mean_cosin, at_least: 1}", "no mean_cosin; did you mean mean_cosine?"),
        (
            "K: {says: x, statistic: mean_cosine, at_least: 1, beats: [sft_chose]}",
            "beats: there is no sft_chose; did you mean sft_chosen?",
        ),
        (
            "K: {says: x, statistic: mean_cosine, at_least: 1, survives: [contnt]}",
            "survives: there is no contnt; did you mean content?",
        ),
        (
            "K: {says: x, statistic: mean_cosine}",
            "expected one threshold, a number under at_least, above, at_most, below",
        ),
        ("K: {says: x, at_lest: 1}", "there is no at_lest; did you mean at_least?"),
        ("K: {statistic: mean_cosine, at_least: 1}", "says is missing"),
        ("- a list", "expected claims by their keys"),
        (
            "K: {says: x, statistic: {table: t, column: c}, sites: upper, at_least: 1}",
            "sites: has no effect on a table",
        ),
        (
            "K: {says: x, statistic: {table: t, column: c}, at_least: 1, beats: [base_states]}",
            "base_states: has no effect on a number that is read",
        ),
        ("K: {says: x, statistic: preference_cosine, above: 0, survives: [content]}", "there is no content"),
        ("K: {says: x, statistic: preference_cosine, position: content, above: 0}", "position: has no effect on"),
        ("K: {says: x, statistic: mean_cosine, at_least: 1, beats: [permuted]}", "there is no permuted"),
        ("K: {says: x, statistic: mean_cosine, position: response_last, at_least: 1}", "there is no response_last"),
        (
            "K: {says: x, statistic: {unchanged: []}, at_most: 1}",
            "unchanged: expected a list of figures, each with table",
        ),
        (
            "K: {says: x, statistic: {unchanged: [{table: t, column: c}]}, at_most: 1}",
            "unchanged[0]: expected a margin above 0 and equals, numbers, got None and 0.0",
        ),
        (
            "K: {says: x, statistic: {unchanged: [{table: t, column: c, margn: 1}]}, at_most: 1}",
            "unchanged[0]: there is no margn; did you mean margin?",
        ),
        (
            "K: {says: x, statistic: {table: t, column: c, margin: 1}, at_most: 1}",
            "statistic: there is no margin",
        ),
        ("K: [", "not a plain YAML file"),
    ],
)
def test_wrong_claims_files_are_one_line_with_the_nearest_match(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"own\.yaml") as raised:
        read_claims(path)
    assert words in str(raised.value)


def test_a_claim_of_ones_own_over_a_table_needs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    own = "mine: {says: R is high, statistic: {table: t, column: r, where: {site: a}}, at_least: 0.5, beats: [dpo_shuffled]}"
    path.write_text(own, encoding="utf-8")
    values = {"dpo": [0.9, 0.91, 0.89], "dpo_shuffled": [0.1]}
    for error, kind in ((math.nan, SUPPORTED), (0.1, SUPPORTED), (0.5, INCONCLUSIVE)):
        arms = Arms({}, lambda name, asked, error=error: [Figure(value, error) for value in values[name]])
        (found,) = judge_all(read_claims(path), arms)
        assert found.kind == kind, "prompts count where a table says how much they vary"


def test_belief_is_unchanged_where_every_figure_is_within_its_margin(tmp_path: Path) -> None:
    """T is the largest of the figures' distances in margins; a single one beyond its margin refutes."""
    path = tmp_path / "own.yaml"
    figures = "[{table: a, column: x, equals: 1, margin: 0.1}, {table: b, column: y, margin: 2}]"
    path.write_text(
        f"B: {{says: it stays, statistic: {{unchanged: {figures}}}, at_most: 1, beats: [sft_chosen]}}", encoding="utf-8"
    )
    (claim,) = read_claims(path)
    assert isinstance(claim.statistic, Unchanged)
    assert [figure.within for figure in claim.statistic.figures] == [(1.0, 0.1), (0.0, 2.0)]
    reached = {("dpo", "a"): [0.5, 0.51, 0.49], ("sft_chosen", "a"): [0.6], ("sft_chosen", "b"): [3.0]}
    for of_b, kind, value in (([0.3, 0.2, 0.7], SUPPORTED, 0.57), ([1.9, 2.0, 1.95], REFUTED, 1.95)):
        by_arm = reached | {("dpo", "b"): of_b}
        arms = Arms({}, lambda name, asked, by_arm=by_arm: [Figure(x) for x in by_arm[name, asked.table]])
        (found,) = judge_all([claim], arms)
        assert (found.kind, found.value.value) == (kind, pytest.approx(value, abs=0.01))
    missing = Arms({}, lambda name, asked: [Figure(0.1)] * 3 if asked.table == "a" else "not in the report")
    assert judge_all([claim], missing)[0].sentence == "T is not known: not in the report."
