"""Is the update of low rank in the weights, too? By matrix and layer; and what behaviour is left when it is cut to a few ranks."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor

from analysis.contract import Cost
from analysis.open.adapters import CONFIG
from analysis.open.checkpoints import Checkpoints
from analysis.open.models import LoadedModel
from analysis.open.observed import Tables
from analysis.open.pair_log_probs import sums_of_pairs, tokens_of_pairs
from analysis.report.page import Headline, Section
from analysis.report.site_axes import as_text, span
from analysis.report.style import COLOURS, EndLabel, house_style, label_ends, new_figure, set_titles
from analysis.steering.directions import READ_POSITIONS, States
from analysis.steering.sweep import check_options
from tiltmeter.errors import UserError
from tiltmeter.geometry.rows import row_geometry
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.models.layers import decoder_blocks, layer_site
from tiltmeter.states.positions import Position
from tiltmeter.stats.jackknife import NO_INTERVAL, Interval, jackknife_interval
from tiltmeter.stats.proportions import share_interval
from tiltmeter.weights.changes import RANKS, SVD, changed_mask, leading_svd, mask_overlap, mean_share, weight_change
from tiltmeter.weights.stored import AdaptedWeights, StoredWeights, check_same_form

NAME = "weights"
WHOLE = "whole"
_BLUE, _NAVY, _GREY = COLOURS["policy"], COLOURS["policy_dark"], COLOURS["mark"]


class Weights:
    """Options of the analysis.

    Args:
        n_components: leading singular directions of each matrix whose angles are told; of large matrices also the values.
        ranks: that every ΔW is cut to, for the behaviour that is left; none: no model is asked again.
        other: folder of another run's aligned model of the same base; its changed entries are held against these.
        positions: where the states beside the weights are read.
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        n_components: int = 16,
        ranks: Sequence[int] = RANKS,
        other: str | None = None,
        positions: Sequence[Position] = ("prompt_last", "content"),
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        least = {"n_components": (n_components, 1), "ranks": (min(ranks, default=1), 1)}
        wrong = next((p for p in positions if p not in READ_POSITIONS), READ_POSITIONS[0])
        check_options(NAME, least, {"dtype": (dtype, DTYPES), "positions": (wrong, READ_POSITIONS)})
        self.n_components, self.ranks, self.other = n_components, sorted(ranks), other
        self.positions, self.dtype, self.device = list(positions), dtype, device

    def costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """Passes over the pairs: two for states, one for each model that is asked."""
        n = sum(pair.n_row_tokens for pair in checkpoints.pairs)
        asked = len(self.ranks) + 2 if self.ranks else 0
        return [Cost("hidden states", 2.0, 2 * n), Cost("cut updates", float(asked), asked * n)]

    def table(self, checkpoints: Checkpoints) -> Tables:
        """``weights``: a row a matrix; ``weights_by_layer``: a row a layer; ``weights_cut``: a row a rank.

        Raises:
            UserError: weights of different forms or shapes, quantised ones, or another run's that can't be read.
        """
        base, policy = both_weights(checkpoints)
        other = None if self.other is None else StoredWeights(Path(self.other))
        for found in (policy, other):
            if found is not None:
                check_same_form(base, found)
        places = places_of(checkpoints.base)
        updates: dict[str, Tensor | SVD] = {}
        rows: list[dict[str, object]] = []
        for name in base:
            before, after = _of_one_shape(name, base[name], policy[name])
            if before.ndim < 2:
                updates[name] = after.float() - before.float()
                continue
            before, after = before.flatten(1), after.flatten(1)
            update = leading_svd(after.float() - before.float(), max(self.n_components, *RANKS, *self.ranks))
            updates[name] = update
            row: dict[str, object] = {"matrix": name, "kind": name.split(".")[-2], "layer": places.get(name, math.nan)}
            row |= {"rows": len(before), "columns": before.shape[1]}
            row |= _figures(before, after, self.n_components, update)
            if other is not None:
                masks = mask_overlap(changed_mask(before, after), changed_mask(before, other[name].flatten(1)))
                row |= {"mask_overlap": masks.overlap, "mask_chance": masks.chance}
            rows.append(row)
        table = pd.DataFrame(rows)
        layers = by_layer(table).merge(self._states(checkpoints), on="layer", how="left")
        cut = pd.DataFrame(cut_rows(checkpoints, updates, self.ranks) if self.ranks else [])
        return {NAME: table, f"{NAME}_by_layer": layers} | ({f"{NAME}_cut": cut} if self.ranks else {})

    def _states(self, checkpoints: Checkpoints) -> pd.DataFrame:
        """ρ₁ of ΔH after every block, raw and centred, a column a position."""
        n_layers = checkpoints.base.model.config.num_hidden_layers
        sites = [layer_site(i) for i in range(n_layers)]
        states = States(checkpoints, checkpoints.pairs, sites, position=self.positions[0], others=self.positions[1:])
        rows = []
        for layer, site in enumerate(sites):
            row: dict[str, float] = {"layer": float(layer)}
            for position in self.positions:
                before, after = states.rows(site, position)
                update = after.double() - before.double()
                for variant, end in (("raw", ""), ("centred", "_centred")):
                    has = len(update) > 1 and bool(update.any())
                    energy = row_geometry(update, variant).spectrum.top1_energy if has else math.nan  # type: ignore[arg-type]
                    row[f"states_top1_energy_{position}{end}"] = energy
            rows.append(row)
        return pd.DataFrame(rows)


def both_weights(checkpoints: Checkpoints) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Weights of both models as they are stored, read one by one; of models of the hub or of another form, as they were opened."""
    known = dict(checkpoints.base.model.named_parameters(remove_duplicate=False))
    base, policy = (Path(source) for source in checkpoints.sources or ("", ""))
    if checkpoints.sources and base.is_dir() and policy.is_dir():
        before = StoredWeights(base)
        after = AdaptedWeights(before, policy) if (policy / CONFIG).is_file() else StoredWeights(policy)
        if {*before} <= {*known}:
            return before, after
    opened = [dict(each.model.named_parameters()) for each in (checkpoints.base, checkpoints.aligned)]
    return opened[0], opened[1]


def places_of(opened: LoadedModel) -> dict[str, int]:
    """Block of each parameter, by the model's own modules."""
    names = {id(parameter): name for name, parameter in opened.model.named_parameters()}
    blocks = enumerate(decoder_blocks(opened.model))
    return {names[id(parameter)]: layer for layer, block in blocks for parameter in block.parameters()}


def by_layer(table: pd.DataFrame) -> pd.DataFrame:
    """Shares of all entries of a block that changed, and means over its matrices that did; energies also least and largest."""
    rows = []
    for layer, part in table.dropna(subset="layer").groupby("layer"):
        sizes = (part["rows"] * part["columns"]).tolist()
        row = {"layer": layer, "changed_share": mean_share(list(zip(part["changed_share"], sizes, strict=True)))}
        for name in (
            "energy_1",
            "energy_16",
            "stable_rank",
            "rank_share",
            "spectral_drift",
            "angle_left",
            "angle_right",
        ):
            row[name] = part[name].mean()
        rows.append(row | {"energy_1_low": part["energy_1"].min(), "energy_1_high": part["energy_1"].max()})
    return pd.DataFrame(rows)


def cut_rows(
    checkpoints: Checkpoints, updates: Mapping[str, Tensor | SVD], ranks: Sequence[int]
) -> Iterator[dict[str, object]]:
    """Held-out pairs under the base with every ΔW cut to a rank, a row each, and under the aligned model.

    ``margin``: mean of Δlog π(chosen) − Δlog π(rejected), nats; ``kept``: it over that of the whole update. Vectors (norms,
    biases) keep their whole change.
    """
    groups = [pair.group for pair in checkpoints.pairs]
    before, after = (sums_of_pairs(said) for said in checkpoints.token_log_probs)
    whole = (after - before) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    model = copy.deepcopy(checkpoints.base.model)
    opened = LoadedModel(model, checkpoints.base.tokenizer)
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for rank in ranks:
        for name, parameter in model.named_parameters():
            if (update := updates.get(name)) is None:
                continue
            delta = update.truncated(rank).reshape(own[name].shape) if isinstance(update, SVD) else update
            parameter.data = own[name] + delta.to(own[name])
        found = sums_of_pairs(tokens_of_pairs(opened, [pair.ids for pair in checkpoints.pairs]))
        margins = (found - before) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
        yield _cut_row(str(rank), margins, whole, groups)
    yield _cut_row(WHOLE, whole, whole, groups)


def _cut_row(rank: str, margins: Tensor, whole: Tensor, groups: Sequence[str]) -> dict[str, object]:
    right = [0.5 if m == 0 else float(m > 0) for m in margins.tolist()]
    kept: Interval = NO_INTERVAL
    if float(whole.sum()) != 0:
        kept = jackknife_interval(lambda w: (w @ margins) / (w @ whole), groups)
    row: dict[str, object] = {"rank": rank, "n_pairs": len(groups), "margin": float(margins.mean())}
    return row | kept.named("kept") | share_interval(right, groups).named("accuracy")


def _of_one_shape(name: str, base: Tensor, policy: Tensor) -> tuple[Tensor, Tensor]:
    if base.shape != policy.shape:
        raise UserError(
            f"weights: {name} is of shape {tuple(base.shape)} in the base and {tuple(policy.shape)} in the aligned model"
        )
    return base.detach().cpu(), policy.detach().cpu()


def _figures(base: Tensor, policy: Tensor, k: int, update: SVD) -> dict[str, float]:
    found = weight_change(base, policy, k=k, update=update)
    names = ("changed_share", "relative_norm", "spectral_drift", "numerical_rank", "stable_rank")
    figures = {name: float(getattr(found, name)) for name in names}
    figures["rank_share"] = found.numerical_rank / min(base.shape)
    figures |= {f"energy_{rank}": energy for rank, energy in zip(RANKS, found.energies, strict=True)}
    angles = {name: math.degrees(getattr(found, name)) for name in ("angle_left", "angle_right")}
    return figures | angles | {"n_singular_values": found.n_values}


def weights_section(tables: Tables) -> Section:
    """The section ``weights``, of what :meth:`Weights.table` made."""
    table, layers, cut = tables[NAME], tables[f"{NAME}_by_layer"], tables.get(f"{NAME}_cut")
    with house_style():
        figure, axes = new_figure(2 if cut is None else 3, panel_height_cm=5.8)
        sentences = [draw_energies(axes[0], layers), draw_changed(axes[1], layers, table)]
        if cut is not None:
            sentences.append(draw_cut(axes[2], cut))
        set_titles(figure, axes, sentences)
    return Section(
        name=NAME,
        question="Is the update of low rank in the weights, too?",
        claim="D-STEER: DPO is a low-rank update. In hidden states it may be; of the weights that does not follow.",
        sentences=sentences,
        interval=_interval(cut),
        limits=[
            "Which weights matter: a matrix may change much and do little, and the other way round.",
            "Causes: that few entries change in bfloat16 is as well a matter of small learning rates and of rounding.",
            "Text: behaviour is the preference on held-out pairs, not what is written.",
        ],
        figure=figure,
        table=table,
        reading=_reading(table),
        headlines=_headlines(layers, cut),
        shown=_shown(layers),
        caption="By layer: share of changed entries, means over its matrices",
        more_tables={name: found for name, found in tables.items() if name != NAME},
    )


def draw_energies(axes: Axes, layers: pd.DataFrame) -> str:
    """ρ₁ of the states' update beside the energy of the first singular value of the weights' update."""
    x = layers["layer"].to_numpy()
    axes.fill_between(x, layers["energy_1_low"], layers["energy_1_high"], color=_NAVY, alpha=0.2, linewidth=0)
    states = [name for name in layers if name.startswith("states_") and not name.endswith("_centred")]
    labels, looks = [], (("-", _BLUE), ("--", _BLUE), (":", _BLUE))
    for name, (style, colour) in zip(states, looks, strict=False):
        axes.plot(x, layers[name], style, color=colour, marker="o", markersize=2.5)
        word = name.removeprefix("states_top1_energy_").replace("prompt_last", "prompt’s last")
        labels.append(EndLabel(float(layers[name].iloc[-1]), f"ΔH, {word}", colour))
    axes.plot(x, layers["energy_1"], color=_NAVY, marker="o", markersize=2.5)
    labels.append(EndLabel(float(layers["energy_1"].iloc[-1]), "ΔW", _NAVY))
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("energy along the first\nsingular direction")
    axes.set_xlabel("block")
    label_ends(axes, [label for label in labels if math.isfinite(label.y)], room=0.36)
    of_states = f"{span(layers[states[0]], 'percent')} of the states’ update lies along one direction" if states else ""
    return f"{of_states}, but {span(layers['energy_1'], 'percent')} of the weights’ (mean over a block’s matrices)"


def draw_changed(axes: Axes, layers: pd.DataFrame, table: pd.DataFrame) -> str:
    """Share of entries that changed in bfloat16, and the numerical rank as a share of what is possible."""
    x = layers["layer"].to_numpy()
    axes.plot(x, layers["changed_share"], color=_NAVY, marker="o", markersize=2.5)
    labels = [EndLabel(float(layers["changed_share"].iloc[-1]), "entries changed", _NAVY)]
    if layers["rank_share"].notna().any():
        axes.plot(x, layers["rank_share"], ":", color=_BLUE, marker="o", markersize=2.5)
        labels.append(EndLabel(float(layers["rank_share"].iloc[-1]), "numerical rank", _BLUE))
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("share of all possible")
    axes.set_xlabel("block")
    label_ends(axes, [label for label in labels if math.isfinite(label.y)], room=0.36)
    inside = table.dropna(subset="layer")
    rank = (
        f"; ΔW has {span(inside['rank_share'], 'percent')} of full numerical rank"
        if inside["rank_share"].notna().any()
        else ""
    )
    return (
        f"{span(layers['changed_share'], 'percent')} of a block’s weights changed as bfloat16 values{rank}, stable rank "
        f"{span(inside['stable_rank'], '.1f')}"
    )


def draw_cut(axes: Axes, cut: pd.DataFrame) -> str:
    """Margin and accuracy that are kept when every ΔW is cut to a rank."""
    x = np.arange(len(cut))
    errors = [cut["kept"] - cut["kept_low"], cut["kept_high"] - cut["kept"]]
    axes.errorbar(x, cut["kept"], errors, color=_NAVY, marker="o", markersize=3, linewidth=1.3, elinewidth=0.7)
    axes.plot(x, cut["accuracy"], "--", color=_BLUE, marker="s", markersize=2.5)
    axes.axhline(0.5, color=_GREY, linewidth=0.7, linestyle=(0, (4, 3)))
    axes.set_xlim(-0.3, len(cut) - 0.7)
    axes.set_ylim(min(-0.05, axes.get_ylim()[0]), max(1.1, axes.get_ylim()[1]))
    axes.set_ylabel("margin kept, accuracy")
    axes.set_xlabel("rank that every ΔW is cut to")
    axes.set_xticks(x, cut["rank"].tolist())
    last = cut.iloc[-1]
    labels = [EndLabel(float(last["kept"]), "margin kept", _NAVY), EndLabel(float(last["accuracy"]), "accuracy", _BLUE)]
    label_ends(axes, [label for label in labels if math.isfinite(label.y)], room=0.3)
    said = [f"{as_text(row['kept'], 'percent')} at rank {row['rank']}" for _, row in cut.iloc[:-1].iterrows()]
    return f"Cut to a low rank, the update keeps of the preference margin {', '.join(said)}"


def _interval(cut: pd.DataFrame | None) -> str:
    if cut is None:
        return "None: weights are compared number by number, and no model was asked."
    row = cut.iloc[0]
    value, low, high = (as_text(row[f"kept{end}"], "percent") for end in ("", "_low", "_high"))
    return (
        f"Margin kept at rank {row['rank']}: {value}, 95 % CI {low} … {high} over the prompts of {row['n_pairs']} pairs. Figures "
        "of the weights are exact, and need none; those of large matrices are known to 1e-6."
    )


def _headlines(layers: pd.DataFrame, cut: pd.DataFrame | None) -> list[Headline]:
    states = next((name for name in layers if name.startswith("states_")), None)
    beside = f"ρ₁ of the states’ update {span(layers[states], '.2f')}; " if states else ""
    energy = Headline(
        as_text(float(layers["energy_1"].mean()), "percent"),
        "of ΔW along its first singular direction, mean over matrices",
        f"{beside}{NAME}_by_layer.csv, column energy_1.",
    )
    if cut is None:
        return [energy]
    row = cut.iloc[0]
    kept = Headline(
        as_text(row["kept"], "percent"),
        f"of the preference margin kept with every ΔW cut to rank {row['rank']}",
        f"accuracy {as_text(row['accuracy'], '.2f')}, whole update {as_text(cut.iloc[-1]['accuracy'], '.2f')}; {NAME}_cut.csv.",
    )
    return [energy, kept]


def _shown(layers: pd.DataFrame) -> pd.DataFrame:
    names = {
        "changed_share": "changed",
        "rank_share": "rank / full",
        "stable_rank": "stable rank",
        "energy_1": "σ₁² share",
    }
    names |= {
        "energy_16": "16 first",
        "spectral_drift": "drift",
        "angle_left": "angle left °",
        "angle_right": "right °",
    }
    forms = {"stable_rank": ".1f", "angle_left": ".1f", "angle_right": ".1f", "spectral_drift": ".4f"}
    shown = {"block": [str(int(layer)) for layer in layers["layer"]]}
    for column, heading in names.items():
        form = forms.get(column, ".3f")
        shown[heading] = ["–" if x != x else as_text(float(x), form) for x in layers[column]]
    return pd.DataFrame(shown)


def _reading(table: pd.DataFrame) -> list[str]:
    lines = [
        "ΔW = W of the aligned model less W of the base, matrix by matrix; ΔH: the change of the hidden states after a block, of "
        "all held-out pairs. Band: least and largest of a block’s matrices.",
        "Changed: entries whose bfloat16 values differ (arXiv 2505.11711). Numerical rank: singular values above "
        "max(m, n) · 1.2e-7 · σ₁. Stable rank: ‖ΔW‖²/σ₁². Drift: ‖σ(W′) − σ(W)‖/‖σ(W)‖. Angles: largest principal angle of the "
        "leading singular subspaces.",
        "Cut: the base with every ΔW replaced by its best approximation of that rank; norms and biases keep their whole change. "
        "Margin: log π/π₀ of chosen less rejected; accuracy: pairs with a margin above 0, ½ for 0 (dashed).",
    ]
    if (n := int((table["relative_norm"] == 0).sum())) == len(table):
        lines.append("No matrix differs between the two models: their ranks and angles have no number.")
    elif n:
        lines.append(f"{n} of {len(table)} matrices did not change and have no rank.")
    if table["n_singular_values"].max() < table[["rows", "columns"]].min(axis=1).max():
        lines.append(
            "Large matrices: drift is of the leading singular values; a numerical rank above their number has no number."
        )
    if "mask_overlap" in table:
        lines.append(
            f"Entries changed in the other run as well: {span(table['mask_overlap'], 'percent')}; by chance "
            f"{span(table['mask_chance'], 'percent')}."
        )
    return lines
