"""Behaviour under shifted prompts, and knowledge that no preference was about: what training changed there, and what it left.

Behaviour: the change of the odds of chosen against rejected responses from base to aligned model, as a share of the change on the
usual prompts; how often the pair is ranked right; and what judges prefer of what both models say. Knowledge: cross-entropy of
neutral text, and TruthfulQA's multiple choice.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes

from analysis.belief.judged import judges_of
from analysis.belief.shifted_prompts import KINDS, Shifted, Writer, shifted, writer_of
from analysis.contract import Cost
from analysis.open.checkpoints import Checkpoints, start_scorers
from analysis.open.pair_log_probs import sums_of_pairs, tokens_of_pairs
from analysis.open.probe_pairs import ProbePair
from analysis.report.page import Headline, Section
from analysis.report.site_axes import Panel, as_text, draw_panels
from analysis.report.style import COLOURS
from analysis.steering.sweep import check_options
from analysis.steering.unrelated_prompts import unrelated_ids
from datamodules.records import PreferenceSource
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.models.generation import Decoding
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.scoring.behaviour import Prompt, as_cell, complete, pair_up, score_all
from tiltmeter.scoring.depth import ratio_of_sums
from tiltmeter.scoring.scorer import Scorer
from tiltmeter.scoring.shift import share_kept
from tiltmeter.scoring.truthfulqa import TruthfulQA
from tiltmeter.stats.equivalence import equivalence
from tiltmeter.stats.jackknife import Interval
from tiltmeter.stats.proportions import share_interval

NAME = "shift"
USUAL = "usual"
CHANGE, KEPT, ACCURACY = "odds_change", "share_kept", "preference_accuracy"
NEUTRAL = "neutral_loss"
KNOWLEDGE = "knowledge"
"""Place of figures that are about no prompt of a preference."""
MARGIN = 0.05
"""Unchanged: cross-entropy of neutral text within so many nats a token, shares of TruthfulQA within so much."""
COLUMNS = ["measure", "shift", "value", "value_low", "value_high", "n", "p_equivalent"]
Row = tuple[str, str, float, float, float, int, float]


class Shift:
    """Options of the shift analysis.

    Args:
        kinds: shifts of prompts; another topic there is only in the synthetic world.
        n_prompts: pairs, the first ones, and pairs of another corpus, at most; null: all.
        corpus: another one; null: none.
        scorers: judges of what both models say, by name; without one the oracle of a synthetic world.
        decoding: of what they say; null: greedy, 96 tokens.
        neutral: file of neutral texts; null: plain sentences of ours.
        truthfulqa: questions to score both models on; null: none.
        margin: within which knowledge is called unchanged: nats a token, or shares.
        chat_date: the day that a chat template prints.
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        kinds: Sequence[str] = KINDS,
        n_prompts: int | None = 64,
        corpus: PreferenceSource | None = None,
        scorers: Mapping[str, Scorer | None] | None = None,
        decoding: Decoding | None = None,
        neutral: str | None = None,
        truthfulqa: TruthfulQA | None = None,
        margin: float = MARGIN,
        chat_date: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        known = {f"kinds[{i}]": (kind, KINDS) for i, kind in enumerate(kinds)}
        check_options(NAME, {"n_prompts": (n_prompts, 4)}, {"dtype": (dtype, DTYPES), **known})
        self.kinds, self.n_prompts, self.corpus = tuple(kinds), n_prompts, corpus
        self.scorers = {name: scorer for name, scorer in (scorers or {}).items() if scorer is not None}
        self.decoding, self.neutral, self.truthfulqa = decoding or Decoding(), neutral, truthfulqa
        self.margin, self.chat_date, self.dtype, self.device = margin, chat_date, dtype, device

    def start(self, checkpoints: Checkpoints) -> None:
        """Load or reach the judges and the questions. Raises UserError."""
        start_scorers(judges_of(self.scorers, checkpoints).values(), checkpoints)
        if self.truthfulqa is not None:
            self.truthfulqa.start()

    def costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """Passes over pairs under every shift, and tokens that both models say; TruthfulQA comes on top."""
        usual, found = self._shifted(checkpoints)
        read = sum(pair.n_row_tokens for of in (usual.pairs, *(shift.pairs for shift in found)) for pair in of)
        n = len(usual.pairs) + sum(len(shift.pairs) for shift in found)
        costs = [Cost("teacher-forced", 2.0, 2 * read)]
        n_new = self.decoding.max_new_tokens
        has_judge = bool(judges_of(self.scorers, checkpoints))
        return costs + [Cost("completions, at most", 2.0 * n_new, 2 * n * n_new * self.decoding.n_samples)] * has_judge

    @torch.no_grad()
    def table(self, checkpoints: Checkpoints) -> tuple[pd.DataFrame, pd.DataFrame]:
        """``shift``: a row for each measure and shift; ``shift_prompts``: every prompt as it was asked.

        Raises:
            UserError: a file that can't be read.
            Unsupported: too few prompts that can be written again as they were trained.
        """
        usual, found = self._shifted(checkpoints)
        judges = judges_of(self.scorers, checkpoints)
        before = _odds_changes(checkpoints, usual.pairs)
        rows = [*_odds_rows(USUAL, before, usual.pairs), *self._judged(judges, checkpoints, USUAL, usual.pairs)]
        groups = [pair.group for pair in usual.pairs]
        for shift in found:
            after = _odds_changes(checkpoints, shift.pairs)
            rows += _odds_rows(shift.name, after, shift.pairs)
            kept = share_kept(after, [pair.group for pair in shift.pairs], before, groups)
            rows.append((KEPT, shift.name, *kept, len(shift.pairs), math.nan))
            rows += self._judged(judges, checkpoints, shift.name, shift.pairs)
        rows += [*self._neutral_rows(checkpoints), *self._truthfulqa_rows(checkpoints)]
        table = pd.DataFrame(rows, columns=COLUMNS).assign(margin=self.margin, n_cut=self._n_cut(checkpoints, usual))
        return table, _prompt_table(usual.pairs, found)

    def _shifted(self, checkpoints: Checkpoints) -> tuple[Writer, list[Shifted]]:
        """Pairs as they are usually asked, and under every shift."""
        asked = checkpoints.pairs[: self.n_prompts]
        judges = judges_of(self.scorers, checkpoints)
        longest = self.decoding.max_new_tokens if judges else 0
        writer = writer_of(checkpoints.base, asked, chat_date=self.chat_date, longest=longest)
        return writer, shifted(writer, self.kinds, checkpoints, corpus=self.corpus, n_pairs=self.n_prompts)

    def _n_cut(self, checkpoints: Checkpoints, usual: Writer) -> int:
        """Pairs that are left out, since their prompts were cut."""
        return len(checkpoints.pairs[: self.n_prompts]) - len(usual.pairs)

    def _judged(
        self, judges: Mapping[str, Scorer], checkpoints: Checkpoints, name: str, pairs: Sequence[ProbePair]
    ) -> Iterator[Row]:
        """Figures of judges, of what both models say to the same prompts."""
        if not judges:
            return
        prompts = [Prompt(p.pair_id, p.prompt, p.ids.prompt_ids, p.chosen, p.group, p.attributes) for p in pairs]
        said = [
            complete(opened.model, opened.tokenizer, prompts, self.decoding)
            for opened in (checkpoints.base, checkpoints.aligned)
        ]
        for figure in score_all(judges, pair_up(prompts, *said)).figures:
            if figure.of != "judge":
                measure = figure.name if figure.of == "both" else f"{figure.name}/{figure.of}"
                yield measure, name, figure.value, figure.low, figure.high, figure.n, math.nan

    def _neutral_rows(self, checkpoints: Checkpoints) -> list[Row]:
        """Cross-entropy of neutral text by both models, nats a token, and its change."""
        texts = [ids for ids in unrelated_ids(checkpoints.base, self.neutral, key=f"{NAME}.neutral") if len(ids) > 1]
        pairs = [TokenizedPair(ids[:1], ids[1:], ids[:1]) for ids in texts]
        names, n_tokens = [str(i) for i in range(len(pairs))], [float(len(pair.chosen_ids)) for pair in pairs]
        losses = [
            [-float(said.chosen.sum()) for said in tokens_of_pairs(opened, pairs)]
            for opened in (checkpoints.base, checkpoints.aligned)
        ]
        changes = [after - before for before, after in zip(*losses, strict=True)]
        rows = [
            _knowledge(f"{NEUTRAL}/{of}", ratio_of_sums(each, n_tokens, names), len(pairs))
            for of, each in zip(("base", "policy"), losses, strict=True)
        ]
        return [
            *rows,
            _knowledge(f"{NEUTRAL}_change", ratio_of_sums(changes, n_tokens, names), len(pairs), self.margin),
        ]

    def _truthfulqa_rows(self, checkpoints: Checkpoints) -> list[Row]:
        """TruthfulQA of both models, and the change, question by question."""
        if self.truthfulqa is None:
            return []
        base, policy = (
            self.truthfulqa.score(opened.model, opened.tokenizer, of=of)  # type: ignore[arg-type]
            for opened, of in ((checkpoints.base, "base"), (checkpoints.aligned, "policy"))
        )
        rows = [
            _knowledge(f"{figure.name}/{figure.of}", Interval(figure.value, figure.low, figure.high), figure.n)
            for scores in (base, policy)
            for figure in scores.figures
        ]
        questions = [question.question for question in self.truthfulqa.questions]
        for name in (figure.name for figure in base.figures):
            both = list(zip(base.columns[name], policy.columns[name], questions, strict=True))
            known = [(after - before, question) for before, after, question in both if math.isfinite(after - before)]
            if known:
                changes, groups = zip(*known, strict=True)
                found = ratio_of_sums(changes, [1.0] * len(known), groups)
                rows.append(_knowledge(f"{name}_change", found, len(known), self.margin))
        return rows


def _odds_changes(checkpoints: Checkpoints, pairs: Sequence[ProbePair]) -> list[float]:
    """Change of log [P(chosen) / P(rejected)] from base to aligned model, nats, of each pair."""
    ids = [pair.ids for pair in pairs]
    base, aligned = (sums_of_pairs(tokens_of_pairs(of, ids)) for of in (checkpoints.base, checkpoints.aligned))
    change = aligned - base
    return (change[:, 0] - change[:, 1]).tolist()


def _odds_rows(name: str, changes: Sequence[float], pairs: Sequence[ProbePair]) -> list[Row]:
    groups = [pair.group for pair in pairs]
    mean = ratio_of_sums(changes, [1.0] * len(changes), groups)
    right = share_interval([float(change > 0) for change in changes], groups)
    return [(measure, name, *of, len(pairs), math.nan) for measure, of in ((CHANGE, mean), (ACCURACY, right))]


def _knowledge(measure: str, found: Interval, n: int, margin: float | None = None) -> Row:
    p = math.nan if margin is None or n < 2 else equivalence(found, n, low=-margin, high=margin).p_value
    return measure, KNOWLEDGE, *found, n, p


def _prompt_table(usual: Sequence[ProbePair], found: Sequence[Shifted]) -> pd.DataFrame:
    """Every prompt under every shift."""
    everything = [Shifted(USUAL, "as held out", list(usual)), *found]
    rows = [
        {
            "shift": of.name,
            "what": of.says,
            "planted": of.is_planted,
            "pair_id": pair.pair_id,
            "prompt": as_cell(pair.prompt),
        }
        for of in everything
        for pair in of.pairs
    ]
    return pd.DataFrame(rows)


def shift_section(found: tuple[pd.DataFrame, pd.DataFrame]) -> Section:
    """The section ``shift``."""
    table, prompts = found
    rate = next((name for name in table["measure"].unique() if name.endswith(("preference_rate", "win_rate"))), None)
    panels: list[Panel] = [_draw_kept, partial(_draw_shares, rate=rate), _draw_knowledge]
    figure, sentences = draw_panels(panels, table, panel_height_cm=4.8)
    kept, n_cut = table[table["measure"] == KEPT], int(table["n_cut"].iloc[0])
    least = kept.loc[kept["value"].idxmin()] if kept["value"].notna().any() else None
    return Section(
        name=NAME,
        question="Does the behaviour hold on other prompts, and did knowledge stay as it was?",
        claim="A model that was taught to behave on some prompts may not on others; one that learned a preference does. And "
        "D-STEER: what it knows stays.",
        sentences=sentences,
        interval="95\u00a0%, over prompts, by the jackknife; of shares, Clopper–Pearson’s at an effective size. Unchanged: both "
        f"one-sided tests at 5\u00a0% put the change within ±{float(table['margin'].iloc[0]):g}.",
        limits=[
            "Shifts of real data are made by rule, not by people: a paraphrase keeps most of the words.",
            "The odds are of given responses. What a model says by itself is what judges are asked about.",
            "Knowledge that neither neutral text nor the questions ask for.",
        ],
        figure=figure,
        table=table,
        reading=[
            *_what_was_asked(prompts),
            "Kept: mean change of log [P(chosen) / P(rejected)] from base to aligned model under the shift, over that on the usual "
            "prompts: 1 is all of it.",
            "Accuracy: how often that change is for the chosen response; half is chance."
            + (f" {_RATE_SAYS}" if rate else ""),
            *([f"{n_cut} pairs are left out, whose prompts were cut in training."] if n_cut else []),
        ],
        headlines=[] if least is None else [_headline(least)],
        shown=_shown(table),
        caption="The numbers, with 95 % intervals over prompts",
        more_tables={"shift_prompts": prompts},
    )


_RATE_SAYS = "Grey diamonds: how often a judge prefers what the aligned model says to what the base says."


def _what_was_asked(prompts: pd.DataFrame) -> list[str]:
    """Lines on each shift, with the shortest prompt under it."""
    lines = []
    for name, rows in prompts.groupby("shift", sort=False):
        example = min(rows["prompt"], key=len).strip().replace("\n", " ")
        known = " (planted: nothing of the preference is lost)" if bool(rows["planted"].iloc[0]) else ""
        lines.append(
            f"{str(name).replace('_', ' ').capitalize()}: {rows['what'].iloc[0]}{known}, as in “{example[:160]}”."
        )
    return lines


def _headline(row: pd.Series) -> Headline:
    return Headline(
        as_text(row["value"], "percent"),
        f"of the change of preference odds is kept under {row['shift'].replace('_', ' ')}, the least of all shifts",
        f"95 % CI{_ends(row, 'percent')}, n = {int(row['n'])}. {NAME}.csv, {KEPT}.",
    )


def _ends(row: Any, form: str) -> str:
    if not (math.isfinite(row["value_low"]) and math.isfinite(row["value_high"])):
        return ""
    return f" ({as_text(row['value_low'], form)} to {as_text(row['value_high'], form)})"


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    said = [
        (
            row["shift"].replace("_", " "),
            row["measure"],
            as_text(row["value"], ".3f") + _ends(row, ".3f"),
            int(row["n"]),
        )
        for _, row in table.iterrows()
    ]
    return pd.DataFrame(said, columns=["prompts", "figure", "value", "n"])


def _draw_rows(
    axes: Axes, rows: pd.DataFrame, names: Sequence[str], colour: str, *, mark: str = "o", up: float = 0.0
) -> None:
    at = [list(names).index(name) - up for name in rows["shift"]]
    axes.hlines(at, rows["value_low"], rows["value_high"], colors=COLOURS[colour], linewidth=0.8)
    axes.plot(rows["value"], at, color=COLOURS[colour], marker=mark, markersize=3.5, linestyle="")


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _draw_kept(axes: Axes, table: pd.DataFrame) -> str:
    rows = table[table["measure"] == KEPT]
    _draw_rows(axes, rows, rows["shift"].tolist(), "policy")
    _name_rows(axes, rows["shift"].tolist())
    for level in (0.0, 1.0):
        axes.axvline(level, color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlabel("share kept; dashed: nothing, all of it")
    known = rows.dropna(subset=["value"])
    if known.empty:
        return (
            "The change of the preference odds on the usual prompts can’t be told from 0, so there is nothing to keep"
        )
    low, high = (known.loc[i] for i in (known["value"].idxmin(), known["value"].idxmax()))
    said = [f"{as_text(row['value'], 'percent')} under {row['shift'].replace('_', ' ')}" for row in (low, high)]
    return f"Of the change of preference odds {said[0]} is kept{'' if len(known) == 1 else f', {said[1]}'}"


def _draw_shares(axes: Axes, table: pd.DataFrame, *, rate: str | None) -> str:
    rows = table[table["measure"] == ACCURACY]
    names = rows["shift"].tolist()
    _draw_rows(axes, rows, names, "policy", up=0.1)
    if rate is not None:
        _draw_rows(axes, table[table["measure"] == rate], names, "mark", mark="D", up=-0.15)
    _name_rows(axes, names)
    axes.axvline(0.5, color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share; dashed: chance")
    usual, others = rows[rows["shift"] == USUAL].iloc[0], rows.loc[rows["shift"] != USUAL, "value"]
    said = f"The aligned model ranks {as_text(usual['value'], 'percent')} of the usual pairs right"
    if others.empty:
        return said
    return f"{said}, {as_text(others.min(), 'percent')} to {as_text(others.max(), 'percent')} under shift"


def _draw_knowledge(axes: Axes, table: pd.DataFrame) -> str:
    rows = table[table["measure"].str.endswith("_change") & (table["shift"] == KNOWLEDGE)]
    rows = rows.assign(shift=rows["measure"].str.removesuffix("_change"))
    margin = float(table["margin"].iloc[0])
    _draw_rows(axes, rows, rows["shift"].tolist(), "policy_dark")
    _name_rows(axes, rows["shift"].tolist())
    axes.axvspan(-margin, margin, color=COLOURS["mark"], alpha=0.15, linewidth=0)
    axes.axvline(0.0, color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlabel("change (nats a token, share)")
    same = int((rows["p_equivalent"] <= 0.05).sum())
    first = rows.iloc[0]
    said = (
        f"Cross-entropy of neutral text changes by {as_text(first['value'], '.3f')}{_ends(first, '.3f')} nats a token"
    )
    return f"{said}; unchanged within ±{margin:g}: {same} of {len(rows)} figures of knowledge"
