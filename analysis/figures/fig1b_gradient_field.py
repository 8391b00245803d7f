"""Do the gradients of the preference loss point one way? Asked of a model at its own states (the paper's Fig. 1b).

Three readings of "one way", each beside what would be there anyhow: on a grid around one state, where the gradient of any
smooth function turns little; along the words of two responses; across pairs. The control: random words in place of the
preference's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from analysis.contract import Cost
from analysis.figures.fig1b_places import LEAST_PLACES, Kind, StateGradients, parting_places
from analysis.open.checkpoints import Checkpoints
from analysis.open.observations import site_name
from analysis.report.page import Headline, Section
from analysis.report.site_axes import (
    SITES_LABEL,
    as_text,
    finish_sites,
    last_value,
    plot_sites,
    prepare_sites,
    shade_sites,
)
from analysis.report.style import COLOURS, EndLabel, house_style, new_figure, set_titles
from analysis.steering.sweep import check_options
from tiltmeter.errors import UserError
from tiltmeter.geometry.consistency import shift_shares_of_gram
from tiltmeter.geometry.gradient_field import Context, FieldGrid, field_summary
from tiltmeter.geometry.rows import unit_rows
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.models.cpu_linear import fast_linear
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM, resolve_sites
from tiltmeter.stats.jackknife import COSINE, NO_INTERVAL, SHARE, Interval, jackknife_interval
from tiltmeter.stats.nulls import sign_flip_null

NAME = "gradient_field"
GRID, SEQUENCE, PAIRS = "grid", "sequence", "pairs"
"""Readings: around one state, along the words of two responses, one gradient a pair."""


class Picture(NamedTuple):
    """The field around one pair's state."""

    site: str
    is_tautology: bool
    grid: FieldGrid
    gradients: Float[Tensor, "point d_model"]
    random_resultant: float
    """R there of random words."""


class FieldTable(NamedTuple):
    """Gradients found, as a table."""

    summary: pd.DataFrame
    by_pair: pd.DataFrame
    pictures: Sequence[Picture]
    settings: Mapping[str, Any]


class GradientField:
    """Options of the field.

    Args:
        model: whose states: ``base``, where training starts, or ``aligned``, where it has ended.
        sites: a site, several, or ``all``.
        n_pairs: whose gradients are taken, at most.
        points_per_axis: of the cubic grid around each state.
        step: distance of neighbours on it, in standard deviations of the states along its axis.
        seed: of the random words.
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        model: Literal["base", "aligned"] = "base",
        sites: str | Sequence[str] = "all",
        n_pairs: int = 32,
        points_per_axis: int = 5,
        step: float = 0.5,
        seed: int = 0,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        least = {"n_pairs": (n_pairs, LEAST_PLACES), "points_per_axis": (points_per_axis, 2), "seed": (seed, 0)}
        check_options(NAME, least, {"model": (model, ("base", "aligned")), "dtype": (dtype, DTYPES)})
        if not 0 < step < float("inf"):
            raise UserError(f"gradient_field.step: expected a number above 0, got {step}")
        self.model, self.sites, self.n_pairs, self.seed = model, sites, n_pairs, seed
        self.points_per_axis, self.step, self.dtype, self.device = points_per_axis, step, dtype, device

    @property
    def asks_base_alone(self) -> bool:
        """Whether all runs of one base and the same pairs have the same answer."""
        return self.model == "base"

    def table(self, checkpoints: Checkpoints) -> "FieldTable":
        """Take all gradients.

        Raises:
            UserError: an unknown site, or too few pairs whose responses part.
        """
        field = _Field(self, checkpoints)
        by_pair = pd.DataFrame(list(field.rows()))
        return FieldTable(field.summary(by_pair), by_pair, field.pictures(by_pair), field.settings)

    def costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """Passes and tokens; those of gradients go back through the blocks as well."""
        places = parting_places(checkpoints.pairs, seed=self.seed)
        sites = resolve_sites(self.sites, checkpoints.base.model.config.num_hidden_layers)
        passes = len(get_args(Kind)) * len({*sites} - {FINAL_PRE_NORM, FINAL_POST_NORM})
        n_points = min(self.n_pairs, len(places)) * (self.points_per_axis**3 + 1)
        return [
            Cost("states", 2.0, 2 * sum(len(place.context) for place in places)),
            Cost("gradients", float(passes), passes * n_points),
        ]


class _Field:
    """The gradients that were asked for, and what they have in common."""

    def __init__(self, asked: GradientField, checkpoints: Checkpoints) -> None:
        self.asked = asked
        self.sites = resolve_sites(asked.sites, checkpoints.base.model.config.num_hidden_layers)
        places = parting_places(checkpoints.pairs, seed=asked.seed)
        self.taken = StateGradients(checkpoints, places, of=asked.model, sites=self.sites)
        self.places = places[: asked.n_pairs]
        self.groups = [place.pair.group for place in self.places]
        self._at_state: dict[tuple[str, Kind], list[Tensor]] = {}
        """∇L at the state of every place, by site and kind of words."""

    @property
    def settings(self) -> dict[str, Any]:
        """Sentences on how the figure was made."""
        asked = self.asked
        return {
            "model": asked.model,
            "n_pairs": len(self.places),
            "n_states": len(self.taken.places),
            "n_points": asked.points_per_axis**3,
            "reach": asked.step * (asked.points_per_axis - 1) / 2,
            "n_words": len({place.words["preference"] for place in self.places}),
            "d_model": self.taken.model.config.hidden_size,
            "tautologies": [site for site in self.sites if self.taken.is_tautology(site)],
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """Gradient of every pair: R on the grid, by site and kind of words; and along its responses."""
        for at, place in enumerate(self.places):
            pair = {"pair_id": place.pair.pair_id, "group": place.pair.group}
            with fast_linear(self.taken.model):
                context = Context(self.taken.model, place.context)
                for site in self.sites:
                    for kind in get_args(Kind):
                        grid = self._grid(at, site, kind)
                        points = torch.cat([self.taken.states[site][at][None].double(), grid.points])
                        gradients = self.taken.at_points(context, at, site, kind, points)
                        self._at_state.setdefault((site, kind), []).append(gradients[0])
                        yield pair | _row(GRID, site, kind, gradients[1:])
                yield pair | _row(SEQUENCE, FINAL_POST_NORM, "preference", self.taken.along_responses(at))

    def summary(self, by_pair: pd.DataFrame) -> pd.DataFrame:
        """A row for each reading, site and kind of words, with 95 % intervals over prompts; call after :meth:`rows`."""
        found = []
        for (reading, site, kind), rows in by_pair.groupby(["reading", "site", "words"], sort=False):
            known = rows.dropna(subset="mean_resultant")
            interval = NO_INTERVAL
            if len(known):
                r = torch.tensor(known["mean_resultant"].to_numpy(dtype=float), dtype=torch.float64)
                interval = _mean_of_lengths(r, known["group"].tolist())
            found.append(
                {"reading": reading, "site": site, "words": kind, "n_pairs": len(known)}
                | {"n_arrows": known["n_arrows"].mean()}
                | interval.named("mean_resultant")
                | {"null": known["null"].mean(), "smallest_cosine": known["smallest_cosine"].min()}
                | {"is_tautology": reading == GRID and self.taken.is_tautology(str(site))}
            )
        return pd.DataFrame(found + [self._across_pairs(site, kind) for site, kind in self._at_state])

    def pictures(self, by_pair: pd.DataFrame) -> list[Picture]:
        """Two fields to draw: at the last site, and where R on the grid is smallest; of the pair in the middle there."""
        grids = by_pair[(by_pair["reading"] == GRID) & (by_pair["words"] == "preference")]
        lowest = str(grids.groupby("site", sort=False)["mean_resultant"].mean().idxmin())
        order = grids[grids["site"] == lowest].sort_values("mean_resultant", kind="stable")["pair_id"].tolist()
        middle = order[len(order) // 2]
        at = [place.pair.pair_id for place in self.places].index(middle)
        random = by_pair[(by_pair["pair_id"] == middle) & (by_pair["words"] == "random")].set_index("site")
        found = []
        with fast_linear(self.taken.model):
            context = Context(self.taken.model, self.places[at].context)
            for site in dict.fromkeys([self.sites[-1], lowest]):
                grid = self._grid(at, site, "preference")
                gradients = self.taken.at_points(context, at, site, "preference", grid.points)
                control = float(random.loc[site, "mean_resultant"])
                found.append(Picture(site, self.taken.is_tautology(site), grid, gradients, control))
        return found

    def _grid(self, at: int, site: str, kind: Kind) -> FieldGrid:
        return self.taken.grid(at, site, kind, n=self.asked.points_per_axis, step=self.asked.step)

    def _across_pairs(self, site: str, kind: Kind) -> dict[str, Any]:
        """R of one gradient a pair, at its own state; and whether the update went where they point down to."""
        gradients = torch.stack(self._at_state[site, kind])
        kept = gradients.norm(dim=1) > 0
        groups = [group for group, there in zip(self.groups, kept.tolist(), strict=True) if there]
        unit = unit_rows(gradients[kept])
        updates = self.taken.updates[site][: len(kept)][kept]
        update_cosine = jackknife_interval(
            lambda w: torch.cosine_similarity(-w @ unit, w @ updates), groups, second_order=True, scale=COSINE
        )
        p_shuffled = sign_flip_null(unit, seed=self.asked.seed).p_value if len(unit) > 1 else math.nan
        return (
            {"reading": PAIRS, "site": site, "words": kind, "n_pairs": len(groups), "n_arrows": float(len(groups))}
            | resultant_interval(unit, groups).named("mean_resultant")
            | {"null": len(groups) ** -0.5, "p_shuffled": p_shuffled}
            | {"smallest_cosine": field_summary(gradients).smallest_cosine, "is_tautology": False}
            | update_cosine.named("update_cosine")
        )


def resultant_interval(unit: Float[Tensor, "row d_model"], clusters: Sequence[str]) -> Interval:
    """R = ‖mean ĝ‖ of N unit rows with a 95 % interval over clusters, that of R² = f of these rows.

    >>> round(resultant_interval(torch.eye(2, dtype=torch.float64), ["a", "b"]).value, 12)  # 1/√2
    0.707106781187
    """
    squares = jackknife_interval(shift_shares_of_gram(unit @ unit.T), clusters, second_order=True, scale=SHARE)
    return Interval(*map(math.sqrt, squares))


def _mean_of_lengths(r: Float[Tensor, " pair"], clusters: Sequence[str]) -> Interval:
    """Mean over pairs of R, each 0 … 1."""
    return jackknife_interval(lambda w: w @ r / w.sum(1), clusters, scale=COSINE)


def _row(reading: str, site: str, kind: Kind, gradients: Tensor) -> dict[str, Any]:
    found = field_summary(gradients)
    n = found.n_points
    return {
        "reading": reading,
        "site": site,
        "words": kind,
        "n_arrows": n,
        "mean_resultant": found.mean_resultant,
        "null": n**-0.5 if n else math.nan,
        "smallest_cosine": found.smallest_cosine,
    }


def gradient_field_section(found: FieldTable) -> Section:
    """The section ``gradient_field``, with the table ``gradient_field_pairs``."""
    table, by_pair, pictures, settings = found
    sites = list(dict.fromkeys(table[table["reading"] == GRID]["site"]))
    with house_style():
        figure, axes = new_figure(len(pictures) + 1, panel_height_cm=5.8)
        sentences = [draw_resultants(axes[0], table, sites)]
        sentences += [draw_field(panel, picture) for panel, picture in zip(axes[1:], pictures, strict=True)]
        set_titles(figure, axes, sentences)
    return Section(
        name=NAME,
        question="Do the gradients of the preference loss point one way?",
        claim="D-STEER, Fig. 1b: around a hidden state the gradients of DPO’s loss all point one way.",
        sentences=sentences,
        interval=_interval(table),
        limits=[
            "A preference direction, in R around one state: there it nears 1 for any smooth model and any words as the grid "
            "shrinks, and at the final norm’s output it is 1 by the formula.",
            "The gradient of the weights, which all tokens share, and the optimizer’s scaling of it: states need not move where L "
            "at h falls.",
            "Cause: that −∇L points along v* says that the update lowers the loss, not that it is nothing else.",
        ],
        figure=figure,
        table=table,
        reading=_reading(table, pictures, settings),
        headlines=[_headline(table)],
        shown=shown_table(table),
        caption="R by site, beside random words and noise; last: cosine of the mean −∇L with the mean update v*",
        more_tables={f"{NAME}_pairs": by_pair},
    )


def draw_field(axes: Axes, picture: Picture) -> str:
    """Unit arrows of −∇L, projected on (v̂, PC1), on the slice of the grid nearest to h."""
    coordinates = picture.grid.coordinates.numpy()
    drawn = coordinates[:, 2] == coordinates[np.abs(coordinates[:, 2]).argmin(), 2]
    arrows = -projected(picture).numpy()[drawn]
    x, y = coordinates[drawn, 0], coordinates[drawn, 1]
    reach, spacing = x.max(), np.diff(np.unique(x)).min()
    axes.set_xlim(-1.3 * reach, 1.6 * reach)
    axes.set_ylim(-1.35 * reach, 1.35 * reach)
    longest = np.linalg.norm(arrows, axis=1).max() * 2.9 * reach / (0.85 * spacing)  # of the distance to the next point
    axes.quiver(x, y, *arrows.T, scale_units="width", scale=longest, color=COLOURS["policy"], width=0.006)
    axes.scatter(x, y, s=3, color=COLOURS["base"], linewidths=0)
    axes.scatter([0], [0], s=22, facecolors="none", edgecolors=COLOURS["rejected"], linewidths=1.0, zorder=4)
    axes.annotate("h", (0, 0), (4, -9), textcoords="offset points", color=COLOURS["rejected"], weight="bold")
    axes.grid(visible=False)
    axes.set_xlabel("v̂, towards e(chosen) − e(rejected) (σ of the states)")
    axes.set_ylabel("PC1 of h without v (σ)")
    found = field_summary(picture.gradients)
    r, lowest, random = (
        as_text(x, ".3f") for x in (found.mean_resultant, found.smallest_cosine, picture.random_resultant)
    )
    if picture.is_tautology:
        return (
            f"At {site_name(picture.site)} R = {r}, a tautology: ∇L is parallel to v by the formula, whatever the model"
        )
    return (
        f"At {site_name(picture.site)}, where arrows turn most, R = {r} (smallest cosine {lowest}); random words in place of "
        f"the preference’s: {random}"
    )


def projected(picture: Picture) -> Float[Tensor, "point 2"]:
    """Components of the unit gradients on (v̂, PC1)."""
    unit = picture.gradients / picture.gradients.norm(dim=1, keepdim=True)
    found: Tensor = unit @ picture.grid.axes[:2].T
    return found


def draw_resultants(axes: Axes, table: pd.DataFrame, sites: Sequence[str]) -> str:
    """R over sites for grids and across pairs, of the preference's words and of random ones."""
    prepare_sites(axes, sites)
    axes.set_ylim(0, 1.05)
    across = _over(table, sites, PAIRS, "preference")
    shade_sites(axes, sites, 0.0, across["null"])
    labels = [EndLabel(float(across["null"].iloc[-1]) / 2, "noise", COLOURS["mark"])]
    for reading, colour, label in ((GRID, COLOURS["base"], "one state"), (PAIRS, COLOURS["policy"], "across pairs")):
        rows, control = (_over(table, sites, reading, words) for words in ("preference", "random"))
        plot_sites(axes, sites, control["mean_resultant"], style=":", colour=colour)
        plot_sites(axes, sites, rows["mean_resultant"], colour=colour)
        shade_sites(axes, sites, rows["mean_resultant_low"], rows["mean_resultant_high"], colour=colour)
        labels.append(EndLabel(last_value(rows["mean_resultant"]), label, colour))
    along = table[table["reading"] == SEQUENCE]["mean_resultant"]
    if sites[-1] == FINAL_POST_NORM:
        axes.plot([len(sites) - 1.0], along, "s", color=COLOURS["chosen"], markersize=3.0)
        labels.append(EndLabel(last_value(along), "in responses", COLOURS["chosen"]))
    axes.set_ylabel("mean resultant R")
    axes.text(0.02, 0.6, "dotted: random words", transform=axes.transAxes, color=COLOURS["mark"])
    axes.set_xlabel(SITES_LABEL)
    finish_sites(axes, sites, labels, room=0.28)
    around, around_random = (_range(_over(table, sites, GRID, words), ".3f") for words in ("preference", "random"))
    pairs, pairs_random = (_range(_over(table, sites, PAIRS, words)) for words in ("preference", "random"))
    return (
        f"Around one state R is {around}, for random words {around_random}; across pairs it is {pairs} "
        f"(random words {pairs_random}; noise {as_text(across['null'].iloc[0], '.2f')})"
    )


def shown_table(table: pd.DataFrame) -> pd.DataFrame:
    """The table for the page, as text: random words beside the preference's."""
    names = {GRID: "around one state", PAIRS: "across pairs", SEQUENCE: "along responses"}
    control = table[table["words"] == "random"].set_index(["reading", "site"])["mean_resultant"]
    lines = []
    for row in table[table["words"] == "preference"].to_dict("records"):
        cosine = row["update_cosine"]
        interval = f" ({as_text(row['update_cosine_low'], '.2f')} … {as_text(row['update_cosine_high'], '.2f')})"
        lines.append(
            {
                "gradients": names[row["reading"]],
                "site": site_name(row["site"]),
                "R": as_text(row["mean_resultant"], ".3f") + (" (tautology)" if row["is_tautology"] else ""),
                "95 % interval": f"{as_text(row['mean_resultant_low'], '.3f')} … {as_text(row['mean_resultant_high'], '.3f')}",
                "random words": as_text(control.get((row["reading"], row["site"]), float("nan")), ".3f").replace(
                    "nan", "–"
                ),
                "noise": as_text(row["null"], ".3f"),
                "p, labels shuffled": "–" if pd.isna(row["p_shuffled"]) else as_text(row["p_shuffled"], ".3f"),
                "smallest cosine": as_text(row["smallest_cosine"], ".3f"),
                "cosine with v*": "–" if cosine != cosine else as_text(cosine, ".2f") + interval,
            }
        )
    return pd.DataFrame(lines)


def _over(table: pd.DataFrame, sites: Sequence[str], reading: str, words: str) -> pd.DataFrame:
    """A reading's rows, one a site, in the order of the forward pass."""
    rows = table[(table["reading"] == reading) & (table["words"] == words)]
    return rows.set_index("site").loc[list(sites)].reset_index()


def _range(rows: pd.DataFrame, form: str = ".2f") -> str:
    """R over sites where it is no tautology, from least to largest, as text."""
    known = rows[~rows["is_tautology"].astype(bool)]["mean_resultant"]
    low, high = as_text(known.min(), form), as_text(known.max(), form)
    return low if low == high else f"{low} to {high}"


def _headline(table: pd.DataFrame) -> Headline:
    across = table[table["reading"] == PAIRS]
    rows, control = (across[across["words"] == words] for words in ("preference", "random"))
    return Headline(
        _range(rows),
        "R of the loss’s gradients across pairs, over sites",
        f"noise {as_text(rows['null'].iloc[0], '.2f')}, random words {_range(control)}; 1: all point one way. {NAME}.csv.",
    )


def _interval(table: pd.DataFrame) -> str:
    rows = table[(table["reading"] == PAIRS) & (table["words"] == "preference")]
    row = rows.iloc[-1]
    value, low, high = (as_text(row[f"mean_resultant{end}"], ".2f") for end in ("", "_low", "_high"))
    return (
        f"R across pairs at {site_name(row['site'])} is {value} (95\u00a0% CI {low} … {high}), {row['n_pairs']} pairs, prompts "
        f"left out one at a time; noise alone: {as_text(row['null'], '.2f')}. Bands: the same at every site; around one state of "
        "the mean over pairs."
    )


def _reading(table: pd.DataFrame, pictures: Sequence[Picture], settings: Mapping[str, Any]) -> list[str]:
    shares = [as_text(float(projected(p).square().sum(1).mean()), "percent") for p in pictures]
    n, reach = settings["n_pairs"], f"{settings['reach']:g}"
    lines = [
        f"h: states of the {settings['model']} model where a pair’s responses part; L = −log σ(β m), m the log-odds of its two "
        "words, less the base’s. R = ‖mean ĝ‖ over unit gradients ĝ: 1 if all point one way, about 1/√n for n arrows of noise.",
        f"Arrows: −∇L (where a step down leads) of one pair, at unit length, on v̂ and PC1: {' and '.join(shares)} of their squared "
        f"length. Grid: {settings['n_points']} points up to {reach} σ from h on v̂, PC1, PC2 of {settings['n_states']} states.",
        "A tautology: for one pair of words at the final norm’s output ∇L = −β σ(−β m) v, so R = 1 for any model, trained or not; "
        "the program asserts it.",
        "Around one state R is near 1 wherever the layers above are smooth on the grid, and nears 1 as the grid shrinks. Dotted: "
        "the same for two random words of the responses; what they do too is no evidence of a preference direction.",
        f"The finding is R across pairs: one gradient for each of {n} pairs ({settings['n_words']} different pairs of words), "
        "beside random words and, grey, 1/√N, what shuffled labels leave; p_shuffled: that of R among 1,000 draws of them. Pairs "
        "with the same two words agree at the last site by construction.",
        "In responses: gradients of the whole pair’s loss at each state that predicts a word; chosen and rejected words pull "
        "against each other, so R is small. Shown: the mean over pairs.",
        "cosine with v*: of −(mean ĝ over pairs) with the mean update of the same states; above 0, training moved states down the "
        f"common gradient. A random direction: 0 ± {as_text(settings['d_model'] ** -0.5, '.2f')}.",
    ]
    if not settings["tautologies"] and FINAL_POST_NORM in set(table["site"]):
        lines[2] = (
            "At the final norm’s output R = 1 would be a tautology, but this model’s logits have a soft cap, which bends the field."
        )
    return lines
