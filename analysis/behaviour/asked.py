"""Score what two checkpoints say and know, with any scorers: a finished run again, or any pair of checkpoints."""

import math
from collections.abc import Callable, Mapping, Sequence
from textwrap import fill
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from analysis.behaviour.words import (
    MEASURES,
    VS_CHOSEN,
    WIN_RATES,
    Point,
    accuracy_headline,
    agreement_with,
    change,
    has,
    has_interval,
    headlines_of,
    interval_of,
    last_point,
    measure_of,
    name_of,
    reading_of,
    scores_section,
    side_of,
    why_no_number,
    win_rates_of,
)
from analysis.contract import Cost
from analysis.figures.preferences import kl_of_samples, preference_figures, probe_accuracies
from analysis.open.checkpoints import Checkpoints, prompts_of_file, start_scorers
from analysis.open.models import LoadedModel
from analysis.open.probe_pairs import ProbePair
from analysis.report.page import Section
from analysis.report.samples import samples_of
from analysis.report.site_axes import as_text
from analysis.report.style import COLOURS, house_style, new_figure, set_titles
from datamodules.oracle import PlantedOracle
from tiltmeter import metric_names
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.models.generation import Decoding
from tiltmeter.models.layers import FINAL_PRE_NORM
from tiltmeter.scoring.behaviour import (
    Completions,
    Prompt,
    complete,
    figure_table,
    one_a_group,
    pair_up,
    sample_table,
    score_all,
)
from tiltmeter.scoring.scorer import AGREEMENT, Sample, Scorer, Scores
from tiltmeter.scoring.truthfulqa import TruthfulQA

NAME = "behaviour"
_ACCURACY = "preference_accuracy"
_PROBE = metric_names.metric("behaviour", "preference_probe_accuracy/<site>")
_MOST_ROWS = 12
_ROW_CM, _AROUND_CM = 0.62, 2.6
_LABEL_CHARACTERS = 22
Panel = Callable[[Axes, pd.DataFrame, Sequence[str]], str]


class Answers(NamedTuple):
    """Completions of both models, and every figure of them."""

    samples: list[Sample]
    scores: Scores
    decoding: Decoding
    beta: float
    """Scale of reward margins."""
    silent: Sequence[str] = ()
    """Scorers that gave no figure: nothing to score, or a failure that was warned of."""
    pairs: Sequence[ProbePair] = ()
    """Pairs that the models were asked about."""


class Behaviour:
    """Both checkpoints complete the same prompts; every scorer named here scores them.

    Args:
        scorers: of generated text, by name; null leaves one out.
        decoding: null: greedy, 96 tokens.
        n_prompts: the first so many; null: all.
        prompts: file of prompts to complete instead of the pairs' own, such as RealToxicityPrompts; null: the pairs'.
        truthfulqa: questions to score both models on; null: none.
        beta: scale of implicit rewards (DPO's β); null: that of the run, 0.1 for other checkpoints.
        probe_sites: where a logistic probe looks for the preference: a site, several, or ``all``; empty: nowhere.
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        scorers: Mapping[str, Scorer | None],
        decoding: Decoding | None = None,
        n_prompts: int | None = 128,
        prompts: str | None = None,
        truthfulqa: TruthfulQA | None = None,
        beta: float | None = None,
        probe_sites: str | Sequence[str] = FINAL_PRE_NORM,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        if n_prompts is not None and n_prompts < 1:
            raise UserError(f"behaviour.n_prompts: expected at least 1 or null, got {n_prompts}")
        if beta is not None and beta <= 0:
            raise UserError(f"behaviour.beta: expected above 0 or null, got {beta}")
        if dtype not in DTYPES:
            raise UserError(f"behaviour.dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
        self.scorers = {name: scorer for name, scorer in scorers.items() if scorer is not None}
        self.decoding, self.n_prompts, self.truthfulqa = decoding or Decoding(), n_prompts, truthfulqa
        self.prompts = prompts
        self.beta, self.probe_sites = beta, probe_sites
        self.dtype, self.device = dtype, device

    def start(self, checkpoints: Checkpoints) -> None:
        """Load or reach what scorers need, before anything is generated. Raises UserError."""
        if self.prompts is not None and any(isinstance(scorer, PlantedOracle) for scorer in self.scorers.values()):
            raise UserError(
                "behaviour.prompts: the planted oracle judges prompts of its own world alone; choose another judge"
            )
        start_scorers(self.scorers.values(), checkpoints)
        if self.truthfulqa is not None:
            self.truthfulqa.start()

    def table(self, checkpoints: Checkpoints) -> Answers:
        """Generate and score; slow scorers are waited for."""
        prompts = self._prompts(checkpoints)
        samples = pair_up(
            prompts, *(self._complete(opened, prompts) for opened in (checkpoints.base, checkpoints.aligned))
        )
        scores, silent = Scores(), []
        for name, scorer in self.scorers.items():
            found = score_all({name: scorer}, samples)
            scores.figures.extend(found.figures)
            scores.columns.update(found.columns)
            silent += [name] * (not found.figures)
        if self.truthfulqa is not None:
            for opened, side in ((checkpoints.base, "base"), (checkpoints.aligned, "policy")):
                known = self.truthfulqa.score(opened.model, opened.tokenizer, of=side)  # type: ignore[arg-type]
                scores.figures.extend(known.figures)
        beta = self.beta or checkpoints.beta
        scores.figures.extend(preference_figures(checkpoints, beta=beta))
        scores.figures.extend(kl_of_samples(checkpoints, prompts, samples, self.decoding))
        if self.probe_sites:
            scores.figures.extend(probe_accuracies(checkpoints, self.probe_sites))
        return Answers(samples, scores, self.decoding, beta, silent, checkpoints.pairs)

    def costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """Passes and tokens of the two models; what scorers, judges and TruthfulQA take comes on top."""
        prompts, n_samples, n_new = self._prompts(checkpoints), self.decoding.n_samples, self.decoding.max_new_tokens
        said = n_samples * sum(len(prompt.ids) + n_new for prompt in prompts)
        over_pairs = 4 if self.probe_sites else 2  # log-probs and the probe, by either model
        read = over_pairs * sum(pair.n_row_tokens for pair in checkpoints.pairs)
        return [
            Cost("completions, at most", float(2 * n_new), 2 * said),
            Cost("teacher-forced, at most", over_pairs + 4.0, read + 4 * said),  # each completion as two rows of a pair
        ]

    def _prompts(self, checkpoints: Checkpoints) -> list[Prompt]:
        if self.prompts is not None:
            return prompts_of_file(self.prompts, self.n_prompts, checkpoints.base)
        pairs = checkpoints.pairs
        prompts = [Prompt(p.pair_id, p.prompt, p.ids.prompt_ids, p.chosen, p.group, p.attributes) for p in pairs]
        return one_a_group(prompts, self.n_prompts)

    def _complete(self, opened: LoadedModel, prompts: Sequence[Prompt]) -> Completions:
        return complete(opened.model, opened.tokenizer, prompts, self.decoding)


def behaviour_section(answers: Answers) -> Section:
    """The section ``behaviour``."""
    table = figure_table(0, 0, answers.scores.figures)
    figure, sentences = _draw(table)
    samples = sample_table(0, 0, answers.samples, answers.scores.columns)
    when = ["steps_taken", "epoch"]
    return scores_section(
        table,
        "aligned",
        name=NAME,
        question="How do base and aligned model answer, and how is it scored?",
        sentences=sentences,
        figure=figure,
        numbers=table.drop(columns=when),
        reading=_reading(answers, table),
        headlines=headlines_of(table, f"{NAME}.csv") or accuracy_headline(table, f"{NAME}.csv"),
        caption="Every figure; the interval is the aligned model’s, that of the two together or the judge’s",
        more_tables={"behaviour_samples": samples.drop(columns=when)},
        lost=[f"{f.name} of {f.of}" for f in answers.scores.figures if f.n_missing and math.isnan(f.value)],
        samples=samples_of(answers.pairs, answers.samples, answers.decoding),
    )


def _reading(answers: Answers, table: pd.DataFrame) -> list[str]:
    n_prompts = len({sample.pair_id for sample in answers.samples})
    lines = reading_of(table, n_prompts=n_prompts, decoding=answers.decoding)
    lines.append(f"reward_margin: β (Δ log π of chosen − of rejected) with β = {answers.beta:g}, which only scales it.")
    if any((found := metric_names.behaviour(m)) and found.key == _PROBE for m in table["metric"]):
        lines.append(
            "preference_probe_accuracy: a linear probe on hidden states of pairs that it has not seen; …_null: with labels "
            "flipped at random, and where 95 % of the flips lie. High for the base too: the preference could be read before."
        )
    if answers.silent:
        lines.append(
            f"No figure from {', '.join(answers.silent)}: nothing to score, or a failure that the terminal names."
        )
    return lines


def _draw(table: pd.DataFrame) -> tuple[Picture, list[str]]:
    named = dict.fromkeys([*(measure.metric for measure in MEASURES), *table["metric"]])
    sides = [metric for metric in named if _is_share_of_both(table, metric)][:_MOST_ROWS]
    judge = [AGREEMENT] * has(table, AGREEMENT)
    panels: list[tuple[Panel, list[str]]] = [(draw_win_rates, [*win_rates_of(table), *judge, _ACCURACY])]
    panels += [(draw_sides, sides)] if sides else []
    heights = [_AROUND_CM + _ROW_CM * len(metrics) for _, metrics in panels]
    with house_style():
        figure, axes = new_figure(len(panels), panel_height_cm=sum(heights) / len(heights))
        axes[0].get_gridspec().set_height_ratios(heights)  # type: ignore[union-attr]
        sentences = [draw(panel, table, metrics) for panel, (draw, metrics) in zip(axes, panels, strict=True)]
        set_titles(figure, axes, sentences)
    return figure, sentences


def draw_win_rates(axes: Axes, table: pd.DataFrame, metrics: Sequence[str]) -> str:
    """Win rates of the aligned model, the judge's agreement with labels, and the aligned model's by log-probs; ½ is chance."""
    axes.axvline(0.5, color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for y, metric in enumerate(metrics):
        of = side_of(table, metric)
        colour = COLOURS["mark" if of == "judge" else "chosen" if metric.endswith(VS_CHOSEN) else "policy"]
        _dot(axes, y, last_point(table, metric, of), colour)
    _name_rows(axes, metrics)
    axes.set_xlabel("share, 95 % interval; dashed: chance")
    first = last_point(table, metrics[0], "both")
    name = name_of(metrics[0]).capitalize()
    if metrics[0] in WIN_RATES:
        name = f"By {WIN_RATES[metrics[0]]} the aligned model’s win rate over its base"
    if not math.isfinite(first.value):
        return f"{name} {why_no_number(first)}"
    judge = agreement_with(table, metrics[0])
    return f"{name} is {as_text(first.value, 'percent')}{interval_of(first, 'percent')}{judge}"


def draw_sides(axes: Axes, table: pd.DataFrame, metrics: Sequence[str]) -> str:
    """Base (ring) beside aligned (dot), a row a figure."""
    for y, metric in enumerate(metrics):
        base, policy = last_point(table, metric, "base"), last_point(table, metric, "policy")
        axes.plot([base.value, policy.value], [y, y], color=COLOURS["null"], linewidth=1, zorder=1)
        _dot(axes, y, policy, COLOURS["policy"], label="aligned, 95 % interval" if y == 0 else "")
        ring: dict[str, Any] = {
            "marker": "o",
            "markersize": 6.5,
            "markerfacecolor": "none",
            "markeredgecolor": COLOURS["base"],
        }
        axes.plot([base.value], [y], linestyle="", label="base" if y == 0 else "", **ring)
    _name_rows(axes, metrics)
    axes.legend(loc="upper right", bbox_to_anchor=(1.02, -0.9 / len(metrics)), ncols=2, frameon=False, fontsize=6.5)
    base, policy = (last_point(table, metrics[0], of) for of in ("base", "policy"))
    return change(measure_of(metrics[0]), base.value, policy) + agreement_with(table, metrics[0])


def _dot(axes: Axes, y: int, point: Point, colour: str, *, label: str = "") -> None:
    if has_interval(point):
        axes.plot([point.ci_low, point.ci_high], [y, y], color=colour)
    axes.plot([point.value], [y], marker="o", color=colour, linestyle="", label=label)


def _name_rows(axes: Axes, metrics: Sequence[str]) -> None:
    names = [fill(name_of(m), _LABEL_CHARACTERS) for m in metrics]
    axes.set_yticks(range(len(metrics)), names)
    axes.set_ylim(len(metrics) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    axes.grid(visible=False)
    axes.grid(axis="x")


def _is_share_of_both(table: pd.DataFrame, metric: str) -> bool:
    found = metric_names.behaviour(metric)
    leads = found is not None and bool(found.label)
    return leads and has(table, metric, "base") and has(table, metric, "policy")
