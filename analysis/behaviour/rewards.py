"""Implicit rewards of pairs by two checkpoints, β log(π/π₀): margins, and the tokens of a response that they come from."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import MaxNLocator

from analysis.contract import Cost
from analysis.figures.preferences import preference_figures
from analysis.open.checkpoints import Checkpoints
from analysis.open.pair_log_probs import SideLogProbs
from analysis.report.coloured import Coloured, ColouredPair, coloured_text, legend, token_texts
from analysis.report.page import Headline, Section
from analysis.report.site_axes import as_text
from analysis.report.style import COLOURS, EndLabel, house_style, label_ends, mark_level, new_figure, set_titles
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.scoring.behaviour import as_cell
from tiltmeter.scoring.depth import FIRST_TOKENS, ratio_of_sums
from tiltmeter.scoring.scorer import Figure
from tiltmeter.stats.jackknife import Interval

NAME = "rewards"
SIDES = ("chosen", "rejected")
_BINS = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257, 513, 1025, 2049)
"""First token of each stretch of a response."""
_N_BARS = 30
_LEAST_REACH = 0.05
"""Share of pairs that have to reach a stretch for it to be drawn; the table has all."""
_NOWHERE = Interval(math.nan, math.nan, math.nan)


class Rewards:
    """Every pair teacher-forced through both models, token by token.

    Args:
        beta: scale of rewards (DPO's β); null: that of the run, 0.1 for other checkpoints.
        n_shown: pairs whose responses the report shows coloured by token: the first ones, and those of the largest and the
            smallest margin.
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self, *, beta: float | None = None, n_shown: int = 4, dtype: str = "float32", device: str | None = None
    ) -> None:
        if beta is not None and not 0 < beta < math.inf:
            raise UserError(f"rewards.beta: expected above 0 or null, got {beta}")
        if n_shown < 0:
            raise UserError(f"rewards.n_shown: expected a number of pairs from 0, got {n_shown}")
        if dtype not in DTYPES:
            raise UserError(f"rewards.dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
        self.beta, self.n_shown, self.dtype, self.device = beta, n_shown, dtype, device

    def costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """One pass of either model over both responses; none of its own beside ``behaviour``, which reads the same."""
        return [Cost("teacher-forced", 2.0, 2 * sum(pair.n_row_tokens for pair in checkpoints.pairs))]

    def table(self, checkpoints: Checkpoints) -> "RewardTables":
        """Read the pairs, unless another analysis did."""
        beta = self.beta or checkpoints.beta
        base, aligned = checkpoints.token_log_probs
        ratios = [
            SideLogProbs(*(a - b for a, b in zip(*both, strict=True))) for both in zip(aligned, base, strict=True)
        ]
        pairs = pair_table(checkpoints, beta)
        shown = _shown(pairs["margin"].tolist(), self.n_shown)
        return RewardTables(
            pairs=pairs,
            tokens=_token_table(checkpoints, list(shown)),
            along=along_table(ratios, [pair.group for pair in checkpoints.pairs]),
            figures={figure.name: figure for figure in preference_figures(checkpoints, beta=beta)},
            first=first_share(ratios, [pair.group for pair in checkpoints.pairs]),
            coloured=[_coloured(checkpoints, row, why, ratios[row], pairs) for row, why in shown.items()],
            beta=beta,
            whose="as rewards.beta says" if self.beta else "the run’s own" if checkpoints.knows_beta else "",
        )


class RewardTables(NamedTuple):
    """Rewards of pairs, and what is said of them."""

    pairs: pd.DataFrame
    """A row a pair."""
    tokens: pd.DataFrame
    """A row a token of the pairs that are shown."""
    along: pd.DataFrame
    """Mean log-ratio by stretch of the response."""
    figures: dict[str, Figure]
    """Preference accuracy, ties and margin over all pairs, by name."""
    first: Interval
    """Share of the mean margin in the first tokens; NaN where there is no margin to share."""
    coloured: list[ColouredPair]
    beta: float
    whose: str
    """Origin of β; empty: it is assumed."""


def pair_table(checkpoints: Checkpoints, beta: float) -> pd.DataFrame:
    """A row a pair: lengths in tokens, log-probs and rewards in nats, mean probability of a token (geometric), margin, correct.

    ``prompt`` numbers the prompts. Correct is a margin above 0; a tie is not.
    """
    rows, numbers = [], {}  # type: ignore[var-annotated]
    for pair, base, aligned in zip(checkpoints.pairs, *checkpoints.token_log_probs, strict=True):
        row = {"pair_id": pair.pair_id, "source": pair.source, "prompt": numbers.setdefault(pair.group, len(numbers))}
        row |= {f"tokens_{side}": len(getattr(base, side)) for side in SIDES}
        for name, said in (("base", base), ("aligned", aligned)):
            row |= {f"logp_{name}_{side}": float(getattr(said, side).sum()) for side in SIDES}
            row |= {f"token_probability_{name}_{side}": math.exp(float(getattr(said, side).mean())) for side in SIDES}
        row |= {f"reward_{side}": beta * (row[f"logp_aligned_{side}"] - row[f"logp_base_{side}"]) for side in SIDES}
        margin = row["reward_chosen"] - row["reward_rejected"]
        rows.append(row | {"margin": margin, "correct": int(margin > 0)})
    return pd.DataFrame(rows)


def along_table(ratios: Sequence[SideLogProbs], groups: Sequence[str]) -> pd.DataFrame:
    """Mean log-ratio of a token, nats, in each stretch of the response that any response reaches; with intervals over prompts."""
    longest = max(len(side) for pair in ratios for side in pair)
    rows = []
    for first, end in zip(_BINS, [*_BINS[1:], 10**9], strict=True):
        for which, side in enumerate(SIDES):
            parts = [pair[which][first - 1 : end - 1] for pair in ratios]
            there = [(part, group) for part, group in zip(parts, groups, strict=True) if len(part)]
            if there:
                counts = [float(len(part)) for part, _ in there]
                mean = ratio_of_sums([float(part.sum()) for part, _ in there], counts, [group for _, group in there])
                last = min(end - 1, longest)
                ends = {"side": side, "first_token": first, "last_token": last, "log_ratio": mean.value}
                rows.append(
                    ends | {"ci_low": mean.low, "ci_high": mean.high, "n": len(there), "n_tokens": int(sum(counts))}
                )
    return pd.DataFrame(rows)


def first_share(ratios: Sequence[SideLogProbs], groups: Sequence[str]) -> Interval:
    """Share of the summed margins that is in the first tokens of both responses; NaN where the sum is not told from 0."""
    whole = [float(pair.chosen.sum() - pair.rejected.sum()) for pair in ratios]
    first = [float(pair.chosen[:FIRST_TOKENS].sum() - pair.rejected[:FIRST_TOKENS].sum()) for pair in ratios]
    mean = ratio_of_sums(whole, [1.0] * len(whole), groups)
    return ratio_of_sums(first, whole, groups) if mean.low > 0 or mean.high < 0 else _NOWHERE


def _shown(margins: Sequence[float], n: int) -> dict[int, str]:
    """Rows of the pairs to be shown, each with why."""
    order = sorted(range(len(margins)), key=margins.__getitem__)
    ends = {order[0]: "the smallest margin", order[-1]: "the largest margin"} if n > 2 and order else {}
    first = [row for row in range(len(margins)) if row not in ends][: max(0, n - len(ends))]
    return dict.fromkeys(first, "among the first, not selected") | dict(reversed(ends.items()))


def _token_table(checkpoints: Checkpoints, shown: Sequence[int]) -> pd.DataFrame:
    base, aligned = checkpoints.token_log_probs
    rows = []
    for row in shown:
        pair = checkpoints.pairs[row]
        for which, side in enumerate(SIDES):
            ids = getattr(pair.ids, f"{side}_ids")
            texts = token_texts(checkpoints.base.tokenizer, ids)
            said = zip(ids, texts, base[row][which].tolist(), aligned[row][which].tolist(), strict=True)
            rows += [
                (pair.pair_id, side, at, i, as_cell(text), before, after, after - before)
                for at, (i, text, before, after) in enumerate(said, 1)
            ]
    columns = ("pair_id", "side", "token", "id", "text", "logp_base", "logp_aligned", "log_ratio")
    return pd.DataFrame(rows, columns=list(columns))


def _coloured(checkpoints: Checkpoints, row: int, why: str, ratios: SideLogProbs, pairs: pd.DataFrame) -> ColouredPair:
    pair, of = checkpoints.pairs[row], pairs.iloc[row]
    texts = []
    for side, values in zip(SIDES, ratios, strict=True):
        words = token_texts(checkpoints.base.tokenizer, getattr(pair.ids, f"{side}_ids"))
        name = f"{side.capitalize()}: reward {as_text(of[f'reward_{side}'], '+.3f')}, {len(values)} tokens"
        texts.append(coloured_text(name, words, values.tolist()))
    return ColouredPair(f"{pair.pair_id}, margin {as_text(of['margin'], '+.3f')} ({why})", pair.prompt, texts)


def rewards_section(found: RewardTables) -> Section:
    """The section ``rewards``."""
    with house_style():
        figure, axes = new_figure(2, panel_height_cm=5.0)
        sentences = [_draw_margins(axes[0], found), _draw_along(axes[1], found)]
        set_titles(figure, axes, sentences)
    return _section(found, figure, sentences)


def _section(found: RewardTables, figure: Picture, sentences: list[str]) -> Section:
    margin = found.figures["reward_margin"]
    n, accuracy = len(found.pairs), found.figures["preference_accuracy"]
    ends = _ends(Interval(*margin[2:5]), "+.3f")
    headline = Headline(
        as_text(margin.value, "+.3f"),
        f"mean margin of implicit rewards, nats × β with β = {found.beta:g}{'' if found.whose else ' (assumed)'}",
        f"95 % CI{ends}, n = {n} pairs, {as_text(accuracy.value, 'percent')} above 0; {NAME}.csv",
    )
    return Section(
        name=NAME,
        question="Which of two responses does the aligned model prefer more than its base does, and by which tokens?",
        claim="DPO: the language model is secretly a reward model, r = β log(π/π₀) up to a term of the prompt (arXiv 2305.18290).",
        sentences=sentences,
        interval=(
            "95 %, over prompts: of the share right, Clopper–Pearson’s at an effective sample size; of means and of the share in "
            "the first tokens, the jackknife’s."
        ),
        limits=(
            "That what is preferred is better, or that the model says it: these are log-probs of given responses.",
            "Rewards of losses without a reference (SimPO), which are other ones than β log(π/π₀).",
            "Why a token is likelier: its log-ratio depends on all tokens before it.",
        ),
        figure=figure,
        table=found.pairs,
        reading=_reading(found),
        headlines=[headline],
        shown=_means(found.pairs),
        caption="Means over the pairs",
        more_tables={"rewards_along": found.along, "rewards_tokens": found.tokens},
        coloured=_as_coloured(found),
    )


def _reading(found: RewardTables) -> list[str]:
    of = (
        f"β = {found.beta:g}, {found.whose}"
        if found.whose
        else (
            f"β = {found.beta:g} is assumed: with which β the aligned model was trained is not known here; rewards.beta=… sets it"
        )
    )
    ties = found.figures["preference_ties"]
    longer = (found.pairs["tokens_chosen"] > found.pairs["tokens_rejected"]).mean()
    return [
        "Implicit reward: β (log π − log π₀), summed over a response’s tokens, its end token too. Margin: chosen less rejected; "
        f"right is above 0, a tie is not (ties: {as_text(ties.value, 'percent')}).",
        f"{of}. It scales rewards and margins and nothing else.",
        "log π − log π₀ of a token, nats: 0.7 is twice as likely as before, −0.7 half as likely.",
        f"Rewards are sums: a longer response has more terms. Chosen responses are the longer ones in {as_text(longer, 'percent')} "
        "of the pairs.",
    ]


def _means(pairs: pd.DataFrame) -> pd.DataFrame:
    """Means over pairs, a column a side."""
    rows = (
        ("tokens", "tokens_", ".1f"),
        ("log π₀, nats", "logp_base_", ".2f"),
        ("log π, nats", "logp_aligned_", ".2f"),
        ("probability of a token, base", "token_probability_base_", ".3f"),
        ("probability of a token, aligned", "token_probability_aligned_", ".3f"),
        ("implicit reward", "reward_", "+.3f"),
    )
    said = [
        (name, *(as_text(float(pairs[column + side].mean()), form) for side in SIDES)) for name, column, form in rows
    ]
    return pd.DataFrame(said, columns=["figure", *SIDES])


def _as_coloured(found: RewardTables) -> Coloured | None:
    if not found.coloured:
        return None
    how = (
        "Colour: log π − log π₀ of each token, nats. Blue: the aligned model finds it likelier than its base does; orange and "
        "dotted: less likely. Numbers: the tokens furthest from 0. Blue in the chosen response and orange in the rejected one "
        "make the margin."
    )
    return Coloured("Which tokens carry the preference?", how, legend(), found.coloured)


def _draw_margins(axes: Axes, found: RewardTables) -> str:
    """Histogram of the margins, right ones and wrong ones."""
    margins = found.pairs["margin"].to_numpy()
    reach = max(float(np.abs(margins).max()), 1e-6)
    width = 2 * reach / _N_BARS
    edges = width * np.arange(-_N_BARS // 2, _N_BARS // 2 + 1)
    wrong, right = margins[margins <= 0], margins[margins > 0]
    for part, side, at, name in ((wrong, "rejected", 0.02, "left"), (right, "chosen", 0.98, "right")):
        axes.hist(part, bins=list(edges), color=COLOURS[side], linewidth=0)
        said = f"{len(part)} {'wrong' if name == 'left' else 'right'}"
        axes.text(at, 0.97, said, color=COLOURS[side], fontweight="bold", ha=name, va="top", transform=axes.transAxes)
    axes.margins(y=0.2)
    axes.axvline(0, color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(f"margin of implicit rewards, nats × β (β = {found.beta:g})")
    axes.set_ylabel("pairs")
    accuracy = found.figures["preference_accuracy"]
    share = as_text(accuracy.value, "percent") + _ends(Interval(*accuracy[2:5]), "percent")
    return f"Of {len(margins)} pairs {share} have the higher implicit reward on the chosen response"


def _draw_along(axes: Axes, found: RewardTables) -> str:
    """Mean log-ratio of a token along the response."""
    drawn = found.along[found.along["n"] >= max(2, _LEAST_REACH * len(found.pairs))]
    starts = sorted(drawn["first_token"].unique())
    labels = []
    for side in SIDES:
        rows = drawn[drawn["side"] == side]
        at = [starts.index(first) for first in rows["first_token"]]
        axes.plot(at, rows["log_ratio"], color=COLOURS[side], marker="o", markersize=2.5)
        axes.fill_between(at, rows["ci_low"], rows["ci_high"], color=COLOURS[side], alpha=0.15, linewidth=0)
        labels += [EndLabel(float(rows["log_ratio"].iloc[-1]), side, COLOURS[side])] if len(rows) else []
    axes.set_xlim(-0.3, max(len(starts) - 0.7, 0.7))
    mark_level(axes, 0.0)
    label_ends(axes, labels)
    axes.set_xticks(range(len(starts)), [str(first) for first in starts])
    axes.set_xlabel("token of the response, from")
    axes.set_ylabel("log π/π₀, nats per token")
    if math.isnan(found.first.value):
        return "The mean margin can’t be told from 0, so there is no share of it in the first tokens"
    share = as_text(found.first.value, "percent") + _ends(found.first, "percent")
    return f"The first {FIRST_TOKENS} tokens of the responses hold {share} of the mean margin"


def _ends(interval: Interval, form: str) -> str:
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return ""
    return f" ({as_text(interval.low, form)} to {as_text(interval.high, form)})"
