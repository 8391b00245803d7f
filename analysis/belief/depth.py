"""Depth of the change along a response: KL by token, share of the first tokens, recovery by token, and forced beginnings.

Of test prompts: v* is of the others. Responses are those of the data and, drawn at temperature 1, the models' own. After k tokens
of the rejected response are forced on both models, the odds of the chosen response against the rest of the rejected one say how
much of the preference is left; so does a judge, of what they go on to say.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import pandas as pd
import torch
from matplotlib.axes import Axes
from transformers import PreTrainedTokenizerBase

from analysis.belief.judged import judges_of
from analysis.contract import Cost
from analysis.open.checkpoints import Checkpoints, start_scorers
from analysis.open.models import LoadedModel
from analysis.open.pair_log_probs import Compared, ComparedPair, compare_on_pairs
from analysis.open.probe_pairs import ProbePair
from analysis.report.page import Headline, Section
from analysis.report.site_axes import Panel, as_text, draw_panels
from analysis.report.style import COLOURS, EndLabel, label_ends, mark_level
from analysis.steering.directions import States, split_by_prompt, v_star
from analysis.steering.sweep import check_options
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.models.generation import Completion, Decoding, generate
from tiltmeter.models.layers import FINAL_POST_NORM
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.scoring.behaviour import score_all
from tiltmeter.scoring.depth import (
    FIRST_TOKENS,
    even_share,
    first_token_share,
    mean_by_token,
    preference_left,
    ratio_of_sums,
    recovery_by_token,
)
from tiltmeter.scoring.odds import preference_odds
from tiltmeter.scoring.scorer import Sample, Scorer
from tiltmeter.stats.jackknife import NO_INTERVAL

NAME = "depth"
KL, SHARE, EVEN = "kl", "first_token_share", "even_share"
RECOVERY, FIRST, LATER = "recovery", "recovery_first", "recovery_later"
CHANGE, LEFT = "odds_change", "preference_left"
"""Measures of the table, those of a judge beside them."""
OWN, BASE_OWN, CHOSEN, REJECTED = "own", "base_own", "chosen", "rejected"
"""Responses: drawn from the aligned model, drawn from the base, and those of the data."""
COLUMNS = ["measure", "response", "at", "value", "value_low", "value_high", "n"]
Row = tuple[str, str, float, float, float, float, int]


class Forced(NamedTuple):
    """Pairs that go on after k tokens of the rejected response."""

    k: int
    rows: list[int]
    """Places of the pairs that are so long."""
    pairs: list[TokenizedPair]
    """The chosen response, and the rest of the rejected one."""


class Depth:
    """Options of the depth analysis.

    Args:
        forced: k, tokens of the rejected response that are forced; 0 is added, with which the others are compared.
        n_prompts: test pairs, and pairs that v* is estimated from, at most; null: all of each half.
        max_new_tokens: of the models' own responses, at temperature 1.
        scorers: judges of what follows forced tokens, by name; without one the oracle of a synthetic world.
        seed: of the split into halves and of the responses.
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        forced: Sequence[int] = (0, 1, 3, 5, 10, 20),
        n_prompts: int | None = 64,
        max_new_tokens: int = 64,
        scorers: Mapping[str, Scorer | None] | None = None,
        seed: int = 0,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        least: dict[str, tuple[int | None, int]] = {
            "forced": (min(forced, default=-1), 0),
            "n_prompts": (n_prompts, 1),
            "max_new_tokens": (max_new_tokens, 1),
            "seed": (seed, 0),
        }
        check_options(NAME, least, {"dtype": (dtype, DTYPES)})
        self.forced, self.n_prompts, self.seed = sorted({0, *forced}), n_prompts, seed
        self.decoding = Decoding(max_new_tokens=max_new_tokens, temperature=1.0, seed=seed)
        self.scorers = {name: scorer for name, scorer in (scorers or {}).items() if scorer is not None}
        self.dtype, self.device = dtype, device

    def start(self, checkpoints: Checkpoints) -> None:
        """Load or reach the judges. Raises UserError."""
        start_scorers(judges_of(self.scorers, checkpoints).values(), checkpoints)

    def costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """Passes over the given responses and tokens of the models' own."""
        test = self._test(checkpoints)
        begun = self._begun(test, checkpoints)
        read = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for of in begun for p in of.pairs)
        n = sum(len(of.rows) for of in begun[: None if self.scorers or checkpoints.world else 1])
        said = 2 * n * self.decoding.max_new_tokens
        return [Cost("teacher-forced", 2.0, 2 * read), Cost("own responses, at most", 2.0, said)]

    @torch.no_grad()
    def table(self, checkpoints: Checkpoints) -> pd.DataFrame:
        """``depth``: a row for each measure, response and place: a token from 1, or the number of forced tokens.

        Raises:
            UserError: too few prompts, or models that don't differ.
        """
        estimation = split_by_prompt(checkpoints.pairs, seed=self.seed).estimation[: self.n_prompts]
        states = States(checkpoints, estimation, [FINAL_POST_NORM], position="prompt_last")
        move = v_star(states, FINAL_POST_NORM)
        test = self._test(checkpoints)
        begun, judges = self._begun(test, checkpoints), judges_of(self.scorers, checkpoints)
        said = [self._said(checkpoints, of, test) for of in begun[: None if judges else 1]]
        own = [
            TokenizedPair(test[row].ids.prompt_ids, aligned.ids, base.ids)
            for row, base, aligned in zip(begun[0].rows, *said[0], strict=True)
        ]
        asked = [*own, *(pair for of in begun for pair in of.pairs)]
        read = compare_on_pairs(checkpoints.base, checkpoints.aligned, asked, move=move)
        groups = [test[row].group for row in begun[0].rows]
        rows = _along_rows(read[: len(own)], (OWN, BASE_OWN), groups)
        rows += _along_rows(read[len(own) : 2 * len(own)], (CHOSEN, REJECTED), groups)
        rows += _odds_rows(begun, read[len(own) :], test)
        if judges:
            tokenizer = checkpoints.base.tokenizer
            rows += [
                row for of, both in zip(begun, said, strict=True) for row in _judged(judges, tokenizer, of, both, test)
            ]
        return pd.DataFrame(rows, columns=COLUMNS)

    def _test(self, checkpoints: Checkpoints) -> list[ProbePair]:
        return split_by_prompt(checkpoints.pairs, seed=self.seed).test[: self.n_prompts]

    def _begun(self, test: Sequence[ProbePair], checkpoints: Checkpoints) -> list[Forced]:
        """Pairs after each number of forced tokens that at least two pairs have. Raises UserError: hardly any pair fits."""
        found = [of for k in self.forced if len((of := self._forced(test, k, checkpoints)).rows) > 1]
        if not found or found[0].k:
            raise UserError(
                f"{NAME}.max_new_tokens: {self.decoding.max_new_tokens} tokens behind their prompts leave fewer than two pairs "
                "that fit into the model’s positions; take fewer"
            )
        return found

    def _forced(self, test: Sequence[ProbePair], k: int, checkpoints: Checkpoints) -> Forced:
        """Pairs whose rejected response is longer than k tokens, and that fit into the model's positions behind them."""
        limit = getattr(checkpoints.base.model.config, "max_position_embeddings", None)
        found = {}
        for row, pair in enumerate(test):
            prompt, chosen, rejected = pair.ids
            begun = TokenizedPair([*prompt, *rejected[:k]], chosen, rejected[k:])
            length = len(begun.prompt_ids) + max(len(chosen), len(begun.rejected_ids), self.decoding.max_new_tokens)
            if begun.rejected_ids and (limit is None or length <= limit):
                found[row] = begun
        return Forced(k, list(found), list(found.values()))

    def _said(
        self, checkpoints: Checkpoints, of: Forced, test: Sequence[ProbePair]
    ) -> tuple[list[Completion], list[Completion]]:
        """Completions of base and aligned model after the forced tokens, with the same random numbers."""

        def complete(opened: LoadedModel) -> list[Completion]:
            prompts, keys = [pair.prompt_ids for pair in of.pairs], [test[row].pair_id for row in of.rows]
            return [s[0] for s in generate(opened.model, opened.tokenizer, prompts, self.decoding, keys=keys)]

        return complete(checkpoints.base), complete(checkpoints.aligned)


def _along_rows(read: Sequence[ComparedPair], sides: tuple[str, str], groups: Sequence[str]) -> list[Row]:
    """Divergence and recovery along the responses of both sides."""
    rows: list[Row] = []
    for which, side in enumerate(sides):
        said: list[Compared] = [pair[which] for pair in read]
        kl, moved = [of.kl for of in said], [of.kl_moved for of in said]
        rows += [(KL, side, at.token, *at.figure, at.n) for at in mean_by_token(kl, groups)]
        rows += [(RECOVERY, side, at.token, *at.figure, at.n) for at in recovery_by_token(moved, kl, groups)]
        even = even_share([len(of) for of in kl])
        rows.append((SHARE, side, FIRST_TOKENS, *first_token_share(kl, groups), len(said)))
        rows.append((EVEN, side, FIRST_TOKENS, even, math.nan, math.nan, len(said)))
        for name, part in ((FIRST, slice(FIRST_TOKENS)), (LATER, slice(FIRST_TOKENS, None))):
            steered, start = ([float(of[part].sum()) for of in each] for each in (moved, kl))
            left = ratio_of_sums(steered, start, groups) if sum(start) > 0 else NO_INTERVAL
            rows.append((name, side, FIRST_TOKENS, 1 - left.value, 1 - left.high, 1 - left.low, len(said)))
    return rows


def _odds_rows(begun: Sequence[Forced], read: Sequence[ComparedPair], test: Sequence[ProbePair]) -> list[Row]:
    """Change of the preference odds after forced tokens, and the share of it that is left, of the same pairs."""
    rows: list[Row] = []
    at_start: dict[int, float] = {}
    ends = list(accumulate(len(of.rows) for of in begun))
    for of, end in zip(begun, ends, strict=True):
        part = read[end - len(of.rows) : end]
        changes = {row: _odds(pair, 1) - _odds(pair, 0) for row, pair in zip(of.rows, part, strict=True)}
        at_start = at_start or changes
        groups = [test[row].group for row in of.rows]
        values, before = list(changes.values()), [at_start[row] for row in of.rows]
        rows.append((CHANGE, "", of.k, *ratio_of_sums(values, [1.0] * len(values), groups), len(values)))
        rows.append((LEFT, "", of.k, *preference_left(values, before, groups), len(values)))
    return rows


def _odds(pair: ComparedPair, model: int) -> float:
    """log P(chosen) − log P(rejected) by base (0) or aligned model (1), nats."""
    return float(preference_odds(-pair.chosen[model].sum(), -pair.rejected[model].sum()))


def _judged(
    judges: Mapping[str, Scorer],
    tokenizer: PreTrainedTokenizerBase,
    of: Forced,
    said: tuple[list[Completion], list[Completion]],
    test: Sequence[ProbePair],
) -> list[Row]:
    """Figures of judges, who read forced tokens and what either model says after them as one response."""
    samples = []
    for row, base, aligned in zip(of.rows, *said, strict=True):
        pair = test[row]
        begin = str(tokenizer.decode(list(pair.ids.rejected_ids[: of.k]), skip_special_tokens=True))
        before, after = (replace(one, text=begin + one.text) for one in (base, aligned))
        samples.append(Sample(pair.pair_id, pair.prompt, pair.chosen, before, after, pair.group, 0, pair.attributes))
    figures = [figure for figure in score_all(judges, samples).figures if figure.of != "judge"]
    return [(f"{f.name}/{f.of}" if f.of != "both" else f.name, "", of.k, *f[2:5], f.n) for f in figures]


def depth_section(table: pd.DataFrame) -> Section:
    """The section ``depth``."""
    rate = next((name for name in table["measure"].unique() if name.endswith(("preference_rate", "win_rate"))), None)
    panels: list[Panel] = [_draw_divergence, _draw_recovery, partial(_draw_left, rate=rate)]
    figure, sentences = draw_panels(panels, table, panel_height_cm=5.0)
    own = _one(table, SHARE, OWN)
    even, n = _one(table, EVEN, OWN)["value"], int(own["n"])
    return Section(
        name=NAME,
        question="How deep is the change along a response, and does it survive a wrong beginning?",
        claim="Qi et al. (arXiv 2406.05946): alignment is a few tokens deep, so its change lies in the first ones of a response.",
        sentences=sentences,
        interval=f"95\u00a0%, over {n} prompts, by the jackknife; of the share in the first tokens, on its log-odds.",
        limits=[
            "That late tokens do not matter: little KL there can still decide what is said.",
            "What is left of the odds after forced tokens is also less because less of the rejected response is left to judge.",
            "Recovery of states in the middle of the model: v* is added behind the final norm.",
        ],
        figure=figure,
        table=table,
        reading=[
            "KL(π ‖ π₀) at each token, over the whole vocabulary, on responses drawn from the aligned model (own) and on chosen "
            "ones; shown where at least a tenth of the responses are so long.",
            f"The share of the first {FIRST_TOKENS} tokens is a share of the sum over all tokens; spread evenly it would be "
            f"{as_text(even, 'percent')} of own responses.",
            "R = 1 − KL(π ‖ base + v*) / KL(π ‖ π₀) at each token; v* is of other prompts, read at the prompt’s last token.",
            "Preference left: how much aligning changed log [P(chosen) / P(rest of the rejected)] after k forced tokens of the "
            "rejected response, as a share of the change without any, of the same pairs.",
            *([_RATE_SAYS] if rate else []),
        ],
        headlines=[
            Headline(
                as_text(own["value"], "percent"),
                f"of the KL from base to aligned model is in the first {FIRST_TOKENS} tokens of its own responses",
                f"95 % CI{_ends(own, 'percent')}, n = {n}; spread evenly: {as_text(even, 'percent')}. {NAME}.csv, {SHARE}.",
            )
        ],
        shown=_shown(table),
        caption="The numbers, with 95 % intervals over prompts",
    )


_RATE_SAYS = (
    "Grey diamonds: how often a judge, of forced tokens and what follows as one response, prefers the aligned model’s; half is no "
    "difference."
)


def _one(table: pd.DataFrame, measure: str, response: str = "", at: float | None = None) -> pd.Series:
    rows = table[(table["measure"] == measure) & (table["response"] == response)]
    return rows.iloc[0] if at is None else rows[rows["at"] == at].iloc[0]


def _ends(row: pd.Series, form: str) -> str:
    if not (math.isfinite(row["value_low"]) and math.isfinite(row["value_high"])):
        return ""
    return f" ({as_text(row['value_low'], form)} to {as_text(row['value_high'], form)})"


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """Figures that are no curves over tokens, as text."""
    rows = table[~table["measure"].isin([KL, RECOVERY])]
    said = [
        (
            _NAMES.get(row["measure"], row["measure"]).format(n=FIRST_TOKENS),
            row["response"].replace("_", " "),
            int(row["at"]),
            as_text(row["value"], ".3f") + _ends(row, ".3f"),
        )
        for _, row in rows.iterrows()
    ]
    return pd.DataFrame(said, columns=["figure", "responses", "tokens", "value"])


def _draw_along(axes: Axes, table: pd.DataFrame, measure: str) -> None:
    """A measure by token of own and chosen responses."""
    labels = []
    for side, name, colour in ((OWN, "own", COLOURS["policy"]), (CHOSEN, "chosen", COLOURS["chosen"])):
        rows = table[(table["measure"] == measure) & (table["response"] == side)].dropna(subset=["value"])
        rows = rows[rows["n"] >= _LEAST_REACH * rows["n"].max()]
        low, high = (rows[f"value_{end}"].clip(*_RANGE[measure]) for end in ("low", "high"))
        axes.fill_between(rows["at"], low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(rows["at"], rows["value"].clip(*_RANGE[measure]), color=colour, linewidth=1.0)
        labels += [EndLabel(float(rows["value"].clip(*_RANGE[measure]).iloc[-1]), name, colour)] if len(rows) else []
    axes.axvline(FIRST_TOKENS + 0.5, color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlabel("token of the response")
    label_ends(axes, labels)


def _draw_divergence(axes: Axes, table: pd.DataFrame) -> str:
    _draw_along(axes, table, KL)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("KL(π ‖ π₀), nats")
    share = _one(table, SHARE, OWN)
    if math.isnan(share["value"]):
        return "The two models say the same, so there is no divergence to share out"
    even = as_text(_one(table, EVEN, OWN)["value"], "percent")
    said = as_text(share["value"], "percent") + _ends(share, "percent")
    return f"The first {FIRST_TOKENS} tokens hold {said} of the KL on own responses; spread evenly {even}"


def _draw_recovery(axes: Axes, table: pd.DataFrame) -> str:
    _draw_along(axes, table, RECOVERY)
    mark_level(axes, 0.0)
    axes.set_ylabel("recovery R by v*")
    first, later = (_one(table, name, CHOSEN) for name in (FIRST, LATER))
    said = (as_text(row["value"], ".2f") + _ends(row, ".2f") for row in (first, later))
    return f"v* recovers {next(said)} of the first {FIRST_TOKENS} tokens’ KL, {next(said)} later (chosen)"


def _draw_left(axes: Axes, table: pd.DataFrame, *, rate: str | None) -> str:
    rows = table[table["measure"] == LEFT]
    at = range(len(rows))
    labels = []
    if rows["value"].notna().any():
        axes.vlines(at, rows["value_low"], rows["value_high"], colors=COLOURS["policy"], linewidth=0.8)
        axes.plot(at, rows["value"], color=COLOURS["policy"], marker="o", markersize=3)
        labels.append(EndLabel(float(rows["value"].iloc[-1]), "odds left", COLOURS["policy"]))
    judged = table[table["measure"] == rate]
    if len(judged):
        places = [rows["at"].tolist().index(k) + 0.1 for k in judged["at"]]
        axes.vlines(places, judged["value_low"], judged["value_high"], colors=COLOURS["mark"], linewidth=0.8)
        axes.plot(places, judged["value"], color=COLOURS["mark"], marker="D", markersize=3, linestyle=":")
        labels.append(EndLabel(float(judged["value"].iloc[-1]), "judge", COLOURS["mark"]))
    axes.set_xticks(at, [str(int(k)) for k in rows["at"]])
    axes.set_xlabel("forced tokens of the rejected response, k")
    axes.set_ylabel("share")
    axes.set_xlim(-0.3, len(rows) - 0.7)
    axes.set_ylim(min(0.0, *axes.get_ylim()), max(1.05, *axes.get_ylim()))
    label_ends(axes, [label for label in labels if math.isfinite(label.y)])
    last = rows.iloc[-1]
    if math.isnan(last["value"]):
        return "The change of the preference odds can’t be told from 0, so there is nothing to be left"
    said = as_text(last["value"], "percent") + _ends(last, "percent")
    return f"After {int(last['at'])} forced tokens {said} of the change of the preference odds is left"


_NAMES = {
    SHARE: "share of KL in the first {n} tokens",
    EVEN: "the same, spread evenly",
    FIRST: "R of v*, first {n} tokens",
    LATER: "R of v*, later tokens",
    CHANGE: "change of preference odds after k tokens, nats",
    LEFT: "share of it that is left",
}
_RANGE: Mapping[str, tuple[float | None, float | None]] = {KL: (0.0, None), RECOVERY: (-1.0, 1.0)}
"""Values that are drawn; the table has all."""
_LEAST_REACH = 0.1
"""Share of responses that have to reach a token for it to be drawn."""
