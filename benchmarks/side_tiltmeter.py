"""tiltmeter's side: its own Lightning modules in a Lightning Trainer that logs every step, as ``train.py`` runs them.

Each variant but the first switches one saving off; what replaces it is the plainest code that gives the same numbers.
"""

import contextlib
import copy
import csv
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.common import Message, peak_memory_mb, synchronizer
from benchmarks.worker import Channel, Turns
from benchmarks.workload import BETA, HHLengths, Settings, build_model, load_pairs
from datamodules.preference import PreferenceDataModule, TokenizedSplit
from datamodules.records import Message as Turn
from datamodules.records import PreferencePair
from datamodules.sampler import StepPlan, StepSampler
from datamodules.splits import Split
from datamodules.tokenization import TokenizationReport
from launch.loggers.metrics_csv import MetricsCSV
from launch.screen import quiet_libraries
from lightning_modules import base
from lightning_modules.dpo import DPOModule
from lightning_modules.pair_metrics import PairResults
from lightning_modules.policy import Policy
from tiltmeter.models import cpu_linear
from tiltmeter.models.causal_lm import SPECIAL_TOKENS
from tiltmeter.pairs.batch import PreferenceBatch, StepBatch, TokenizedPair
from tiltmeter.pairs.log_probs import model_inputs, sum_by_sequence


class AllLogits(Policy):
    """The head on every position of every row, all logits at once, differentiated by autograd."""

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """Summed log-probs of every sequence."""
        logits = self.model(**model_inputs(self.model, batch)).logits
        table = rearrange(logits.float().log_softmax(-1), "row token word -> (row token) word")
        return sum_by_sequence(table[batch.target_rows, batch.target_ids], batch.target_sequences, batch.n_sequences)


class AllLogitsDPO(DPOModule):
    """Without the chunked head on completion tokens."""

    def configure_model(self) -> None:
        """Put the plain head around the model."""
        super().configure_model()
        if not isinstance(self.policy, AllLogits):
            self.policy = AllLogits(self.trained_policy.model, chunk_tokens=self.factory.chunk_tokens)


class SecondModelDPO(DPOModule):
    """Without cached reference log-probs: a frozen second model runs beside the policy."""

    def sequence_log_probs_of(self, split: Split, rows: Sequence[int]) -> Tensor:
        """Nothing is computed ahead."""
        return torch.zeros(len(self.data.splits[split].pairs), 2, device=self.device)

    def on_fit_start(self) -> None:
        """Copy the policy."""
        super().on_fit_start()
        self._second = [copy.deepcopy(self.trained_policy).requires_grad_(False)]  # in a list: no submodule

    def pair_results(self, batch: PreferenceBatch, split: Split) -> PairResults:
        """Compute this batch's reference first."""
        with torch.no_grad():
            self.reference[split][batch.pair_index] = self._second[0](batch).float().view(2, -1).T
        return super().pair_results(batch, split)


class RandomMicroBatches(Sampler[StepPlan]):
    """The same steps, cut into micro-batches in the order in which pairs were drawn."""

    def __init__(self, steps: StepSampler, pairs_per_micro_batch: int) -> None:
        self.steps = steps
        self.size = pairs_per_micro_batch

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[StepPlan]:
        for plan in self.steps:
            batches = [plan.rows[at : at + self.size] for at in range(0, len(plan.rows), self.size)]
            yield StepPlan(tuple(batches), 0, plan.rows)


class UngroupedData(PreferenceDataModule):
    """Without grouping by length inside a step."""

    pairs_per_micro_batch = 8

    def loader(self, split: Split, **options: Any) -> DataLoader[StepBatch]:
        """The plain loader with its sampler replaced."""
        plain = super().loader(split, **options)
        assert isinstance(plain.sampler, StepSampler)
        sampler = RandomMicroBatches(plain.sampler, self.pairs_per_micro_batch)
        return DataLoader(plain.dataset, batch_size=None, sampler=sampler, pin_memory=plain.pin_memory)


MODULES: dict[str, type[DPOModule]] = {"all_logits": AllLogitsDPO, "second_model": SecondModelDPO}
"""Variants that are another module; the others keep the shipped one."""


class TakeTurns(Callback):
    """Waits for its turn at the start of a step."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: StepBatch, batch_idx: int) -> None:
        self.turns.before_step()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.turns.end()


def make_data(settings: Settings) -> PreferenceDataModule:
    """A data module that holds the prepared token ids."""
    kind = UngroupedData if settings.variant == "ungrouped" else PreferenceDataModule
    options: dict[str, Any] = {"pairs_per_step": settings.pairs_per_step}
    if settings.tokens_per_micro_batch is not None:
        options["tokens_per_micro_batch"] = settings.tokens_per_micro_batch
    if settings.variant == "concatenated":
        options["layout"] = "concatenated"
    if settings.variant in ("padded", "ungrouped"):
        options["packed"] = False
    data = kind(HHLengths(0), **options)
    if isinstance(data, UngroupedData):
        data.pairs_per_micro_batch = settings.pairs_per_micro_batch
    pairs = load_pairs(settings.folder)
    data.splits = {"train": _split(pairs), "val": _split(pairs[:1])}
    data.tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(settings.folder) / "tokenizer")
    return data


def _split(pairs: list[TokenizedPair]) -> TokenizedSplit:
    nothing = Turn("assistant", "")
    record = PreferencePair("", "benchmark", "", (), nothing, nothing, "", "", "")
    return TokenizedSplit([record] * len(pairs), pairs, TokenizationReport())


def make_module(settings: Settings, data: PreferenceDataModule, kind: type[DPOModule] = DPOModule) -> DPOModule:
    """A DPO module and the model that it trains."""
    shape, tokenizer = settings.model_shape, data.tokenizer
    assert tokenizer is not None
    special_ids = {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}
    module = kind(
        beta=BETA,
        learning_rate=shape.learning_rate,
        warmup_share=0.0,
        schedule="constant",
        gradient_clip_norm=1.0,
        freeze_embeddings=shape.freeze_embeddings or settings.lora is not None,
        lora=settings.lora,
    )

    def build() -> PreTrainedModel:
        model = build_model(shape, len(tokenizer), special_ids, settings.device)
        torch.manual_seed(1)  # adapters are drawn next, the same on both sides
        return model

    module.attach_model(build)
    return module


def fit(settings: Settings, data: PreferenceDataModule, module: DPOModule, callbacks: list[Callback]) -> Path:
    """Train with Lightning's Trainer; returns the file with the metrics of every step."""
    metrics = Path(settings.folder) / f"{settings.variant}.csv"
    metrics.unlink(missing_ok=True)
    trainer = Trainer(
        accelerator="gpu" if settings.device == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        max_steps=settings.n_steps,
        log_every_n_steps=1,
        logger=MetricsCSV(metrics),
        callbacks=callbacks,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=settings.folder,
    )
    with contextlib.redirect_stdout(sys.stderr):  # what the module prints belongs to no table
        trainer.fit(module, datamodule=data)
    return metrics


def padding_share(settings: Settings, data: PreferenceDataModule) -> float:
    """Padding among the tokens that the steps computed."""
    steps = [step for _, step in zip(range(settings.n_steps), data.loader("train", shuffle=True), strict=False)]
    return sum(step.n_padding for step in steps) / sum(step.n_computed for step in steps)


def quiet() -> None:
    """Nothing that a person could act on is lost in a log file."""
    quiet_libraries()
    warnings.filterwarnings("ignore")


def work(settings: Message, channel: Channel) -> Message:
    """Train one variant, a turn at a time."""
    quiet()
    settled = Settings(**settings)
    if settled.variant == "torch_products":
        base.onednn_is_faster = cpu_linear.onednn_is_faster = lambda: False
    data = make_data(settled)
    module = make_module(settled, data, MODULES.get(settled.variant, DPOModule))
    turns = Turns(settled.turns, channel, synchronizer(settled.device))
    metrics = fit(settled, data, module, [TakeTurns(turns)])
    peak = peak_memory_mb(settled.device)
    with metrics.open(newline="", encoding="utf-8") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    return {
        "losses": losses,
        "peak_mb": peak,
        "padding_share": padding_share(settled, data),
        "n_parameters": sum(p.numel() for p in module.trained_policy.model.parameters()),
        "tokens_per_micro_batch": data.tokens_per_micro_batch,
    }
