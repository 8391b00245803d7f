"""The probe of a training run: one forward pass at a step serves every callback; and what callbacks need of a trainer."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from datamodules.preference import PreferenceDataModule
from tiltmeter.errors import UserError
from tiltmeter.metric_names import STEPS_TAKEN, metric
from tiltmeter.models.layers import Unembedding, resolve_sites, site_names, unembedding
from tiltmeter.pairs.batch import REJECTED, PreferenceBatch, TokenizedPair
from tiltmeter.states.capture import HiddenStates, Reading, ReadPoint
from tiltmeter.states.observed_metrics import Metrics, states_from_tensors, states_to_tensors
from tiltmeter.states.positions import Position, check_position
from tiltmeter.states.probe_set import PreferenceDirections, Probe, cut_pair
from tiltmeter.states.state_pair import StatePair

_BASE, _STEERING, _HEAD = "probe_base", "probe_steering", "probe_head"


@dataclass
class ProbeSession:
    """The probe of one training run, shared by its callbacks: the union of what they want, read once a step."""

    sites: list[str] = field(default_factory=list)
    positions: list[Position] = field(default_factory=list)
    base: Reading | None = None
    steering: Mapping[ReadPoint, Tensor] = field(default_factory=dict)
    """v* of the last observation after a step."""
    previous: Mapping[ReadPoint, Tensor] = field(default_factory=dict)
    """v* of the one before it."""
    _probe: Probe | None = None
    _latest: StatePair | None = None
    _directions: PreferenceDirections | None = None
    _head: Unembedding | None = None
    _trained_head: dict[str, Tensor] | None = None
    """Weight and bias of an unembedding that is trained, as they were before the first step."""

    @staticmethod
    def of(trainer: Trainer) -> "ProbeSession":
        """The session of a trainer."""
        return _SESSIONS.setdefault(trainer, ProbeSession())

    def want(self, sites: str | Sequence[str], positions: Sequence[Position]) -> None:
        """Announce what a callback needs; call before the first observation."""
        self.sites += site_names(sites)
        self.positions += [check_position(p) for p in positions if p not in self.positions]

    def observe(self, trainer: Trainer, module: LightningModule) -> StatePair:
        """Read the probe, unless it was read at this step already; a collective of all processes."""
        step, probed = trainer.global_step, data_of(trainer).splits["probe"]
        if self._latest is None or self._latest.steps_taken != step:
            states = self._read(trainer, module)
            self.base = self.base or states
            ids = [record.pair_id for record in probed.records]
            self._latest = StatePair(self.base, states, ids, probed.groups, probed.pairs, steps_taken=step)
            self.previous = self.steering
            self.steering = self._latest.steering_vectors() if step else {}
        return self._latest

    def directions(self, trainer: Trainer, module: LightningModule) -> PreferenceDirections:
        """v and v̄ of the probe's pairs in the base model's unembedding; a collective when it is sharded."""
        if self._directions is None:
            self._directions = PreferenceDirections(self.head(module), data_of(trainer).splits["probe"].pairs)
        return self._directions

    def head(self, module: LightningModule) -> Unembedding:
        """The unembedding as it was before the first step, whole on every process; a collective when it is sharded."""
        if self._head is None:
            now = unembedding(model_of(module))
            before = self._trained_head or {
                name: _whole(part) for name, part in (("weight", now.weight), ("bias", now.bias)) if part is not None
            }
            if now.weight.requires_grad:
                self._trained_head = before
            here = {name: part.to(now.weight.device) for name, part in before.items()}
            self._head = replace(now, weight=here["weight"], bias=here.get("bias"))
        return self._head

    def check_base(self, module: LightningModule) -> None:
        """Refuse to go on without what later readings are compared with. Raises UserError."""
        wanted = {(site, position) for site in self._all_sites(module) for position in self.positions}
        missing = wanted - set(self.base or {})
        if missing:
            site, position = min(missing)
            raise UserError(
                f"callbacks: this checkpoint holds no hidden states of the base model at {site}, {position}, with which later ones "
                "are compared; resume with the callbacks that the run was started with, or with callbacks=none"
            )

    def save(self, checkpoint: dict[str, Any]) -> None:
        """The base model's rows, its unembedding if trained, and the last v* go with the run, which couldn't read them again."""
        if self.base is not None:
            checkpoint[_BASE] = states_to_tensors(self.base)
        if self.steering:
            checkpoint[_STEERING] = {f"{point.site}/{point.position}": v for point, v in self.steering.items()}
        if self._trained_head is not None:
            checkpoint[_HEAD] = self._trained_head

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Take them back."""
        if _BASE in checkpoint:
            self.base = states_from_tensors(checkpoint[_BASE])
        if _STEERING in checkpoint:
            self.steering = {ReadPoint(*place.split("/")): v for place, v in checkpoint[_STEERING].items()}
        self._trained_head = checkpoint.get(_HEAD)

    def _read(self, trainer: Trainer, module: LightningModule) -> Reading:
        if self._probe is None:
            prompts = [pair.prompt_ids for pair in data_of(trainer).splits["probe"].pairs]
            self._probe = Probe(
                probe_batches(trainer, lambda pair: cut_pair(pair, self.positions)),
                sites=self._all_sites(module),
                positions=self.positions,
                prompts=prompts,
            )
        with trainer.precision_plugin.forward_context():
            states = self._probe.read(model_of(module), cast(Any, module).trained_policy)
        return {point: _gather(found, trainer) for point, found in states.items()}

    def _all_sites(self, module: LightningModule) -> list[str]:
        n_layers = model_of(module).config.num_hidden_layers
        found = {site for wanted in dict.fromkeys(self.sites) for site in resolve_sites(wanted, n_layers)}
        return [site for site in resolve_sites("all", n_layers) if site in found]


_SESSIONS: WeakKeyDictionary[Trainer, ProbeSession] = WeakKeyDictionary()


def report_failed_write(path: Path, error: OSError | UserError, trainer: Trainer, *, alarm: str = "snapshot") -> None:
    """A file that could not be written, or that somebody damaged, is an alarm, and no reason to stop training."""
    reason = getattr(error, "strerror", None) or error
    warnings.warn(f"{path}: could not be written ({reason}); training goes on without it", stacklevel=2)
    log(trainer, {metric("alarm", alarm): 1.0})


def log(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Send metrics to every logger, at the step that was taken last; ``probe/steps_taken`` says how many had been."""
    if metrics and trainer.is_global_zero:
        row: Metrics = {**metrics, STEPS_TAKEN: trainer.global_step, "epoch": trainer.current_epoch}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=max(trainer.global_step - 1, 0))


def data_of(trainer: Trainer) -> PreferenceDataModule:
    """The run's data module."""
    return cast(PreferenceDataModule, trainer.datamodule)  # type: ignore[attr-defined]


def model_of(module: LightningModule) -> PreTrainedModel:
    """The language model inside a Lightning module of this project."""
    return cast(PreTrainedModel, cast(Any, module).trained_policy.model)


def probe_batches(
    trainer: Trainer, change: Callable[[TokenizedPair], TokenizedPair], *, rows: Sequence[int] | None = None
) -> list[PreferenceBatch]:
    """The probe's pairs, changed, as this process reads them, fillers included.

    Args:
        rows: of the probe; None: all.

    Raises:
        UserError: it has no pairs.
    """
    data = data_of(trainer)
    if not data.splits["probe"].pairs:
        raise UserError(
            "callbacks: expected held-out pairs to probe, got none; set datamodule.probe_pairs or callbacks=none"
        )
    steps = data.loader("probe", layout=data.layout, change=change, rows=rows)
    return [batch for step in steps for batch in step.micro_batches]


def gathered_table(places: Tensor, rows: Tensor, n_rows: int, trainer: Trainer) -> Tensor:
    """The rows of all processes at their places in one table, on the CPU; each is of one process alone, so sums are exact."""
    dtype = torch.promote_types(rows.dtype, torch.float32)  # which every backend can add
    table = torch.zeros(n_rows, rows.shape[1], dtype=dtype, device=trainer.strategy.root_device)
    table[places.to(table.device)] = rows.to(table)
    if trainer.world_size > 1:
        table = cast(Tensor, trainer.strategy.reduce(table, reduce_op="sum"))
    return table.to(rows.dtype).cpu()


def _gather(found: HiddenStates, trainer: Trainer) -> HiddenStates:
    """The rows of all processes, in the order that one process would have read them."""
    if trainer.world_size == 1:
        return found
    n_places = len(data_of(trainer).splits["probe"].pairs) * (REJECTED + 1)
    places = found.pair_index * (REJECTED + 1) + found.sides
    marked = torch.cat([found.rows, torch.ones_like(found.rows[:, :1])], dim=1)
    table = gathered_table(places, marked, n_places, trainer)
    there = table[:, -1].nonzero()[:, 0]
    return HiddenStates(table[there, :-1], there // (REJECTED + 1), there % (REJECTED + 1))


def _whole(part: Tensor) -> Tensor:
    """A weight, whole where it is sharded; a copy where it is trained."""
    whole = part.full_tensor() if isinstance(part, DTensor) else part
    return whole.detach().clone() if part.requires_grad else whole.detach()
