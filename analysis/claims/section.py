"""Verdicts as the first section of a study's report: a forest plot of each claim, a table, and claims.json."""

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from analysis.claims.verdict import INCONCLUSIVE, LEVEL, SUPPORTED, Check, Verdict
from analysis.open.studies import ARM_NAMES
from analysis.report.page import Headline, Section
from analysis.report.site_axes import draw_panels
from analysis.report.style import COLOURS
from tiltmeter.files import write_json

NAME = "claims"
_NAMES: Mapping[str, str] = {
    **ARM_NAMES,
    "base_states": "base’s own states",
    "permuted": "v of another pair",
    "content": "content token",
    "unrelated": "unrelated text",
    "outliers_removed": "outliers removed",
    "token_types": "by token type",
    "unit_rows": "unit rows",
    "sigma_ratio": "σ₂/σ₁",
    "affine_gain": "affine gain in R²",
    "other_corpus": "other corpus",
    "random": "random vectors",
    "random_covariance": "random, base’s spread",
    "unrelated_contrast": "unrelated contrast",
    "random_at_equal_kl": "random at equal KL",
    "behaviour_on_other_corpus": "… on another corpus",
}
"""Controls and conditions → what figures call them."""
_WIDTH = 24


def claims_section(
    verdicts: Sequence[Verdict],
    plan: pd.DataFrame | None = None,
    *,
    left_out: Sequence[str] = (),
    unfair: Sequence[str] = (),
) -> Section:
    """The section ``claims``.

    Args:
        verdicts: one a claim, in the order of the claims; those whose T is known are drawn.
        plan: seeds and prompts that each comparison needs (:func:`analysis.claims.plan.plan_table`).
        left_out: a line on each run that was not judged with the others.
        unfair: a line on each arm that is not as far from the base as dpo.
    """
    drawn = [verdict for verdict in verdicts if _is_known(verdict)] or list(verdicts[:1])
    table, checks = verdict_table(verdicts), check_table(verdicts)
    panels = [partial(_draw, verdict=verdict) for verdict in drawn]
    height = max(3.2, 1.4 + 0.42 * max(len(verdict.checks) for verdict in drawn))
    figure, _ = draw_panels(panels, table, panel_height_cm=height)
    counts: Counter[str] = Counter(verdict.kind for verdict in verdicts)
    shown = pd.DataFrame(
        {
            "claim": [f"{v.claim.key}: {v.claim.says}" for v in verdicts],
            "T (95 %)": [_number(v) for v in verdicts],
            "threshold": [str(v.claim.bound) for v in verdicts],
            "runs": [v.n_runs for v in verdicts],
            "verdict": [v.kind for v in verdicts],
        }
    )
    return Section(
        name=NAME,
        question="Which claims hold against their controls?",
        claim="D-STEER (arXiv 2512.11838) and others, each with a threshold and controls that were fixed beforehand.",
        sentences=[_headline(counts), *(f"{v.claim.key} {v.kind}: {v.sentence.rstrip('.')}" for v in verdicts)],
        interval="T: the wider of Student’s interval over seeds and the jackknife’s over prompts, 95 %. Differences from controls: "
        f"likewise; p-values are adjusted over the controls of a claim (Holm), at a level of {LEVEL:.0%}.",
        limits=[
            *unfair,
            "A claim of its author’s model: these are the models and the data of this study.",
            "K4 and K5 are one fact seen twice (ρ₁ ≥ f), not two pieces of evidence.",
            "How often such verdicts are wrong where the truth is planted: benchmarks/verdicts.py, docs/claims.md.",
        ],
        figure=figure,
        table=table,
        reading=[
            "Filled dots: T less that of a control it must beat; it does where the interval, adjusted, is to the right of 0.",
            "Open dots: T under a condition that the claim must survive, less its threshold; to the right of 0 where it does.",
            "Names in grey have no number yet.",
            "How many seeds and prompts each comparison would need to be decided: claims_plan.csv.",
            *left_out,
        ],
        headlines=[Headline(str(counts[SUPPORTED]), f"of {len(verdicts)} claims supported", "claims")],
        shown=shown,
        caption="The claims, T over seeds and prompts, and the verdicts",
        more_tables={"claims_checks": checks} | ({} if plan is None else {"claims_plan": plan}),
    )


def verdict_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """A row a claim: T with its interval, threshold, verdict and the sentence that decides."""
    return pd.DataFrame(
        [
            {"claim": v.claim.key, "says": v.claim.says, **v.value.named("t"), "threshold": str(v.claim.bound)}
            | {"n_runs": v.n_runs, "verdict": v.kind, "sentence": v.sentence}
            for v in verdicts
        ]
    )


def check_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """A row for each thing that a claim must beat or survive."""
    rows = [
        {"claim": v.claim.key, "kind": c.kind, "name": c.name, "value": c.value, "difference": c.interval.value}
        | {"difference_low": c.interval.low, "difference_high": c.interval.high, "p_adjusted": c.p, "n_runs": c.n_runs}
        | {"passed": {None: "missing", True: "yes", False: "no"}[c.passed], "missing": c.missing}
        for v in verdicts
        for c in v.checks
    ]
    columns = (
        "claim",
        "kind",
        "name",
        "value",
        "difference",
        "difference_low",
        "difference_high",
        "p_adjusted",
        "n_runs",
    )
    return pd.DataFrame(rows, columns=[*columns, "passed", "missing"])


def write_claims(folder: Path, verdicts: Sequence[Verdict]) -> None:
    """Write ``claims.json`` into a report's folder: every verdict with all that it was told of. Raises FailedWrite."""
    write_json(folder / "claims.json", {"claims": [_as_json(verdict) for verdict in verdicts]})


def _as_json(verdict: Verdict) -> dict[str, Any]:
    checks = check_table([verdict]).drop(columns="claim").to_dict("records")
    row = verdict_table([verdict]).to_dict("records")[0]
    return {key: _plain(value) for key, value in row.items()} | {
        "checks": [{str(key): _plain(value) for key, value in check.items()} for check in checks]
    }


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_known(verdict: Verdict) -> bool:
    return math.isfinite(verdict.value.value)


def _number(verdict: Verdict) -> str:
    if not _is_known(verdict):
        return "not known"
    return f"{verdict.value.value:.3g} ({verdict.value.low:.3g} … {verdict.value.high:.3g})"


def _headline(counts: Counter[str]) -> str:
    said = [
        f"{n} {kind}"
        for kind, n in sorted(counts.items(), key=lambda item: (item[0] != SUPPORTED, item[0] == INCONCLUSIVE))
    ]
    return f"Of {counts.total()} claims: {', '.join(said)}"


def _draw(axes: Axes, table: pd.DataFrame, verdict: Verdict) -> str:
    """Forest plot of one claim: differences from controls, and from the threshold under conditions."""
    sign = 1.0 if verdict.claim.bound.is_lower else -1.0
    own = Check("T", "survives", verdict.value.value, verdict.value, n_runs=verdict.n_runs, passed=True)
    checks = [own, *verdict.checks]
    axes.axvline(0.0, color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    bounds = {survival.name: survival.bound for survival in verdict.claim.survives}
    for y, check in enumerate(checks):
        if check.passed is None:
            continue
        bound = bounds.get(check.name, verdict.claim.bound)
        towards = 1.0 if bound.is_lower else -1.0
        shift = bound.value if check.kind == "survives" else 0.0
        ends = [towards * (end - shift) for end in check.interval] if check.kind == "survives" else list(check.interval)
        colour = COLOURS["policy_dark"] if check is own else COLOURS["policy"] if check.passed else COLOURS["rejected"]
        axes.plot(ends[1:], [y, y], color=colour, linewidth=1.2)
        face = "white" if check.kind == "survives" and check is not own else colour
        axes.plot(ends[0], y, "o", color=colour, markerfacecolor=face)
    axes.set_ylim(len(checks) - 0.4, -0.6)
    names = ["T less threshold", *(_NAMES.get(check.name, check.name) for check in checks[1:])]
    axes.set_yticks(range(len(checks)), [textwrap.shorten(name, _WIDTH, placeholder="…") for name in names])
    for label, check in zip(axes.get_yticklabels(), checks, strict=True):
        label.set_color(COLOURS["null"] if check.passed is None else "black")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"{'difference' if sign > 0 else 'sign turned'}; right of 0: for the claim")
    return f"{verdict.claim.key} {verdict.kind}: {verdict.claim.says}"
