"""Do the gradients of the preference loss point one way? Asked of a model at its own states (the paper's Fig. 1b).

Three readings of "one way", each beside what would be there anyhow: on a grid around one state, where the gradient of any
smooth function turns little; along the words of two responses; across pairs. The control: random words in place of the
preference's.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analysis.figures.fig1b_places import LEAST_PLACES, Kind, StateGradients, parting_places
from analysis.figures.fig1b_section import GRID, PAIRS, SEQUENCE, Picture, gradient_field_section
from analysis.open.checkpoints import Checkpoints
from analysis.report.costs import Cost
from analysis.report.page import Section
from tiltmeter.errors import UserError
from tiltmeter.geometry.consistency import shift_shares_of_gram
from tiltmeter.geometry.gradient_field import Context, FieldGrid, field_summary
from tiltmeter.geometry.rows import unit_rows
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.models.cpu_linear import fast_linear
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM, resolve_sites
from tiltmeter.stats.jackknife import COSINE, SHARE, Interval, jackknife_interval


class GradientField:
    """What to ask.

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
        for name, (value, lowest) in least.items():
            if value < lowest:
                raise UserError(f"gradient_field.{name}: expected at least {lowest}, got {value}")
        if not 0 < step < float("inf"):
            raise UserError(f"gradient_field.step: expected a number above 0, got {step}")
        if model not in ("base", "aligned"):
            raise UserError(f"gradient_field.model: expected base or aligned, got {model}")
        if dtype not in DTYPES:
            raise UserError(f"gradient_field.dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
        self.model, self.sites, self.n_pairs, self.seed = model, sites, n_pairs, seed
        self.points_per_axis, self.step, self.dtype, self.device = points_per_axis, step, dtype, device

    def section(self, checkpoints: Checkpoints) -> Section:
        """Take all gradients and draw them.

        Raises:
            UserError: an unknown site, or too few pairs whose responses part.
        """
        field = _Field(self, checkpoints)
        by_pair = pd.DataFrame(list(field.rows()))
        return gradient_field_section(field.summary(by_pair), by_pair, field.pictures(by_pair), field.settings)

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
        """What the section says of how it was made."""
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
        """Of every pair: R on the grid, by site and kind of words; and along its responses."""
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
            interval = Interval(*[math.nan] * 3)
            if len(known):
                r = torch.tensor(known["mean_resultant"].to_numpy(dtype=float), dtype=torch.float64)
                interval = _mean_of_lengths(r, known["group"].tolist())
            found.append(
                {"reading": reading, "site": site, "words": kind, "n_pairs": len(known)}
                | {"n_arrows": known["n_arrows"].mean()}
                | _named("mean_resultant", interval)
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
        return (
            {"reading": PAIRS, "site": site, "words": kind, "n_pairs": len(groups), "n_arrows": float(len(groups))}
            | _named("mean_resultant", resultant_interval(unit, groups))
            | {"null": len(groups) ** -0.5, "smallest_cosine": field_summary(gradients).smallest_cosine}
            | {"is_tautology": False}
            | _named(
                "update_cosine",
                jackknife_interval(
                    lambda w: torch.cosine_similarity(-w @ unit, w @ updates), groups, second_order=True, scale=COSINE
                ),
            )
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


def _named(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
