"""Hidden states of a study's runs for its claims: those that runs stored, and those that only their models can give."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import ndtri
from torch import Tensor
from transformers import PreTrainedModel

from analysis.claims.claim import ARMS, DRAWN, OfTable, Within
from analysis.claims.evidence import Arms, Figure, HeldOut
from analysis.claims.statistics import Parting, Read
from analysis.open.checkpoints import USUAL_LOSS, Checkpoints, loss_of
from analysis.open.observed import Observed
from analysis.open.probe_pairs import PROMPTS_FILE, read_probe_pairs
from analysis.open.runs import Run
from analysis.open.studies import DPO, Study
from analysis.steering.unrelated_prompts import UNRELATED_PROMPTS
from tiltmeter.commands import command
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import KERNELS
from tiltmeter.models.layers import unembedding
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.pairs.preference_losses import PairLogProbs
from tiltmeter.pairs.verification import best_layout
from tiltmeter.states.capture import Reading
from tiltmeter.states.positions import Position, content_tokens
from tiltmeter.states.probe_set import PreferenceDirections, Probe
from tiltmeter.states.state_pair import StatePair
from tiltmeter.weights.random_update import Form, random_update

_STORED: tuple[Position, ...] = ("prompt_last", "content")
_LEAST_PAIRS = 4
_MADE_BY = {"sweep": "steering_sweep", "steering_effects": "steering_sweep", "similarity_map": "similarity"}
_MADE_BY |= dict.fromkeys(("weights_cut", "weights_by_layer"), "weights")
"""Table → the analysis that makes it, where it has another name."""
_NO_MODELS = "ask_models=false"
FORMS: Mapping[str, Form] = dict(zip(DRAWN, ("gaussian", "rotated"), strict=True))
"""Arms that are drawn → form of the random weight changes."""


def arms_of(
    study: Study,
    *,
    say: Callable[[str], object],
    open_run: Callable[[Run], Checkpoints] | None,
    of_other: Callable[[Run, Checkpoints], Checkpoints] | None = None,
    make_table: Callable[[Run, str], object] | None = None,
) -> Arms:
    """Everything that claims are judged by.

    Args:
        say: told what is read, since it may take minutes.
        open_run: opens a run's models, for where responses part, unrelated text, random weight changes and the noise floor; None:
            what runs stored has to do.
        of_other: the open models of a dpo run with pairs of another corpus (C13); None: there is none.
        make_table: writes a table that a claim needs into a run's report, where it isn't there yet; None: nothing does.

    Raises:
        UserError: no dpo run stored hidden states.
    """
    reads: dict[str, list[Read]] = {}
    missing = {arm: _train(study, arm) for arm in (*study.planned, *ARMS)}
    noise, kl = math.nan, dict[str, list[float]]()
    if open_run is None:
        missing |= dict.fromkeys(FORMS, _NO_MODELS)
    for arm in sorted(study.runs, key=lambda arm: arm != DPO):
        for run in study.runs[arm]:
            say(f"{arm}, seed {run.setting('seed')}")
            read = stored_states(run)
            if read is None:
                missing[arm] = (
                    f"{run.folder.name} stored no hidden states; train it with callbacks=standard or geometry"
                )
                continue
            if open_run is not None:
                opened, is_first = open_run(run), not reads
                other = _parting(of_other(run, opened)) if of_other is not None and arm == DPO else None
                read = replace(read, unrelated=_unrelated(opened), preference=_parting(opened), other_corpus=other)
                pairs = [pair.ids for pair in opened.pairs]
                kl.setdefault(arm, []).append(kl_from_base(opened.base.model, opened.aligned.model, pairs))
                if is_first:
                    drawn, noise = _of_first(study, opened, read, say)
            reads.setdefault(arm, []).append(read)
        if not reads:
            raise UserError(
                f"{study.folder}: no dpo run stored hidden states; train with callbacks=standard, geometry or full"
            )
    if open_run is not None:
        reads |= drawn
    tables = partial(_of_tables, study, make_table, say, set())
    return Arms(_of_common_pairs(reads), tables, missing, noise, _NO_MODELS, kl, partial(losses_of, study))


def stored_states(run: Run) -> Read | None:
    """Hidden states that a run kept; None where it kept none. Raises UserError: they are damaged."""
    states = Observed.stored(run.folder, run.metrics).states
    if states is None:
        return None
    pairs = read_probe_pairs(run.folder / PROMPTS_FILE)
    places = content_tokens(
        [pair.ids.prompt_ids for pair in pairs]
    )  # of all that were read: which are shared depends on them
    ids = {p.pair_id: p.ids.prompt_ids[at] for p, at in zip(pairs, places, strict=True) if at is not None}
    seed = run.setting("seed")
    return Read(states, seed if isinstance(seed, int) else 0, ids)


@torch.no_grad()
def kl_from_base(
    base: PreTrainedModel, policy: PreTrainedModel, pairs: Sequence[TokenizedPair], *, n_pairs: int = 64
) -> float:
    """KL(π ‖ π₀) in nats, the mean over all tokens of the chosen responses of the first pairs: how far training has gone.

    Args:
        n_pairs: so many at most.
    """
    total, n_tokens = 0.0, 0
    for prompt, chosen, _ in pairs[:n_pairs]:
        ids = torch.tensor([[*prompt, *chosen]], device=base.device)
        q, p = (model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for model in (base, policy))
        total += float((p.exp() * (p - q)).sum())
        n_tokens += len(chosen)
    return total / n_tokens


def _parting(opened: Checkpoints) -> Parting | None:
    """States that predict the first tokens in which responses differ; None where fewer than four pairs' do."""
    pairs = [pair.ids for pair in opened.pairs]
    directions = PreferenceDirections(unembedding(opened.base.model), pairs)
    if len(directions.diverging) < _LEAST_PAIRS:
        return None
    probe = Probe.of_pairs(pairs, layout=best_layout(opened.base.model, pairs), positions=("diverge",))
    groups = [pair.group for pair in opened.pairs]
    states = probe.read_pair(opened.base.model, opened.aligned.model, clusters=groups)
    return Parting(states, directions.token)


def _of_first(
    study: Study, opened: Checkpoints, read: Read, say: Callable[[str], object]
) -> tuple[dict[str, list[Read]], float]:
    """States of the base under random weight changes as large as the first dpo run's (C8), and ‖δ‖ over the noise floor (C1)."""
    probe, pairs = _probe(opened), [pair.ids for pair in opened.pairs]
    base, policy = probe.read(opened.base.model), opened.aligned.model.state_dict()
    ids, groups = [p.pair_id for p in opened.pairs], [p.group for p in opened.pairs]
    reads: dict[str, list[Read]] = {arm: [] for arm in FORMS}
    for arm, form in FORMS.items():
        spectra: dict[str, Tensor] = {}
        for draw in range(study.n_draws):
            say(f"{arm}, draw {draw + 1} of {study.n_draws}")
            with random_update(opened.base.model, policy, draw=draw, form=form, spectra=spectra):
                changed = StatePair(base, probe.read(opened.base.model), ids, groups, pairs)
            reads[arm].append(Read(changed.finite(), draw, read.content_ids))
    say("noise floor")
    moved = StatePair(base, probe.read(opened.aligned.model))
    return reads, noise_ratio(moved, _noise_readings(opened, probe))


def noise_ratio(moved: StatePair, again: Sequence[Reading]) -> float:
    """Mean length of the updates over all sites, over that of what differs between two readings of the base (C1).

    Args:
        moved: base and policy.
        again: the base read otherwise; the noisiest reading counts.
    """
    floor = max(_mean_length(StatePair(moved.base, reading)) for reading in again)
    return _mean_length(moved) / floor if floor else math.inf


def _mean_length(states: StatePair) -> float:
    lengths = [float(states.update(point).norm(dim=1).mean()) for point in states.points]
    return sum(lengths) / len(lengths)


def _noise_readings(opened: Checkpoints, probe: Probe) -> list[Reading]:
    """The base read in other batches, and by other attention kernels."""
    model, before = opened.base.model, opened.base.model.config._attn_implementation
    pairs = [pair.ids for pair in opened.pairs]
    otherwise = Probe.of_pairs(pairs, pairs_per_batch=3, layout="concatenated", positions=probe.positions)
    readings: list[Reading] = [otherwise.read(model)]
    try:
        readings += [probe.read(model) for kernel in KERNELS if kernel != before and _takes(model, kernel)]
    finally:
        model.set_attn_implementation(before)
    return readings


def _probe(opened: Checkpoints) -> Probe:
    pairs = [pair.ids for pair in opened.pairs]
    return Probe.of_pairs(pairs, layout=best_layout(opened.base.model, pairs), positions=_STORED)


def _unrelated(opened: Checkpoints) -> StatePair:
    """States at the last tokens of plain sentences."""
    tokenizer = opened.base.tokenizer
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    pairs = []
    for text in UNRELATED_PROMPTS:
        ids = [*bos, *tokenizer.encode(text, add_special_tokens=False)]
        pairs.append(TokenizedPair(ids, ids[-1:], ids[-1:]))
    probe = Probe.of_pairs(pairs, layout="concatenated", positions=("prompt_last",))
    return probe.read_pair(opened.base.model, opened.aligned.model).finite()


def _takes(model: PreTrainedModel, kernel: str) -> bool:
    try:
        model.set_attn_implementation(kernel)
    except (ValueError, ImportError):
        return False
    return True


def _of_common_pairs(reads: Mapping[str, Sequence[Read]]) -> dict[str, list[Read]]:
    """The same pairs in all arms, so that differences are of the same prompts."""
    ids = [set(read.states.pair_ids or ()) for ones in reads.values() for read in ones]
    common = set.intersection(*ids)

    def kept(states: StatePair) -> StatePair:
        names = list(states.pair_ids or ())
        rows = [i for i, name in enumerate(names) if name in common]
        return states if len(rows) == len(names) else states.of_pairs(torch.tensor(rows))

    return {arm: [replace(read, states=kept(read.states)) for read in ones] for arm, ones in reads.items()}


def _of_tables(
    study: Study,
    make_table: Callable[[Run, str], object] | None,
    say: Callable[[str], object],
    made: set[Path],
    arm: str,
    asked: OfTable,
) -> Sequence[Figure] | str:
    """A number of each run's report; text: why there is none.

    Args:
        made: tables that were made again, since a number was not in them; each is once.
    """
    runs, figures = study.runs.get(arm, ()), []
    if not runs:
        return _train(study, arm)
    for run in runs:
        path = run.report / "tables" / f"{asked.table}.csv"
        if not path.is_file() and make_table is not None:
            say(f"{asked.table} of {arm}, seed {run.setting('seed')}")
            make_table(run, asked.table)
        if not path.is_file():
            again = command("analyze.py", run=run.folder, analysis=_MADE_BY.get(asked.table, asked.table))
            return f"not in the report of {arm}, seed {run.setting('seed')}: {again}"
        figure = figure_of(path, asked)
        if (
            figure is None and make_table is not None and path not in made
        ):  # made with other options, such as no other corpus
            made.add(path)
            say(f"{asked.table} of {arm}, seed {run.setting('seed')}, again")
            make_table(run, asked.table)
            figure = figure_of(path, asked)
        if figure is None:
            return f"{path} has no such number"
        figures.append(figure)
    return figures


def losses_of(study: Study, arm: str) -> HeldOut | str:
    """Losses of the held-out pairs in each run of an arm; text: why they aren't known."""
    runs = study.runs.get(arm, ())
    if not runs:
        return _train(study, arm)
    tables = [run.held_out for run in runs]
    known = [table for table in tables if table is not None and {"pair_id", "prompt", "loss"} <= set(table.columns)]
    if len(known) < len(tables) or any(list(table["pair_id"]) != list(known[0]["pair_id"]) for table in known):
        return f"a run of {arm} kept no held-out losses, or those of other pairs"
    losses = torch.tensor(np.stack([table["loss"] for table in known], axis=1), dtype=torch.float64)
    if not bool(losses.isfinite().all()):
        return f"a run of {arm} has held-out losses that are no numbers"
    start = _loss_at_start(runs[0])
    return start if isinstance(start, str) else HeldOut(losses, [str(prompt) for prompt in known[0]["prompt"]], start)


def _loss_at_start(run: Run) -> float | str:
    """Loss of every pair while the policy still is the reference; text: it isn't one number."""
    loss, chosen, rejected = loss_of(run) or USUAL_LOSS, torch.zeros(2), torch.tensor([0.0, -9])
    counts = torch.tensor([1, 3])
    first, second = loss(PairLogProbs(chosen, rejected, chosen, rejected, counts, counts)).tolist()
    return float(first) if first == second else f"with module.loss={loss.name} the loss before training differs by pair"


def figure_of(path: Path, asked: OfTable) -> Figure | None:
    """Number of a table, with its standard error where the table has an interval; None where it has no such number."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError):
        return None
    if not {asked.column, *asked.where, *asked.less} <= set(table.columns):
        return None
    if asked.within is not None:
        return _reach(_rows_of(table, asked.where), asked.column, asked.within)
    found = [_mean(table, asked.column, asked.where)]
    found += [_mean(table, asked.column, {**asked.where, **asked.less})] if asked.less else []
    value = found[0].value - (found[1].value if asked.less else 0.0)
    return Figure(value, math.hypot(*(figure.error for figure in found))) if math.isfinite(value) else None


def _reach(rows: pd.DataFrame, column: str, within: Within) -> Figure | None:
    """Largest distance of an interval from what is unchanged, in margins; None: no row has a number, or one has no interval."""
    known, ends = rows[rows[column].notna()], _ends_in(rows, column)
    if known.empty or ends is None or known[list(ends)].isna().any(axis=None):
        return None
    return Figure(max(within.reach(*pair) for pair in known[list(ends)].itertuples(index=False)))


def _rows_of(table: pd.DataFrame, where: Mapping[str, str | float | bool]) -> pd.DataFrame:
    """Rows of a table where columns have given values."""
    for name, value in where.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        own = pd.to_numeric(table[name], errors="coerce") if is_number else table[name].astype(str)
        table = table[own == (float(value) if is_number else str(value))]
    return table


def _mean(table: pd.DataFrame, column: str, where: Mapping[str, str | float | bool]) -> Figure:
    """Mean of a column over the rows where others have given values, and of its standard error; NaN without any."""
    rows = _rows_of(table, where)
    ends = _ends_in(rows, column)
    width = math.nan if ends is None else float((rows[ends[1]] - rows[ends[0]]).mean())
    return Figure(float(rows[column].mean()), width / (2 * float(ndtri(0.975))))


def _ends_in(table: pd.DataFrame, column: str) -> tuple[str, str] | None:
    """Names of the ends of a column's interval; None: the table has none."""
    return next((names for names in _ends_of(column) if {*names} <= set(table.columns)), None)


def _ends_of(column: str) -> list[tuple[str, str]]:
    """Names that the ends of a column's interval may have in a table."""
    return [(f"{column}_low", f"{column}_high"), *([("ci_low", "ci_high")] if column == "value" else [])]


def _train(study: Study, arm: str) -> str:
    asked = command("train.py", *study.overrides, arm=arm, seed="0", study_folder=study.folder.name)
    return f"no run of arm {arm}: {asked}"
