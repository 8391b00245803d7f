"""Control C16: the share of the way that one vector goes, that k directions go, and that the update itself goes; teacher-forced.

At every token that a token of a response is predicted from, the base's state is moved by v*, by the token's own update within k
directions, or by the whole of it: the oracle, which recovers everything at the final norm. v* and directions are of other prompts.
"""

from collections.abc import Sequence
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from analysis.contract import Cost
from analysis.open.checkpoints import Checkpoints
from analysis.open.laid_pairs import LaidPairs, lay_pairs
from analysis.open.observations import site_name
from analysis.report.page import Headline, Section
from analysis.report.site_axes import as_text, draw_panels
from analysis.report.style import COLOURS, mark_level
from analysis.steering.directions import States, split_by_prompt, v_star
from analysis.steering.sweep import check_options, swept_sites
from tiltmeter.geometry.directions import principal_directions
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.models.layers import site_depth
from tiltmeter.stats.jackknife import jackknife_intervals
from tiltmeter.steering.recovery import RecoveryMoments, restricted_updates
from tiltmeter.steering.sweep_logits import hidden_at, moved_logits, sweep_cost
from tiltmeter.steering.vector import V_STAR

NAME = "recovery_ladder"
ENOUGH = 0.8
"""R of one vector ÷ R of the oracle, below which "one vector" is refuted (METHOD.md)."""
_LOOKS = (("policy_dark", "o"), ("policy", "s"), ("policy_light", "^"), ("base", "D"))


class RecoveryLadder:
    """Options of the ladder.

    Args:
        sites: a site, several, or ``all``; null: after the middle block, and before and after the final norm.
        ranks: k of the steps in between; those above the number of directions that there are are left out.
        n_prompts: test pairs, and pairs that directions are estimated from, at most; null: all of each half.
        seed: of the split into halves.
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        sites: str | Sequence[str] | None = None,
        ranks: Sequence[int] = (1, 2, 4, 8, 32),
        n_prompts: int | None = 32,
        seed: int = 0,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        least = {"ranks": (min(ranks, default=0), 1), "n_prompts": (n_prompts, 1), "seed": (seed, 0)}
        check_options(NAME, least, {"dtype": (dtype, DTYPES)})
        self.sites, self.ranks, self.n_prompts = sites, sorted(set(ranks)), n_prompts
        self.seed, self.dtype, self.device = seed, dtype, device

    @torch.no_grad()
    def table(self, checkpoints: Checkpoints) -> pd.DataFrame:
        """A row for each site and step of the ladder.

        Raises:
            UserError: an unknown site, too few prompts, or models that don't differ at a site.
        """
        estimation, test = split_by_prompt(checkpoints.pairs, seed=self.seed)
        base, aligned = checkpoints.base.model, checkpoints.aligned.model
        fitted, laid = (lay_pairs(pairs[: self.n_prompts], aligned, device=base.device) for pairs in (estimation, test))
        states = States(checkpoints, estimation, self._sites(checkpoints), position="prompt_last")
        groups = [pair.group for pair in test[: self.n_prompts]]
        rows = []
        for site in states.sites:
            at_prompt = v_star(states, site)
            updates = torch.cat([updates_of(checkpoints, one, site).cpu() for one in fitted])
            n = min(max(self.ranks), *updates.shape)
            directions = principal_directions(updates, n, centred=False).directions
            ranks = [rank for rank in self.ranks if rank <= n]
            names = [V_STAR, "mean", *(f"rank_{rank}" for rank in ranks), "own"]
            moments = RecoveryMoments([1.0] * len(names), n_rows=len(groups))
            for one in laid:
                own = updates_of(checkpoints, one, site)
                ladder = restricted_updates(
                    own, updates.double().mean(0).to(own.device), directions.to(own.device), ranks
                )
                ladder = {V_STAR: at_prompt.to(own.device).expand(len(own), -1)} | ladder
                add_steps(moments, checkpoints, one, site, [ladder[name] for name in names])
            rows += rows_of_steps(moments, site, names, groups)
        return pd.DataFrame(rows)

    def costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """Passes of the pairs of both halves and their tokens."""
        n_layers = checkpoints.base.model.config.num_hidden_layers
        halves = split_by_prompt(checkpoints.pairs, seed=self.seed)
        n_tokens = sum(pair.n_row_tokens for half in halves for pair in half[: self.n_prompts])
        passes = sum(
            4 + sweep_cost(n_layers, min(site_depth(site, n_layers), n_layers - 1), len(self.ranks) + 3)
            for site in self._sites(checkpoints)
        )
        return [Cost("teacher-forced, at most", passes, round(passes * n_tokens))]

    def _sites(self, checkpoints: Checkpoints) -> Sequence[str]:
        n_layers = checkpoints.base.model.config.num_hidden_layers
        return swept_sites(self.sites, n_layers)


def updates_of(checkpoints: Checkpoints, laid: LaidPairs, site: str) -> Float[Tensor, "token d_model"]:
    """δ of every token that a token of a response is predicted from."""
    base, policy = (
        hidden_at(opened.model, laid.batch, site)[laid.predicting].double()
        for opened in (checkpoints.base, checkpoints.aligned)
    )
    return policy - base


def add_steps(
    moments: RecoveryMoments,
    checkpoints: Checkpoints,
    laid: LaidPairs,
    site: str,
    steps: Sequence[Float[Tensor, "token d_model"]],
) -> None:
    """Add what a batch recovers under each step of a ladder, which moves every token that :func:`updates_of` is of."""
    moves = []
    for step in steps:
        move = step.new_zeros(*laid.predicting.shape, step.shape[1])
        move[laid.predicting] = step
        moves.append(move)
    for part in moved_logits(checkpoints.base.model, laid.batch, site=site, moves=moves):
        chosen = laid.is_chosen[part.targets]
        goal = laid.goal_logits(checkpoints.aligned.model, part.targets[chosen])
        start, *steered = part.logits[:, chosen]
        moments.update(goal, start, steered, laid.pairs[part.targets[chosen]])


def rows_of_steps(
    moments: RecoveryMoments, site: str, names: Sequence[str], groups: Sequence[str]
) -> list[dict[str, object]]:
    """R of each step, and R as a share of the oracle's, which is the last step."""
    sums = moments.row_sums()

    def shares(drawn: Tensor) -> Tensor:
        found = 1 - (drawn @ sums.kl_steered.T) / (drawn @ sums.kl_start)[:, None]
        return found / found[:, -1:]

    of_own = jackknife_intervals(shares, groups)
    return [
        {
            "site": site,
            "step": name,
            **step.recovery.named("recovery"),
            **share.named("share_of_own"),
            "kl": step.kl.value,
            "n": step.n_rows,
        }
        for name, step, share in zip(names, moments.summary(groups).steered, of_own, strict=True)
    ]


def recovery_ladder_section(table: pd.DataFrame) -> Section:
    """The section ``recovery_ladder``.

    Args:
        table: a row for each site and step.
    """
    sites = list(dict.fromkeys(table["site"]))
    known = table.set_index(["site", "step"])
    figure, sentences = draw_panels([partial(_draw, sites=sites)], table, panel_height_cm=6.4)
    best = max(sites, key=lambda site: known["share_of_own"][site, V_STAR])
    share = known.loc[(best, V_STAR)]
    low, high = (as_text(share[f"share_of_own_{end}"], ".2f") for end in ("low", "high"))
    enough = sum(known["share_of_own"][site, V_STAR] >= ENOUGH for site in sites)
    return Section(
        name=NAME,
        question="How much of the way does one vector go, beside k directions and the update itself?",
        claim="D-STEER: DPO’s update is one vector. Then v* at every token recovers what each token’s own update does.",
        sentences=sentences,
        interval=f"R of v* ÷ R of the whole update at {site_name(best)}: {as_text(share['share_of_own'], '.2f')} ({low} … {high}), "
        "95\u00a0% over prompts.",
        limits=[
            "That no other vector goes further: v* is the mean, not the vector that recovers most.",
            "What happens in text that is generated: all tokens are given.",
        ],
        figure=figure,
        table=table,
        reading=[
            f"R = 1 − KL(aligned ‖ steered) / KL(aligned ‖ base) over the tokens of the chosen responses of "
            f"{int(table['n'].max())} pairs; v* and directions are of other prompts.",
            "v*: the mean change at the prompt’s last token, added at every token. mean: the mean change over tokens of responses. "
            "rank_k: each token’s own change within the k leading directions of such changes. own: all of it, which at the final "
            "norm’s output is the aligned model; below, what attention reads from the prompt stays the base’s.",
            f"Where v* reaches less than {ENOUGH} of what own does, one vector is not enough.",
        ],
        headlines=[
            Headline(
                f"{enough} of {len(sites)}",
                f"sites where v* recovers at least {ENOUGH} of what the update itself does",
                f"At best {as_text(share['share_of_own'], '.2f')}, {site_name(best)}. {NAME}.csv, column share_of_own.",
            )
        ],
    )


def _draw(axes: Axes, table: pd.DataFrame, sites: Sequence[str]) -> str:
    steps = list(dict.fromkeys(table["step"]))
    for i, site in enumerate(sites):
        rows = table[table["site"] == site]
        at = [steps.index(step) + 0.1 * (i - (len(sites) - 1) / 2) for step in rows["step"]]
        colour, mark = _LOOKS[i % len(_LOOKS)]
        low, high = (rows[f"recovery_{end}"].clip(lower=-1) for end in ("low", "high"))
        axes.vlines(at, low, high, colors=COLOURS[colour], linewidth=0.6)
        axes.plot(
            at,
            rows["recovery"].clip(lower=-1),
            marker=mark,
            markersize=3,
            linewidth=0.6,
            color=COLOURS[colour],
            label=site_name(site),
        )
    mark_level(axes, 1.0)
    axes.set_xticks(range(len(steps)), [step.replace("_", " ") for step in steps], rotation=45, ha="right", fontsize=6)
    axes.set_ylim(min(-0.1, *axes.get_ylim()), 1.6)
    axes.set_ylabel("recovery R")
    axes.legend(loc="upper center", frameon=False, fontsize=6, ncols=2)
    known = table.set_index(["site", "step"])["recovery"]
    best = max(sites, key=lambda site: known[site, V_STAR])
    one, own = (as_text(known[best, step], "percent") for step in (V_STAR, "own"))
    return f"One vector recovers {one} of the way, each token’s own update {own} ({site_name(best)})"
