"""Traces of training in the first tokens of unrelated text: the constant part of δ, the tokens it points to, and what it does.

Cross-entropy of the aligned model is read again with the mean δ of those tokens projected out of all its states, on the unrelated
text and on chosen responses, beside differences of two of the base's own states: directions that nobody trained.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from analysis.contract import Cost
from analysis.open.checkpoints import Checkpoints
from analysis.open.models import LoadedModel
from analysis.open.observations import site_name
from analysis.report.page import Headline, Section
from analysis.report.site_axes import (
    SITES_LABEL,
    Curve,
    Panel,
    as_text,
    draw_panels,
    extremes,
    finish_sites,
    plot_curves,
    prepare_sites,
    shade_sites,
    tick_name,
)
from analysis.report.style import COLOURS, mark_level
from analysis.steering.sweep import check_options, swept_sites
from analysis.steering.unrelated_prompts import unrelated_ids
from tiltmeter.errors import UserError
from tiltmeter.geometry.traces import constant_share, difference_directions, logit_lens
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.models.cpu_linear import fast_linear
from tiltmeter.models.layers import FINAL_POST_NORM, final_norm, resolve_sites, unembedding
from tiltmeter.pairs.batch import PreferenceBatch, TokenizedPair, collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.scoring.behaviour import as_cell
from tiltmeter.scoring.depth import ratio_of_sums
from tiltmeter.states.capture import HiddenStates, ReadPoint, read_hidden_states
from tiltmeter.stats.among_random import AmongRandom, among_random
from tiltmeter.stats.jackknife import Interval, without_each
from tiltmeter.steering.controls import draw_seeds
from tiltmeter.steering.intervene import Intervention, steer

NAME = "traces"
SHOWN_TOKENS = 10
"""Tokens at either end of the logit lens."""
TEXTS = ("unrelated", "chosen")
_TOKENS_PER_BATCH = 8192


class Texts(NamedTuple):
    """Texts to read cross-entropy on."""

    batches: list[PreferenceBatch]
    groups: list[str]
    """A name for each text; those of one prompt share it."""
    n_tokens: Float[Tensor, " text"]


class Traces:
    """Options of the traces analysis.

    Args:
        n_first: tokens at the beginning of a text, BOS not counted, whose mean δ is the trace.
        texts: file of unrelated prompts; null: plain sentences of ours.
        n_prompts: chosen responses that cross-entropy is read on, at most; null: all.
        sites: where the trace is projected out: a site, several, or ``all``; null: after the middle block, and before and after the
            final norm. It is read at every site.
        n_random: differences of the base's own states that are projected out beside it.
        seed: of their draw.
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        n_first: int = 5,
        texts: str | None = None,
        n_prompts: int | None = 16,
        sites: str | Sequence[str] | None = None,
        n_random: int = 39,
        seed: int = 0,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        least: dict[str, tuple[int | None, int]] = {
            "n_first": (n_first, 1),
            "n_prompts": (n_prompts, 1),
            "n_random": (n_random, 2),
            "seed": (seed, 0),
        }
        check_options(NAME, least, {"dtype": (dtype, DTYPES)})
        self.n_first, self.texts, self.n_prompts, self.sites = n_first, texts, n_prompts, sites
        self.n_random, self.seed, self.dtype, self.device = n_random, seed, dtype, device

    def costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """Passes of either model over the beginnings, and of the aligned one over all texts for each direction and site."""
        n_layers = checkpoints.base.model.config.num_hidden_layers
        n_directions = 1 + len(swept_sites(self.sites, n_layers)) * (1 + self.n_random)
        n_tokens = sum(int(texts.n_tokens.sum()) for texts in self._all_texts(checkpoints).values())
        n_first = 2 * len(self._unrelated(checkpoints)) * self.n_first
        return [Cost("beginnings of texts", 2.0, n_first), Cost("cross-entropy", n_directions, n_directions * n_tokens)]

    @torch.no_grad()
    def table(self, checkpoints: Checkpoints) -> pd.DataFrame:
        """``traces``: a row a site; change of cross-entropy where the trace was projected out.

        Raises:
            UserError: an unknown site, texts without a second token, or models that don't differ.
        """
        model = checkpoints.base.model
        base, aligned = (self._beginnings(opened, checkpoints) for opened in (checkpoints.base, checkpoints.aligned))
        tested = swept_sites(self.sites, model.config.num_hidden_layers)
        texts = self._all_texts(checkpoints)
        before = {name: _losses(checkpoints.aligned, of) for name, of in texts.items()}
        rows: list[dict[str, Any]] = []
        for site in resolve_sites("all", model.config.num_hidden_layers):
            states = base[ReadPoint(site, "response_all")]
            start = states.rows.double()
            update = aligned[ReadPoint(site, "response_all")].rows.double() - start
            groups = [str(i) for i in states.pair_index.tolist()]
            row = {"site": site, **constant_share(update, groups).named("constant_share")}
            row |= self._read(checkpoints.base, site, update.mean(0), start)
            if site in tested:
                row |= self._projected_out(checkpoints.aligned, site, update.mean(0), (start, groups), texts, before)
            rows.append(row)
        if not any(row["relative_norm"] > 0 for row in rows):
            raise UserError(
                "aligned: expected a model whose hidden states are not the base's, got the same ones, so there is no trace of "
                "training; give two checkpoints that differ"
            )
        return pd.DataFrame(rows).assign(n_first=self.n_first)

    def _unrelated(self, checkpoints: Checkpoints) -> list[list[int]]:
        ids = unrelated_ids(checkpoints.base, self.texts, key=f"{NAME}.texts")
        return [text for text in ids if len(text) > 1]

    def _beginnings(self, opened: LoadedModel, checkpoints: Checkpoints) -> Mapping[ReadPoint, HiddenStates]:
        """States of the first tokens of the unrelated texts, BOS not counted, at every site."""
        texts = self._unrelated(checkpoints)
        cut = [TokenizedPair(text[:1], text[1 : 1 + self.n_first], text[:1]) for text in texts]
        batch = collate_pairs(cut, pair_index=range(len(cut)), layout="chosen_only").to(opened.model.device)
        found = read_hidden_states(opened.model, batch, sites="all", positions=["response_all"])
        return {point: of._replace(rows=of.rows.cpu()) for point, of in found.items()}

    def _all_texts(self, checkpoints: Checkpoints) -> dict[str, Texts]:
        """The unrelated texts, and chosen responses behind their prompts."""
        unrelated = [TokenizedPair(text[:1], text[1:], text[:1]) for text in self._unrelated(checkpoints)]
        pairs = list(checkpoints.pairs[: self.n_prompts])
        device = checkpoints.aligned.model.device
        return {
            TEXTS[0]: _lay(unrelated, [str(i) for i in range(len(unrelated))], device),
            TEXTS[1]: _lay([pair.ids for pair in pairs], [pair.group for pair in pairs], device),
        }

    def _read(self, opened: LoadedModel, site: str, trace: Tensor, start: Tensor) -> dict[str, object]:
        """The trace as people read it: its length beside that of states, and the tokens that it points to and away from."""
        norm = None if site == FINAL_POST_NORM else final_norm(opened.model)
        head = unembedding(opened.model)
        n_tokens = min(SHOWN_TOKENS, len(head.weight))
        found = logit_lens(trace.to(opened.model.device), head, norm=norm, n_tokens=n_tokens)
        words = [_words(opened, ids.tolist()) for ids in (found.up, found.down)]
        return {
            "relative_norm": float(trace.norm() / start.norm(dim=1).mean()),
            "tokens_up": as_cell(words[0]),
            "tokens_down": as_cell(words[1]),
        }

    def _projected_out(
        self,
        aligned: LoadedModel,
        site: str,
        trace: Tensor,
        states: tuple[Tensor, list[str]],
        texts: Mapping[str, Texts],
        before: Mapping[str, Tensor],
    ) -> dict[str, object]:
        """Change of cross-entropy, nats a token, without the trace, and without differences of the base's own states."""
        if not trace.any():
            return {}
        (seed,) = draw_seeds(1, kind="difference_of_states", site=site, seed=self.seed)
        directions = torch.cat([trace[None], difference_directions(*states, self.n_random, seed=seed)])
        found: dict[str, object] = {}
        for name, of in texts.items():
            changes = torch.stack([_losses(aligned, of, site, one) for one in directions]) - before[name]
            own, judged = _change(changes, of)
            found |= own.named(f"ce_change_{name}")
            found |= {
                f"random_mean_{name}": judged.random_mean,
                f"random_low_{name}": judged.prediction.low,
                f"random_high_{name}": judged.prediction.high,
                f"p_above_{name}": judged.p_above,
                f"p_below_{name}": judged.p_below,
                f"verdict_{name}": judged.verdict,
            }
        return found | {"n_random": self.n_random}


def _change(changes: Float[Tensor, "direction text"], texts: Texts) -> tuple[Interval, AmongRandom]:
    """Σ change / Σ tokens of the first direction with its interval over texts, and its place among the others."""
    own = ratio_of_sums(changes[0].tolist(), texts.n_tokens.tolist(), texts.groups)
    kept = without_each(texts.groups)
    means = kept @ changes.T / (kept @ texts.n_tokens)[:, None]
    return own, among_random(means[:, 0], means[:, 1:])


def _lay(pairs: Sequence[TokenizedPair], groups: list[str], device: torch.device) -> Texts:
    """Texts in batches, in their order."""
    longest = max(len(pair.prompt_ids) + len(pair.chosen_ids) for pair in pairs)
    at_a_time = max(1, _TOKENS_PER_BATCH // longest)
    parts = [pairs[at : at + at_a_time] for at in range(0, len(pairs), at_a_time)]
    batches = [collate_pairs(part, pair_index=range(len(part)), layout="chosen_only").to(device) for part in parts]
    return Texts(batches, groups, torch.tensor([len(pair.chosen_ids) for pair in pairs], dtype=torch.float64))


def _losses(
    opened: LoadedModel, texts: Texts, site: str | None = None, direction: Tensor | None = None
) -> Float[Tensor, " text"]:
    """−log π of each text, nats, summed over its tokens; with a direction projected out of the states at a site."""
    interventions = []
    if site is not None and direction is not None:
        vector = direction.to(opened.model.device, torch.float32)[None]
        interventions = [Intervention(site, vector, 1.0, "project_out")]
    with steer(opened.model, interventions), fast_linear(opened.model):
        return torch.cat([-sequence_log_probs(opened.model, batch).double().cpu() for batch in texts.batches])


def _words(opened: LoadedModel, ids: Sequence[int]) -> str:
    """Tokens in one line, spaces and line breaks made visible."""
    texts = [str(opened.tokenizer.decode([i])) for i in ids]
    return " ".join(text.replace(" ", "␣").replace("\n", "↵") or "(nothing)" for text in texts)


def traces_section(table: pd.DataFrame) -> Section:
    """The section ``traces``."""
    panels: list[Panel] = [_draw_share, *(partial(_draw_change, text=text) for text in TEXTS)]
    figure, sentences = draw_panels(panels, table, panel_height_cm=4.8)
    n_first = int(table["n_first"].iloc[0])
    last = _tested(table, TEXTS[1]).iloc[-1]
    return Section(
        name=NAME,
        question="Does the change show in text that has nothing to do with the preference?",
        claim="Minder et al. (arXiv 2510.13900): narrow fine-tuning leaves a constant bias in the first tokens of any text, which "
        "says what was trained on.",
        sentences=sentences,
        interval="95\u00a0%, over texts, by the jackknife; of random differences, the interval that a further one lies in.",
        limits=[
            "That the tokens mean something: a logit lens in early layers reads states in a basis that is not theirs.",
            "A trace that is not constant over texts.",
        ],
        figure=figure,
        table=table,
        reading=[
            f"δ: aligned less base states at the first {n_first} tokens of unrelated text, BOS not counted. Share constant: "
            "‖mean δ‖² ÷ mean ‖δ‖².",
            "Tokens: the unembedding of the mean δ, behind the final norm’s weights where the site is in front of it.",
            "Change of cross-entropy: of the aligned model when the mean δ is projected out of its states at every token. Grey: "
            "the same with differences of two of the base’s own states, of different texts.",
        ],
        headlines=[
            Headline(
                as_text(last["ce_change_chosen"], "+.3f"),
                "nats a token of chosen responses that the aligned model loses without the constant trace",
                f"{site_name(last['site'])}; random differences {as_text(last['random_mean_chosen'], '+.3f')}; "
                f"{last['verdict_chosen']}. {NAME}.csv, column ce_change_chosen.",
            )
        ],
        shown=_shown(table),
        caption="Tokens that the mean change of unrelated text points to, and away from (␣ a space, ↵ a line break)",
    )


def _tested(table: pd.DataFrame, text: str) -> pd.DataFrame:
    return table[table[f"ce_change_{text}"].notna()]


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    said = [
        (site_name(row["site"]), as_text(row["constant_share"], "percent"), row["tokens_up"], row["tokens_down"])
        for _, row in table.iterrows()
    ]
    return pd.DataFrame(said, columns=["site", "constant", "more likely", "less likely"])


def _draw_share(axes: Axes, table: pd.DataFrame) -> str:
    sites = table["site"].tolist()
    prepare_sites(axes, sites)
    shade_sites(axes, sites, table["constant_share_low"], table["constant_share_high"], colour=COLOURS["policy"])
    labels = plot_curves(axes, table, [Curve("constant_share", "constant", "-", COLOURS["policy"])])
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of ‖δ‖²")
    finish_sites(axes, sites, labels)
    return (
        f"In unrelated text {extremes(sites, table['constant_share'], 'percent')} of the change is one constant shift"
    )


def _draw_change(axes: Axes, table: pd.DataFrame, *, text: str) -> str:
    rows = _tested(table, text)
    at = range(len(rows))
    low, high = rows[f"random_low_{text}"], rows[f"random_high_{text}"]
    axes.vlines(at, low, high, colors=COLOURS["null"], linewidth=6, alpha=0.6)
    axes.vlines(
        at, rows[f"ce_change_{text}_low"], rows[f"ce_change_{text}_high"], colors=COLOURS["policy"], linewidth=0.8
    )
    axes.plot(at, rows[f"ce_change_{text}"], color=COLOURS["policy"], marker="o", markersize=3, linestyle="")
    mark_level(axes, 0.0)
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_xticks(at, [tick_name(site, of=list(rows["site"])) for site in rows["site"]])
    axes.set_xlabel(SITES_LABEL)
    axes.set_ylabel("Δ cross-entropy, nats")
    last = rows.iloc[-1]
    value, mean = (as_text(last[f"{name}_{text}"], "+.3f") for name in ("ce_change", "random_mean"))
    what = "unrelated text" if text == TEXTS[0] else "chosen responses"
    return f"Taking it out costs {what} {value} nats a token, random differences {mean} (at {site_name(last['site'])})"
