"""Sparse features that a preference is steered by (FSRL): which ones, of what kind, and what is lost without them.

Losses are teacher-forced, on held-out pairs, under the run's own loss. Sets of features are ablated (no longer steered) beside
random sets of features, as many or used as much; a label that is wrong with some probability is drawn anew with it.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from analysis.contract import Cost
from analysis.open.checkpoints import Checkpoints, check_same_base, checkpoints_of_run
from analysis.open.pair_log_probs import losses_of, sums_of_pairs
from analysis.open.runs import open_run
from analysis.report.coloured import ColouredPair
from analysis.sparse.ablation import sums_under
from analysis.sparse.bridge import (
    DECODED_FEATURES,
    Bridge,
    explained_by_features,
    steered_by_features,
)
from analysis.sparse.classes import (
    ALIGNMENT,
    ALIGNMENT_ATTRIBUTES,
    CLASSES,
    STYLE,
    FeatureClasses,
    classes_of_attributes,
    classes_of_file,
    classes_of_judge,
    has_planted,
)
from analysis.sparse.reading import FeatureReading
from analysis.steering.directions import split_by_prompt
from analysis.steering.sweep import check_options
from datamodules.synthetic_phrases import ATTRIBUTES
from tiltmeter.errors import Unsupported, UserError
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.scoring.scorer import Scorer
from tiltmeter.sparse.autoencoder import SparseAutoencoder
from tiltmeter.sparse.feature_sets import (
    matched_in_usage,
    most_used,
    random_sets,
    rank_overlap,
    relabelled,
)
from tiltmeter.sparse.files import load_sae
from tiltmeter.sparse.steering import SparseSteering, sparse_steering
from tiltmeter.stats.among_random import among_random
from tiltmeter.stats.jackknife import NO_INTERVAL, Interval, cluster_mean_interval, interval_without_each, without_each

NAME = "sparse_features"
NONE, BOTH, ALL = "none", "both", "all"
ABLATED = (NONE, ALIGNMENT, STYLE, BOTH, ALL)
"""Sets that are no longer steered: nothing, a class, both classes, every feature (which is the base)."""
MATCHED = ("usage", "size")
SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class FeatureTables(NamedTuple):
    """Everything that the section draws."""

    ablations: pd.DataFrame
    """A row for each set that is ablated, also for the features of each planted attribute; empty without a steering."""
    features: pd.DataFrame
    """A row for each feature."""
    top: pd.DataFrame
    """Share of the gain in loss that the features used most keep; empty without a steering."""
    bridge: Bridge | None
    """DPO's update in the same features; None: no DPO run was given."""
    about: Mapping[str, Any]
    coloured: Sequence[ColouredPair]


class SparseFeatures:
    """Options of the analysis.

    Args:
        sae: folder of an autoencoder, for an aligned model that is not steered by one.
        dpo: run folder of a DPO run of the same base, whose update is told in the same features; null: none.
        fsrl: run folder of a run steered by features, where the aligned model itself is DPO's; null: none.
        labels: CSV file of index, label (style, alignment, other) and explanation of every feature; null: planted attributes, or
            a judge.
        label_error: probability that a label of that file is wrong; null: not known.
        scorers: judges, of which the first that reads words tells classes where nothing else does.
        n_judged: features used most that a judge is asked about.
        alignment_attributes: of the synthetic world; features of its others are style.
        least_correlation: |r| with a planted attribute, in either half, below which a feature is other.
        n_prompts: pairs whose loss is told, at most; null: all.
        n_random: random sets of each kind beside a set.
        n_relabelled: draws of wrong labels.
        n_shown: features used most that the report shows texts of.
        seed: of all draws.
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        sae: str | None = None,
        dpo: str | None = None,
        fsrl: str | None = None,
        labels: str | None = None,
        label_error: float | None = None,
        scorers: Mapping[str, Scorer | None] | None = None,
        n_judged: int = 64,
        alignment_attributes: Sequence[str] = ALIGNMENT_ATTRIBUTES,
        least_correlation: float = 0.3,
        n_prompts: int | None = 64,
        n_random: int = 39,
        n_relabelled: int = 20,
        n_shown: int = 8,
        seed: int = 0,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        least = {
            "n_judged": (n_judged, 1), "n_prompts": (n_prompts, 4), "n_random": (n_random, 2),
            "n_relabelled": (n_relabelled, 2), "n_shown": (n_shown, 0), "seed": (seed, 0),
        }  # fmt: skip
        check_options(NAME, least, {"dtype": (dtype, DTYPES)})
        for name, value in (("least_correlation", least_correlation), ("label_error", label_error or 0.0)):
            if not 0 <= value < 1:
                raise UserError(f"{NAME}.{name}: expected 0 … 1, got {value}")
        if label_error is not None and labels is None:
            raise UserError(
                f"{NAME}.label_error: has no effect without {NAME}.labels, the file whose labels may be wrong"
            )
        if unknown := [name for name in alignment_attributes if name not in ATTRIBUTES]:
            raise UserError(f"{NAME}.alignment_attributes: expected some of {', '.join(ATTRIBUTES)}, got {unknown[0]}")
        self.sae, self.dpo, self.fsrl, self.labels, self.label_error = sae, dpo, fsrl, labels, label_error
        self.scorers = [scorer for scorer in (scorers or {}).values() if scorer is not None]
        self.n_judged, self.alignment, self.least = n_judged, tuple(alignment_attributes), least_correlation
        self.n_prompts, self.n_random, self.n_relabelled, self.n_shown = n_prompts, n_random, n_relabelled, n_shown
        self.seed, self.dtype, self.device = seed, dtype, device
        self._kept: _Asked | None = None

    def start(self, checkpoints: Checkpoints) -> None:
        """Open what is asked beside the two models. Raises UserError; Unsupported: no feature has anything to do with them."""
        asked = self._asked(checkpoints)
        if self.labels is not None:
            classes_of_file(self.labels, asked.sae.width, error=self.label_error)
        elif not has_planted(checkpoints.pairs) and (judge := self._judge()) is not None:
            judge.start(want_probabilities=False)

    def costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """Passes over the pairs, and those above the site for each set."""
        asked = self._asked(checkpoints)
        n_tokens = sum(pair.n_row_tokens for pair in checkpoints.pairs)
        costs = [Cost("states", 1.0 + (asked.dpo is not None), n_tokens * (1 + (asked.dpo is not None)))]
        if asked.steering is not None:
            n_sets = (
                len(ABLATED)
                + (3 * 2 + len(ATTRIBUTES)) * self.n_random
                + 2 * self.n_relabelled
                + 2 * len(SHARES)
                + self.n_beside * sum(0 < share < 1 for share in SHARES)
            )
            tokens = sum(pair.n_row_tokens for pair in checkpoints.pairs[: self.n_prompts])
            costs.append(Cost("ablations, above the site", float(n_sets), n_sets * tokens))
        return costs

    def _asked(self, checkpoints: Checkpoints) -> "_Asked":
        """Open what is asked beside two models, once for all that is asked about them."""
        if self._kept is None or self._kept.checkpoints is not checkpoints:
            self._kept = _Asked(self, checkpoints)
        return self._kept

    @property
    def n_beside(self) -> int:
        """Random sets beside each share of the features used most."""
        return min(self.n_random, 9)

    def _judge(self) -> Any:
        """The first judge who reads words."""
        return next((scorer.judge for scorer in self.scorers if hasattr(scorer, "judge")), None)

    @torch.no_grad()
    def table(self, checkpoints: Checkpoints) -> FeatureTables:
        """Usage, ablations, the features used most, and DPO's update in the same features.

        Raises:
            UserError: a run of another base, labels that don't fit, or too few prompts.
            Unsupported: no steering, and no autoencoder.
        """
        return self._asked(checkpoints).tables()

    def classes(self, reading: FeatureReading) -> FeatureClasses:
        """Classes by the file, else by planted attributes, else by the judge."""
        if self.labels is not None:
            return classes_of_file(self.labels, reading.sae.width, error=self.label_error)
        pairs = reading.checkpoints.pairs
        if has_planted(pairs):
            first = {pair.pair_id for pair in split_by_prompt(pairs, seed=self.seed).estimation}
            is_first = [pair.pair_id in first for pair in pairs]
            return classes_of_attributes(reading.means, pairs, is_first, alignment=self.alignment, least=self.least)
        judge = self._judge()
        if judge is None:
            return FeatureClasses(
                [CLASSES[-1]] * reading.sae.width, [""] * reading.sae.width, float("nan"),
                f"nothing: give {NAME}.labels=FILE.csv, or judge=…, who reads the texts that features are most active in",
            )  # fmt: skip
        features = reading.usage.argsort(descending=True)[: self.n_judged].tolist()
        return classes_of_judge(judge, [reading.examples(i) for i in features], features, reading.sae.width)


class _Asked:
    """Models that are open, and the tables that are made of them."""

    def __init__(self, options: SparseFeatures, checkpoints: Checkpoints) -> None:
        self.options, self.checkpoints = options, checkpoints
        self.loss, self.dpo = checkpoints.loss, None
        self.steering: SparseSteering | None = sparse_steering(checkpoints.aligned.model)
        unused = "fsrl" if self.steering is not None else "dpo"
        if getattr(options, unused) is not None:
            what = "is steered by features" if unused == "fsrl" else "is no steering, and its own update is told"
            raise UserError(f"{NAME}.{unused}: has no effect where the aligned model {what}; leave it out")
        if self.steering is None:
            self.dpo = checkpoints
            if options.fsrl is not None:
                other = self._other("fsrl", options.fsrl)
                self.steering, self.loss = sparse_steering(other.aligned.model), other.loss
                if self.steering is None:
                    raise UserError(
                        f"{NAME}.fsrl: {options.fsrl}: no features are steered there; give a run of adapter=sparse"
                    )
        elif options.dpo is not None:
            self.dpo = self._other("dpo", options.dpo)
        self.sae = self._autoencoder()

    def _other(self, key: str, folder: str) -> Checkpoints:
        """Another run of the same base, asked about the same pairs. Raises UserError."""
        run = open_run(Path(folder))
        found = checkpoints_of_run(run, dtype=self.options.dtype, device=self.options.device)
        check_same_base(f"{NAME}.{key}", run, self.checkpoints, found)
        return Checkpoints(found.base, found.aligned, self.checkpoints.pairs, loss=found.loss)

    def _autoencoder(self) -> SparseAutoencoder:
        if self.steering is not None:
            if self.options.sae is not None:
                raise UserError(
                    f"{NAME}.sae: has no effect beside a steering, which has its own autoencoder; leave it out"
                )
            return self.steering.sae
        if self.options.sae is None:
            raise Unsupported(
                f"{NAME}: expected a run that is steered by sparse features (experiment=tiny_fsrl), or {NAME}.fsrl=RUN or "
                f"{NAME}.sae=FOLDER beside any other, whose update is told in their features"
            )
        sae = load_sae(self.options.sae)
        sae.check_fits(self.checkpoints.base.model)
        return sae.to(self.checkpoints.base.model.device)

    def tables(self) -> FeatureTables:
        """Read states, tell classes, ablate."""
        self.reading = FeatureReading(self.checkpoints, self.sae, self.steering, self.dpo)
        self.classes = self.options.classes(self.reading)
        ablations, top = (pd.DataFrame(), pd.DataFrame()) if self.steering is None else self._ablate()
        bridge = None if self.dpo is None else self._bridge(self.dpo)
        about = {
            "classes": self.classes.how, "label_error": self.classes.error, "sae": self.sae.describe(), "loss": self.loss.name,
            "n_pairs": len(self._losses_on), "n_tokens": self.reading.base.n_rows, "has_steering": self.steering is not None,
        }  # fmt: skip
        return FeatureTables(
            ablations, self.reading.table(self.classes), top, bridge, about,
            self.reading.coloured(self.options.n_shown, self.classes),
        )  # fmt: skip

    @property
    def _losses_on(self) -> list[Any]:
        return list(self.checkpoints.pairs[: self.options.n_prompts])

    def _ablate(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Losses under all sets, in one go."""
        assert self.steering is not None
        options, usage, labels = self.options, self.reading.usage, self.classes.numbers()
        of_attributes = self._of_attributes()
        members = _sets(labels) | of_attributes
        draw = {"n_draws": options.n_random, "seed": options.seed}
        sets: dict[tuple[str, ...], Bool[Tensor, "set width"]] = {(name,): of[None] for name, of in members.items()}
        for name in (ALIGNMENT, STYLE, BOTH, *of_attributes):
            sets[name, "usage"] = matched_in_usage(usage, float(usage[members[name]].sum()), **draw)
        for name in (ALIGNMENT, STYLE, BOTH):
            n_used = int((members[name] & (usage > 0)).sum())
            sets[name, "size"] = random_sets(usage, n_used, **draw)
        if self.classes.error > 0:
            drawn = relabelled(
                labels, self.classes.error, n_classes=len(CLASSES), n_draws=options.n_relabelled, seed=options.seed
            )
            for name in (ALIGNMENT, STYLE):
                sets[name, "relabelled"] = drawn == CLASSES.index(name)
        for share in SHARES:
            kept = most_used(usage, share)
            sets["kept", str(share)], sets["without", str(share)] = ~kept[None], kept[None]
            n_random = options.n_beside if 0 < share < 1 else 0
            sets["random", str(share)] = ~random_sets(usage, int(kept.sum()), n_draws=n_random, seed=options.seed)
        ids = [pair.ids for pair in self._losses_on]
        with Progress(console=Console(highlight=False), transient=True) as progress:
            task = progress.add_task("Ablating features")
            sums = sums_under(
                self.checkpoints.base, self.steering, ids, list(~torch.cat(list(sets.values()))),
                say=lambda done, of: progress.update(task, completed=done, total=of),
            )  # fmt: skip
        reference = sums_of_pairs(self.checkpoints.token_log_probs[0])[: len(ids)]
        losses = losses_of(self.loss, sums, reference, ids).split([len(of) for of in sets.values()])
        found = dict(zip(sets, losses, strict=True))
        return self._ablations(members, sets, found), self._top(found)

    def _of_attributes(self) -> dict[str, Bool[Tensor, " width"]]:
        """Planted attribute → its features; none where nothing is planted."""
        names = self.classes.attributes
        return {of: torch.tensor([name == of for name in names]) for of in ATTRIBUTES} if names else {}

    def _planted(self, name: str) -> float:
        """Weight of an attribute in the first planted direction, its sign left out; NaN: not planted, or no attribute."""
        world = self.checkpoints.world
        return (
            abs(float(world.directions[0][ATTRIBUTES.index(name)]))
            if world is not None and name in ATTRIBUTES
            else math.nan
        )

    def _ablations(
        self,
        members: Mapping[str, Tensor],
        sets: Mapping[tuple[str, ...], Tensor],
        losses: Mapping[tuple[str, ...], Float[Tensor, "set pair"]],
    ) -> pd.DataFrame:
        """A row for each set, beside random ones and under wrong labels."""
        usage, groups = self.reading.usage, [pair.group for pair in self._losses_on]
        total, before, weights = float(usage.sum()), losses[(NONE,)][0], without_each(groups)
        rows: list[dict[str, Any]] = []
        for name, of in members.items():
            own = losses[(name,)][0]
            row: dict[str, Any] = {
                "ablated": name,
                "n_features": int(of.sum()),
                "n_used": int((of & (usage > 0)).sum()),
            }
            row["usage_share"] = float(usage[of].sum()) / total if total else float("nan")
            row |= cluster_mean_interval(own.tolist(), groups).named("loss")
            row |= cluster_mean_interval((own - before).tolist(), groups).named("rise")
            row["planted_weight"] = self._planted(name)
            for kind in (kind for kind in MATCHED if (name, kind) in sets):
                row |= self._beside(kind, of, sets[name, kind], own - before, losses[name, kind] - before, weights)
            if (name, "relabelled") in sets:
                rises = (losses[name, "relabelled"] - before).mean(1)
                row |= {"relabelled_low": float(rises.quantile(0.025)), "relabelled_high": float(rises.quantile(0.975))}
            rows.append(row)
        return pd.DataFrame(rows).assign(label_error=self.classes.error, n_random=self.options.n_random, n=len(before))

    def _beside(
        self, kind: str, members: Tensor, drawn: Tensor, own: Tensor, random: Tensor, weights: Tensor
    ) -> dict[str, Any]:
        """Rise of the loss by a set beside that by random ones, and how much those are used; nothing of a set that is not used."""
        usage = self.reading.usage
        own_usage, of_prompts = float(usage[members].sum()), weights.sum(1)
        if not own_usage:
            own = torch.full_like(own, math.nan)
        judged = among_random(weights @ own / of_prompts, (weights @ random.T) / of_prompts[:, None])
        return {
            f"usage_of_{kind}_matched": float((drawn.double() @ usage).mean()) / (own_usage or math.nan),
            f"random_{kind}": judged.random_mean,
            f"random_{kind}_low": judged.prediction.low,
            f"random_{kind}_high": judged.prediction.high,
            **judged.difference.named(f"above_{kind}_matched"),
            f"p_above_{kind}": judged.p_above,
            f"verdict_{kind}": judged.verdict,
        }

    def _top(self, losses: Mapping[tuple[str, ...], Float[Tensor, "set pair"]]) -> pd.DataFrame:
        """Share of the gain in loss that the features used most keep, and that is left without them."""
        groups, before, after = [pair.group for pair in self._losses_on], losses[(ALL,)][0], losses[(NONE,)][0]
        weights = without_each(groups)
        gain = weights @ (before - after)
        rows = []
        for share in SHARES:
            row: dict[str, Any] = {"share": share, "n_features": int(most_used(self.reading.usage, share).sum())}
            for name in ("kept", "without"):
                row |= _ratio(weights @ (before - losses[name, str(share)][0]), gain).named(name)
            random = (before - losses["random", str(share)]).mean(1) / float((before - after).mean())
            row |= {"random_low": float(random.min()), "random_high": float(random.max())} if len(random) else {}
            rows.append(row)
        return pd.DataFrame(rows)

    def _bridge(self, dpo: Checkpoints) -> Bridge:
        """DPO's update in these features."""
        read = self.reading
        assert read.change is not None
        orders = {"dpo": read.moved.size.argsort(descending=True)}
        overlap = None
        if self.steering is not None:
            orders["fsrl"] = read.effective.size.argsort(descending=True)
            overlap = rank_overlap(read.effective.size, read.moved.size, read.base.frequency, seed=self.options.seed)
        numbers = [1, 2, 4, 8, 16, 32, 64, 128, 256, self.sae.width]
        groups = [pair.group for pair in self.checkpoints.pairs]
        explained = explained_by_features(self.sae, read.change, orders, numbers, groups)
        steered = steered_by_features(
            dpo, self.sae, orders["dpo"][:DECODED_FEATURES], steering=self.steering, n_prompts=self.options.n_prompts,
            seed=self.options.seed,
        )  # fmt: skip
        return Bridge(overlap, explained, steered)


def _sets(labels: Tensor) -> dict[str, Bool[Tensor, " width"]]:
    """Name of each set that is ablated → its features."""
    of = {name: labels == CLASSES.index(name) for name in (ALIGNMENT, STYLE)}
    nothing = torch.zeros_like(of[STYLE])
    return {NONE: nothing, **of, BOTH: of[ALIGNMENT] | of[STYLE], ALL: ~nothing}


def _ratio(over: Float[Tensor, " kept"], under: Float[Tensor, " kept"]) -> Interval:
    """A ratio with its jackknife interval, from sums with and without each prompt."""
    whole = over / under
    return interval_without_each(whole[0], whole[1:]) if len(whole) > 2 else Interval(float(whole[0]), *NO_INTERVAL[1:])
