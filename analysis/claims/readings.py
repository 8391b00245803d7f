"""Hidden states of a study's runs for its claims: those that runs stored, and those that only their models can give."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from analysis.claims.claim import OfTable
from analysis.claims.evidence import DPO, Arms
from analysis.claims.statistics import Parting, Read
from analysis.open.checkpoints import Checkpoints, checkpoints_of_run
from analysis.open.observed import Observed
from analysis.open.runs import Run
from analysis.open.studies import Study
from analysis.steering.unrelated_prompts import UNRELATED_PROMPTS
from tiltmeter.commands import command
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import KERNELS
from tiltmeter.models.layers import unembedding
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.pairs.verification import best_layout
from tiltmeter.states.positions import Position
from tiltmeter.states.probe_set import PreferenceDirections, Probe
from tiltmeter.states.state_pair import StatePair
from tiltmeter.weights.random_update import Form, random_update

_STORED: tuple[Position, ...] = ("prompt_last", "content")
_LEAST_PAIRS = 4
FORMS: Mapping[str, Form] = {"random_update": "gaussian", "random_update_rotated": "rotated"}
"""Arms that are drawn → form of the random weight changes."""


def arms_of(
    study: Study,
    *,
    say: Callable[[str], object],
    models: bool = True,
    other: Callable[[Run], Checkpoints] | None = None,
    make_table: Callable[[Run, str], object] | None = None,
) -> Arms:
    """Everything that claims are judged by.

    Args:
        say: told what is read, since it may take minutes.
        models: also open the models of all runs: where responses part, unrelated text, random weight changes, the noise floor.
        other: opens a run's models with pairs of another corpus (C13); None: there is none.
        make_table: writes a table that a claim needs into a run's report, where it isn't there yet; None: nothing does.

    Raises:
        UserError: no dpo run stored hidden states.
    """
    reads: dict[str, list[Read]] = {}
    missing = {arm: _train(study, arm) for arm in (*study.planned, "sft_chosen", "lm_continued", "dpo_shuffled")}
    noise, why, kl = math.nan, "ask_models=false", dict[str, list[float]]()
    for arm, runs in study.runs.items():
        for run in runs:
            say(f"{arm}, seed {run.setting('seed')}")
            found = Observed.stored(run.folder, run.metrics).states
            if found is None:
                missing[arm] = (
                    f"{run.folder.name} stored no hidden states; train it with callbacks=standard or geometry"
                )
                continue
            read = Read(found)
            if models:
                opened = checkpoints_of_run(run)
                read = _with_models(read, opened, other(run) if other and arm == DPO else None)
                kl.setdefault(arm, []).append(kl_from_base(opened))
            reads.setdefault(arm, []).append(read)
    if not reads.get(DPO):
        raise UserError(
            f"{study.folder}: no dpo run stored hidden states; train with callbacks=standard, geometry or full"
        )
    if models:
        reads |= _random_weights(study, opened := checkpoints_of_run(study.runs[DPO][0]), say)
        say("noise floor")
        noise, why = _noise_ratio(opened), ""
    else:
        missing |= dict.fromkeys(FORMS, why)
    return Arms(_of_common_pairs(reads), partial(_of_tables, study, make_table, say), missing, noise, why, kl)


def _with_models(read: Read, opened: Checkpoints, other: Checkpoints | None) -> Read:
    """Add what a run did not store."""
    return Read(read.states, _unrelated(opened), _parting(opened), None if other is None else _parting(other))


@torch.no_grad()
def kl_from_base(opened: Checkpoints, *, n_pairs: int = 64) -> float:
    """KL(π ‖ π₀) in nats, the mean over all tokens of the chosen responses of the first pairs: how far training has gone."""
    total, n_tokens = 0.0, 0
    for pair in opened.pairs[:n_pairs]:
        prompt, chosen, _ = pair.ids
        ids = torch.tensor([[*prompt, *chosen]], device=opened.base.model.device)
        q, p = (
            one.model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for one in (opened.base, opened.aligned)
        )
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


def _random_weights(study: Study, opened: Checkpoints, say: Callable[[str], object]) -> dict[str, list[Read]]:
    """States of the base under random weight changes as large as the first dpo run's (C8)."""
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
            reads[arm].append(Read(changed.finite()))
    return reads


def _noise_ratio(opened: Checkpoints) -> float:
    """Mean length of the first dpo run's updates over the noise floor, over all sites (C1)."""
    probe = _probe(opened)
    floor = _noise_floor(opened, [pair.ids for pair in opened.pairs], probe)
    moved = probe.read_pair(opened.base.model, opened.aligned.model)
    sizes = [float(moved.update(point).norm(dim=1).mean()) for point in moved.points]
    return sum(sizes) / len(sizes) / floor if floor else math.inf


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


def _noise_floor(opened: Checkpoints, pairs: Sequence[TokenizedPair], probe: Probe) -> float:
    """Mean length of what differs when the base is read twice, in other batches and by other attention kernels (C1)."""
    model, before = opened.base.model, opened.base.model.config._attn_implementation
    one_by_one = Probe.of_pairs(pairs, pairs_per_batch=3, layout="concatenated", positions=probe.positions)
    readings = [one_by_one.read(model)]
    for kernel in KERNELS:
        if kernel != before and _takes(model, kernel):
            readings.append(probe.read(model))
    model.set_attn_implementation(before)
    own = probe.read(model)
    norms = [
        float((reading[point].rows.double() - own[point].rows.double()).norm(dim=1).mean())
        for reading in readings
        for point in own
    ]
    return max(sum(norms[i : i + len(own)]) / len(own) for i in range(0, len(norms), len(own)))


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
    arm: str,
    asked: OfTable,
) -> Sequence[float] | str:
    """A number of each run's report; text: why there is none."""
    runs, values = study.runs.get(arm, ()), []
    if not runs:
        return _train(study, arm)
    for run in runs:
        path = run.report / "tables" / f"{asked.table}.csv"
        if not path.is_file() and make_table is not None:
            say(f"{asked.table} of {arm}, seed {run.setting('seed')}")
            make_table(run, asked.table)
        if not path.is_file():
            made_by = {"sweep": "steering_sweep"}.get(asked.table, asked.table)
            again = command("analyze.py", run=run.folder, analysis=made_by)
            return f"not in the report of {arm}, seed {run.setting('seed')}: {again}"
        value = _number(path, asked)
        if value is None:
            return f"{path} has no such number"
        values.append(value)
    return values


def _number(path: Path, asked: OfTable) -> float | None:
    """What is asked of a table; None where it has no such number."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError):
        return None
    if not {asked.column, *asked.where, *asked.less} <= set(table.columns):
        return None
    meant = _mean(table, asked.column, asked.where)
    found = meant - _mean(table, asked.column, {**asked.where, **asked.less}) if asked.less else meant
    return found if math.isfinite(found) else None


def _mean(table: pd.DataFrame, column: str, where: Mapping[str, str | float | bool]) -> float:
    """Mean of a column over the rows where others have given values; NaN without any."""
    for name, value in where.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        own = pd.to_numeric(table[name], errors="coerce") if is_number else table[name].astype(str)
        table = table[own == (float(value) if is_number else str(value))]
    return float(table[column].mean())


def _train(study: Study, arm: str) -> str:
    return f"no run of arm {arm}; python train.py experiment={study.name} arm={arm} study_folder={study.folder.name} …"
