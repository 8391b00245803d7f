"""Is the update one vector, or a function of the state? Control C17: models of δ scored on prompts that they have not seen.

R² = 1 − Σ‖δ − δ̂‖² / Σ‖δ‖²          "one vector" fails where an affine function of h_0 is well above a constant
"""

from collections.abc import Sequence
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from analysis.contract import Cost
from analysis.open.checkpoints import Checkpoints
from analysis.open.observations import site_name
from analysis.report.page import Headline, Section
from analysis.report.site_axes import as_text, draw_panels
from analysis.report.style import COLOURS
from analysis.steering.directions import READ_POSITIONS, States
from analysis.steering.sweep import check_options, swept_sites
from tiltmeter.errors import UserError
from tiltmeter.geometry.update_models import UpdateModels
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.states.positions import Position

NAME = "update_models"
MOST_GAINED = 0.05
"""R² that an affine function may add to a constant while "one vector" still holds (CLAIMS.md, K3)."""
_LOOKS = (("policy_dark", "o"), ("policy", "s"), ("policy_light", "^"), ("base", "D"))


class UpdateModelsControl:
    """Options of the control.

    Args:
        sites: a site, several, or ``all``; null: after the middle block, and before and after the final norm.
        positions: where states are read (:mod:`tiltmeter.states.positions`).
        n_folds: parts of the prompts, each held out once.
        ranks: k of the models of rank k.
        seed: of which prompts are together in a part.
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        sites: str | Sequence[str] | None = None,
        positions: Sequence[Position] = ("prompt_last", "content"),
        n_folds: int = 5,
        ranks: Sequence[int] = (1, 2, 4, 8),
        seed: int = 0,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        least = {"n_folds": (n_folds, 3), "seed": (seed, 0), "ranks": (min(ranks, default=0), 1)}
        wrong = next((p for p in positions if p not in READ_POSITIONS), READ_POSITIONS[0])
        check_options(NAME, least, {"dtype": (dtype, DTYPES), "positions": (wrong, READ_POSITIONS)})
        self.sites, self.positions, self.n_folds = sites, list(positions), n_folds
        self.ranks, self.seed, self.dtype, self.device = list(ranks), seed, dtype, device

    def table(self, checkpoints: Checkpoints) -> pd.DataFrame:
        """A row for each site, position and model of the update.

        Raises:
            UserError: an unknown site, models that don't differ there, or too few prompts.
        """
        sites = self._sites(checkpoints)
        states = States(checkpoints, checkpoints.pairs, sites, position=self.positions[0], others=self.positions[1:])
        return pd.DataFrame(
            [row for position in self.positions for site in sites for row in self._rows(states, site, position)]
        )

    def costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """One pass of each model over the pairs."""
        self._sites(checkpoints)
        return [Cost("hidden states", 2.0, 2 * sum(pair.n_row_tokens for pair in checkpoints.pairs))]

    def _sites(self, checkpoints: Checkpoints) -> Sequence[str]:
        n_layers = checkpoints.base.model.config.num_hidden_layers
        return swept_sites(self.sites, n_layers)

    def _rows(self, states: States, site: str, position: Position) -> list[dict[str, object]]:
        base, policy = states.rows(site, position)
        models = UpdateModels(base.shape[1], n_folds=self.n_folds, seed=self.seed)
        try:
            models.update(base, policy, states.groups(site, position))
            scores = models.scores(ranks=self.ranks)
        except ValueError as error:
            raise UserError(f"pairs: {site}, {position}: {error}; ask about more pairs with pairs.n_pairs") from error
        constant = next(score.r_squared for score in scores if score.model == "constant")
        known = {"site": site, "position": position, "n": len(base)}
        return [
            known
            | {"model": score.model, "r_squared": score.r_squared, "gained": score.r_squared - constant}
            | {"lowest_fold": min(score.by_fold), "highest_fold": max(score.by_fold)}
            for score in scores
        ]


def update_models_section(table: pd.DataFrame) -> Section:
    """The section ``update_models``.

    Args:
        table: a row for each site, position and model.
    """
    positions = list(dict.fromkeys(table["position"]))
    panels = [partial(_draw, position=position) for position in positions]
    figure, sentences = draw_panels(panels, table, panel_height_cm=5.8)
    affine = table[table["model"] == "affine"]
    n_one = int((affine["gained"] <= MOST_GAINED).sum())
    most = affine.loc[affine["gained"].idxmax()] if affine["gained"].notna().any() else affine.iloc[0]
    return Section(
        name=NAME,
        question="Is the update one vector, or a function of the state?",
        claim="D-STEER: DPO’s update is a constant shift. Then no function of the base’s state predicts it better than its mean.",
        sentences=sentences,
        interval=f"Affine less constant, most at {site_name(most['site'])}, {most['position']}: {as_text(most['gained'], '+.2f')}; "
        f"affine from {as_text(most['lowest_fold'], '.2f')} to {as_text(most['highest_fold'], '.2f')} over the parts of the "
        "prompts that were held out.",
        limits=[
            "Functions of the state that are not affine: where a constant is beaten by none of these, another may beat it.",
            "What steering with the models would do: an update that is well predicted in the mean square may matter little.",
        ],
        figure=figure,
        table=table,
        reading=[
            "R² = 1 − Σ‖δ − δ̂‖² / Σ‖δ‖² over held-out prompts, about zero, so that a constant has one as well: its cross-validated "
            "share of the update. Below 0: worse than no update.",
            "constant: v*. scaled: v* times an affine function of the base’s state. rank_k: reduced-rank regression. affine: ridge "
            "regression. own_mean and own_rank_k know the answer and keep its share along v* or in k fixed directions: what one or "
            "k directions could reach at most.",
            f"“One vector” is taken to fail where affine is more than {MOST_GAINED} above constant.",
        ],
        headlines=[
            Headline(
                f"{n_one} of {len(affine)}",
                "sites and positions where the update is no affine function of the state",
                f"R² of affine at most {MOST_GAINED} above that of a constant, on held-out prompts. {NAME}.csv.",
            )
        ],
    )


def _draw(axes: Axes, table: pd.DataFrame, position: str) -> str:
    table = table[table["position"] == position]
    sites, models = (list(dict.fromkeys(table[column])) for column in ("site", "model"))
    for i, site in enumerate(sites):
        rows = table[table["site"] == site].set_index("model").loc[models]
        colour, mark = _LOOKS[i % len(_LOOKS)]
        at = [x + 0.12 * (i - (len(sites) - 1) / 2) for x in range(len(models))]
        axes.vlines(at, rows["lowest_fold"].clip(lower=-1), rows["highest_fold"], colors=COLOURS[colour], linewidth=0.6)
        axes.plot(
            at,
            rows["r_squared"].clip(lower=-1),
            linestyle="",
            marker=mark,
            markersize=3,
            color=COLOURS[colour],
            label=site_name(site),
        )
    axes.set_ylim(min(-0.05, *axes.get_ylim()), 1.45)
    axes.set_yticks([0.0, 0.5, 1.0])
    axes.set_xticks(
        range(len(models)), [model.replace("_", " ") for model in models], rotation=60, ha="right", fontsize=6
    )
    axes.set_ylabel("R², held out")
    axes.legend(loc="upper center", frameon=False, fontsize=6, ncols=2)
    rows = table.set_index(["site", "model"])["r_squared"]
    best = max(sites, key=lambda site: rows[site, "affine"] - rows[site, "constant"])
    affine, constant = (as_text(rows[best, name], ".2f") for name in ("affine", "constant"))
    return (
        f"At {position} an affine function of the state explains {affine} of the update, a constant {constant} "
        f"({site_name(best)})"
    )
