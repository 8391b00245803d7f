"""Score what two checkpoints say and know, with any scorers: a finished run again, or any pair of checkpoints."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from analysis.behaviour_by_step import WIN_RATES, headlines_of, last_point, name_of, reading_of, shown_behaviour
from analysis.checkpoints import Checkpoints, prompts_of_file
from analysis.figures import COLOURS, house_style, new_figure, set_titles
from analysis.models import LoadedModel
from analysis.preferences import kl_of_samples, preference_figures, probe_accuracies
from analysis.report import Section
from analysis.site_axes import as_text
from datamodules.oracle import PlantedOracle
from tiltmeter.errors import UserError
from tiltmeter.generation import Decoding, as_words
from tiltmeter.layers import FINAL_PRE_NORM
from tiltmeter.scoring.behaviour import Completions, Prompt, complete, one_a_group, pair_up, score_all
from tiltmeter.scoring.behaviour_table import figure_table, sample_table
from tiltmeter.scoring.scorer import Sample, Scorer, Scores
from tiltmeter.scoring.truthfulqa import TruthfulQA

NAME = "behaviour"
_MOST_ROWS = 12


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
        self.scorers = {name: scorer for name, scorer in scorers.items() if scorer is not None}
        self.decoding, self.n_prompts, self.truthfulqa = decoding or Decoding(), n_prompts, truthfulqa
        self.prompts = prompts
        if beta is not None and beta <= 0:
            raise UserError(f"behaviour.beta: expected above 0 or null, got {beta}")
        self.beta, self.probe_sites = beta, probe_sites
        self.dtype, self.device = dtype, device

    def start(self, checkpoints: Checkpoints) -> None:
        """Load or reach what scorers need, before anything is generated. Raises UserError."""
        for scorer in self.scorers.values():
            if isinstance(scorer, PlantedOracle) and checkpoints.world is not None:
                scorer.use_world(checkpoints.world)
            scorer.start()
        if self.truthfulqa is not None:
            self.truthfulqa.start()

    def score(self, checkpoints: Checkpoints) -> tuple[list[Sample], Scores]:
        """Generate and score; slow scorers are waited for."""
        prompts = self._prompts(checkpoints)
        samples = pair_up(
            prompts, *(self._complete(opened, prompts) for opened in (checkpoints.base, checkpoints.aligned))
        )
        scores = score_all(self.scorers, samples)
        if self.truthfulqa is not None:
            for opened, side in ((checkpoints.base, "base"), (checkpoints.aligned, "policy")):
                known = self.truthfulqa.score(opened.model, opened.tokenizer, of=side)  # type: ignore[arg-type]
                scores.figures.extend(known.figures)
        scores.figures.extend(preference_figures(checkpoints, beta=self.beta or checkpoints.beta))
        scores.figures.extend(kl_of_samples(checkpoints, prompts, samples))
        if self.probe_sites:
            scores.figures.extend(probe_accuracies(checkpoints, self.probe_sites))
        return samples, scores

    def _prompts(self, checkpoints: Checkpoints) -> list[Prompt]:
        if self.prompts is not None:
            return prompts_of_file(self.prompts, self.n_prompts, checkpoints.base)
        pairs = checkpoints.pairs
        prompts = [Prompt(p.pair_id, p.prompt, p.ids.prompt_ids, p.chosen, p.group, p.attributes) for p in pairs]
        return one_a_group(prompts, self.n_prompts)

    def _complete(self, opened: LoadedModel, prompts: Sequence[Prompt]) -> Completions:
        return complete(opened.model, opened.tokenizer, prompts, self.decoding)


def behaviour_section(samples: Sequence[Sample], scores: Scores, decoding: Decoding) -> Section:
    """The section ``behaviour``: win rates, base beside policy, and the table of every figure.

    Raises:
        UserError: no scorer gave a figure.
    """
    table = figure_table(0, 0, scores.figures)
    if table.empty:
        raise UserError("analysis=behaviour: no scorer gave a figure; name one, for example toxicity=word_list")
    figure, sentences = _draw(table)
    return Section(
        name=NAME,
        question="What do base and aligned say, and how is it scored?",
        sentences=sentences,
        figure=figure,
        table=table.drop(columns=["steps_taken", "epoch"]),
        reading=reading_of(table, as_words(decoding)),
        headlines=headlines_of(table),
        shown=shown_behaviour(table),
        more_tables={
            "behaviour_samples": sample_table(0, 0, samples, scores.columns).drop(columns=["steps_taken", "epoch"])
        },
    )


def _draw(table: pd.DataFrame) -> tuple[Picture, list[str]]:
    shares = [m for m in dict.fromkeys(table["metric"]) if m.removesuffix("_vs_chosen") in WIN_RATES]
    sides = [m for m in dict.fromkeys(table["metric"]) if _is_share_of_both(table, m)][:_MOST_ROWS]
    panels = [(draw_win_rates, shares)] * bool(shares) + [(draw_sides, sides)] * bool(sides)
    with house_style():
        figure, axes = new_figure(len(panels) or 1, panel_height_cm=max(4.0, 1.6 + 0.55 * max(len(shares), len(sides))))
        sentences = [draw(panel, table, metrics) for panel, (draw, metrics) in zip(axes, panels, strict=False)]
        set_titles(figure, axes[: len(sentences)], sentences)
    return figure, sentences or ["The table has what was scored"]


def draw_win_rates(axes: Axes, table: pd.DataFrame, metrics: Sequence[str]) -> str:
    """Shares of prompts at which the aligned model's answer is preferred; ½ is chance."""
    axes.axvline(0.5, color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for y, metric in enumerate(metrics):
        point = last_point(table, metric, "both")
        axes.plot([point.ci_low, point.ci_high], [y, y], color=COLOURS["policy"])
        axes.plot([point.value], [y], marker="o", color=COLOURS["policy"])
    _name_rows(axes, metrics)
    axes.set_xlabel("share of prompts preferred (95 % interval)")
    first = last_point(table, metrics[0], "both")
    if not math.isfinite(first.value):
        return f"{name_of(metrics[0])} has no number: too much is missing"
    who = WIN_RATES[metrics[0].removesuffix("_vs_chosen")]
    return (
        f"{who[0].upper()}{who[1:]} prefers the aligned model’s answer at {as_text(first.value, 'percent')} of prompts"
    )


def draw_sides(axes: Axes, table: pd.DataFrame, metrics: Sequence[str]) -> str:
    """Base beside aligned, a row a figure."""
    changes = {}
    for y, metric in enumerate(metrics):
        base, policy = last_point(table, metric, "base"), last_point(table, metric, "policy")
        axes.plot([base.value, policy.value], [y, y], color=COLOURS["null"], linewidth=1, zorder=1)
        axes.plot([policy.ci_low, policy.ci_high], [y, y], color=COLOURS["policy"], linewidth=2.2, alpha=0.4)
        axes.plot([base.value], [y], marker="o", color=COLOURS["base"], linestyle="", label="base" if y == 0 else "")
        axes.plot(
            [policy.value], [y], marker="o", color=COLOURS["policy"], linestyle="", label="aligned" if y == 0 else ""
        )
        changes[metric] = abs(policy.value - base.value)
    _name_rows(axes, metrics)
    axes.set_xlabel("value (band: 95 % interval of the aligned model)")
    axes.legend(loc="lower right", frameon=False, fontsize=6.5)
    known = {metric: change for metric, change in changes.items() if math.isfinite(change)}
    if not known:
        return "Nothing could be scored of both models"
    most = max(known, key=known.__getitem__)
    base, policy = last_point(table, most, "base"), last_point(table, most, "policy")
    return f"{name_of(most)} changes most: from {as_text(base.value, '.3f')} to {as_text(policy.value, '.3f')}"


def _name_rows(axes: Axes, metrics: Sequence[str]) -> None:
    axes.set_yticks(range(len(metrics)), [name_of(metric) for metric in metrics])
    axes.set_ylim(len(metrics) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.grid(visible=False)
    axes.grid(axis="x")


def _is_share_of_both(table: pd.DataFrame, metric: str) -> bool:
    rows = table[(table["metric"] == metric) & table["of"].isin(["policy", "base"])]
    return len(rows) == 2 and bool(rows["value"].between(0, 1).all())
