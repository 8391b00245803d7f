"""The data module: one over every source; splits, tokenises and serves optimizer steps."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase as Tokenizer

from datamodules.records import LoadReport, PreferencePair, PreferenceSource, load_pairs
from datamodules.sampler import StepPlan, StepSampler
from datamodules.splits import LabelControl, Split, control_labels, count_repeats, split_by_group
from datamodules.step_dataset import StepDataset, leave_stopping_to_the_trainer
from datamodules.tokenization import PairTokenizer, TokenizationReport, Truncation
from tiltmeter.errors import UserError
from tiltmeter.pairs.batch import Layout, StepBatch, TokenizedPair, packed_length, row_length
from tiltmeter.pairs.chat import TextChoice, TextFormat, prints_date, settle_text_format
from tiltmeter.pairs.reference_cache import hash_pairs

Objective = Literal["preference", "chosen"]
PairLayout = Literal["shared_prefix", "concatenated"]


@dataclass
class TokenizedSplit:
    """Records of one split and their token ids, row by row."""

    records: list[PreferencePair]
    pairs: list[TokenizedPair]
    report: TokenizationReport

    @property
    def groups(self) -> list[str]:
        """Group (prompt) of each row, the unit of resampling for confidence intervals."""
        return [record.group for record in self.records]


class PreferenceDataModule(LightningDataModule):
    """Preference pairs from one source, split by prompt, tokenised, laid out as optimizer steps.

    A batch is a whole optimizer step (:class:`~tiltmeter.pairs.batch.StepBatch`); the module splits it into micro-batches
    itself, so gradients are exact means over pairs whatever the split.

    Args:
        source: where pairs come from (config group ``data``).
        max_length: longest prompt + response in tokens.
        max_response_length, truncation, chat_date: see :class:`~datamodules.tokenization.PairTokenizer`.
        text_format: as there; or ``auto``: by the chat template where the model ends its turns as the template does, which
            chat models do, else as transcripts.
        train_pairs: number of training pairs, None: all that remain.
        val_pairs: number of held-out pairs for validation; 0: there is none.
        probe_pairs: number of held-out pairs for measuring hidden states; disjoint from both.
        pairs_per_step: pairs of one optimizer step, over all processes.
        tokens_per_micro_batch: tokens of one forward pass on one process, padding included.
        layout: ``shared_prefix`` (fast) or ``concatenated`` (plain); same numbers.
        packed: pairs behind one another in one row, without padding; false: one row each, padded, grouped by length
            inside the step; null: packed where the model's attention allows it. Same numbers.
        bucket_steps: sort the pairs of so many optimizer steps by length together, which makes steps of similar length
            and is another trajectory; 1: pairs of a step are drawn at random.
        labels: ``given``, or a control (:func:`~datamodules.splits.control_labels`): ``swapped`` (all training labels reversed),
            ``shuffled`` (reversed with probability ½), ``random_pairs`` (responses of other prompts), ``prompts`` (the prompts
            themselves, to be continued), ``unseen`` (pairs of the validation split, which no base made here has learned from).
            Held-out pairs always keep their clean labels.
        split_seed: which prompts are held out; apart from the run's seed, so that seeds are comparable.
        seed: order of the training pairs.
        num_workers: DataLoader workers.
    """

    def __init__(
        self,
        source: PreferenceSource,
        *,
        max_length: int = 512,
        max_response_length: int | None = None,
        truncation: Truncation = "keep_end",
        text_format: TextChoice = "auto",
        chat_date: str | None = None,
        train_pairs: int | None = None,
        val_pairs: int = 500,
        probe_pairs: int = 256,
        pairs_per_step: int = 32,
        tokens_per_micro_batch: int = 4096,
        layout: PairLayout = "shared_prefix",
        packed: bool | None = None,
        bucket_steps: int = 1,
        labels: LabelControl = "given",
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        _check_least(
            1,
            pairs_per_step=pairs_per_step,
            tokens_per_micro_batch=tokens_per_micro_batch,
            bucket_steps=bucket_steps,
        )
        _check_least(1, train_pairs=1 if train_pairs is None else train_pairs)
        _check_least(
            0, val_pairs=val_pairs, probe_pairs=probe_pairs, split_seed=split_seed, seed=seed, num_workers=num_workers
        )
        for name, value, choices in (
            ("labels", labels, get_args(LabelControl)),
            ("layout", layout, get_args(PairLayout)),
            ("truncation", truncation, get_args(Truncation)),
            ("text_format", text_format, get_args(TextChoice)),
        ):
            if value not in choices:
                raise UserError(f"datamodule.{name}: expected {' or '.join(choices)}, got {value}")
        self.source = source
        self.max_length = max_length
        self.max_response_length = max_response_length
        self.truncation: Truncation = truncation
        self.text_format: TextChoice = text_format
        self.written_as: tuple[TextFormat, str] | None = None
        """The text format that was taken, and why; None before :meth:`tokenize`."""
        self.chat_date = chat_date
        self.sizes = {"train": train_pairs, "val": val_pairs, "probe": probe_pairs}
        self.pairs_per_step = pairs_per_step
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.layout: Layout = layout
        self.packed = packed
        self.bucket_steps = bucket_steps
        self.labels: LabelControl = labels
        self.split_seed = split_seed
        self.seed = seed
        self.num_workers = num_workers
        self.reports: list[LoadReport] = []
        self.records: dict[Split, list[PreferencePair]] = {}
        self.repeats: dict[str, int] = {}
        """Counts of what is kept but worth knowing: pairs that stand twice, and pairs that stand with both labels."""
        self.splits: dict[Split, TokenizedSplit] = {}
        self.tokenizer: Tokenizer | None = None

    def load(self) -> None:
        """Read the source and split it by prompt. Cheap; runs before any model is touched. Raises UserError."""
        pairs, self.reports = load_pairs(self.source)
        if not pairs:
            dropped = (
                sum((r.dropped for r in self.reports), start=type(self.reports[0].dropped)()) if self.reports else {}
            )
            reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "the source is empty"
            raise UserError(f"data: no preference pair is left after filtering ({reasons})")
        self.repeats = count_repeats(pairs)
        self.records = split_by_group(pairs, sizes=self.sizes, seed=self.split_seed)

    def tokenize(self, tokenizer: Tokenizer, end_ids: Collection[int] = ()) -> None:
        """Turn all splits into token ids.

        Args:
            end_ids: tokens at which the model stops besides the tokenizer's EOS; they tell a chat model from a base model.

        Raises:
            UserError: as :class:`~datamodules.tokenization.PairTokenizer`.
        """
        self.written_as = settle_text_format(self.text_format, tokenizer, end_ids)
        encode = PairTokenizer(
            tokenizer, self.max_length, self.max_response_length, self.truncation, self.written_as[0], self.chat_date
        )
        self.splits = {name: TokenizedSplit(*encode(records)) for name, records in self.records.items()}
        self.tokenizer = tokenizer

    @property
    def printed_date(self) -> str | None:
        """The day that stands in every text because the chat template prints one; None: it doesn't."""
        assert self.tokenizer is not None, "tokenize() comes first"
        uses_template = self.written_as is not None and self.written_as[0] == "chat_template"
        return self.chat_date if uses_template and prints_date(self.tokenizer) else None

    def training_texts(self) -> list[str]:
        """Both transcripts of every training pair, to train a tokenizer on."""
        return [r.prompt_text + text for r in self.records["train"] for text in (r.chosen_text, r.rejected_text)]

    @property
    def sources(self) -> list[str]:
        """Names of the sources of the pairs, sorted."""
        return sorted({record.source for split in self.splits.values() for record in split.records})

    def source_index(self, split: Split) -> list[int]:
        """Index into :attr:`sources` of each row of a split."""
        names = self.sources
        return [names.index(record.source) for record in self.splits[split].records]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch, as the trainer limits it (``trainer.limit_train_batches``)."""
        return self.steps_within(1.0 if self.trainer is None else self.trainer.limit_train_batches)

    def steps_within(self, limit: float) -> int:
        """Optimizer steps of one epoch that has at most so many (an int), or this share of all (a float)."""
        n_steps = -(-len(self.splits["train"].pairs) // self.pairs_per_step)
        return min(n_steps, limit) if isinstance(limit, int) else int(n_steps * limit)

    @property
    def _trained(self) -> Any:
        """The module that batches are for, which says what it trains on; None: there is none yet."""
        return None if self.trainer is None else self.trainer.lightning_module

    @property
    def active_layout(self) -> Layout:
        """Layout of the batches: the chosen rows alone when only they are trained."""
        return "chosen_only" if self._trained is not None and self._trained.objective == "chosen" else self.layout

    @property
    def packs(self) -> bool:
        """Whether batches are packed: what ``packed`` says or, where it says nothing, what the module finds possible."""
        settled = None if self._trained is None else self._trained.packs
        return bool(self.packed if settled is None else settled)

    def train_dataloader(self) -> DataLoader[StepBatch]:
        """Steps of training pairs in random order; resumes inside an epoch from the trainer's step count."""
        start = self.trainer.global_step % self.steps_per_epoch if self.trainer is not None else 0
        return self.loader("train", shuffle=True, start_step=start)

    def val_dataloader(self) -> DataLoader[StepBatch] | list[DataLoader[StepBatch]]:
        """Held-out pairs in a fixed order; an empty list, with which Lightning validates never, where there are none."""
        return self.loader("val") if self.splits["val"].pairs else []

    def pairs_of(self, split: Split) -> Sequence[TokenizedPair]:
        """Token ids of a split as they are trained or scored: training labels follow ``labels``."""
        pairs = self.splits[split].pairs
        if split != "train":
            return pairs
        return control_labels(pairs, self.labels, seed=self.seed, validation=self.splits["val"].pairs)

    def digest(self, split: Split) -> str:
        """sha256 over the token ids of a split, in order, as they are trained."""
        return hashlib.sha256(hash_pairs(self.pairs_of(split)).numpy().tobytes()).hexdigest()

    def rows_of_first_steps(self, n_steps: int) -> list[int]:
        """Training rows that the first ``n_steps`` optimizer steps take, over as many epochs as they need, each once."""
        n_rows, per_epoch = len(self.splits["train"].pairs), self.steps_per_epoch
        sampler = self._sampler("train", [1] * n_rows, shuffle=True)  # only the order is asked for
        rows: set[int] = set()
        for epoch in range(-(-n_steps // per_epoch)):
            n_here = min(per_epoch, n_steps - epoch * per_epoch)
            rows.update(sampler.order(epoch)[: n_here * self.pairs_per_step].tolist())
            if len(rows) == len(sampler.rows):
                break
        return sorted(rows)

    def loader(
        self,
        split: Split,
        *,
        shuffle: bool = False,
        start_step: int = 0,
        rows: Sequence[int] | None = None,
        layout: Layout | None = None,
        change: Callable[[TokenizedPair], TokenizedPair] | None = None,
    ) -> DataLoader[StepBatch]:
        """Steps over one split for this process; every pair appears once over all processes.

        Args:
            start_step: steps of the first epoch to skip.
            rows: only these rows, default all.
            layout: default: the one that is trained.
            change: what is done to each pair first; None: nothing.
        """
        layout = layout or self.active_layout
        pairs = self.pairs_of(split) if change is None else [change(pair) for pair in self.pairs_of(split)]
        trainer = self.trainer
        sampler = self._sampler(split, self._lengths(pairs, layout), shuffle=shuffle, rows=rows)
        sampler.start_step = start_step
        return DataLoader(
            self._dataset(pairs, layout),
            batch_size=None,
            sampler=sampler,  # yields plans, which the data set takes as its index
            generator=torch.Generator(),  # else every pass over the data would move the run's own random numbers
            num_workers=self.num_workers,
            worker_init_fn=leave_stopping_to_the_trainer,
            persistent_workers=self.num_workers > 0,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
        )

    def micro_batches(self, split: Split, rows: Sequence[int]) -> list[tuple[int, ...]]:
        """Rows that :meth:`loader` puts into one micro-batch, over all processes."""
        lengths = self._lengths(self.pairs_of(split), self.active_layout)
        n_processes = 1 if self.trainer is None else self.trainer.world_size
        samplers = [self._sampler(split, lengths, shuffle=False, rows=rows, rank=rank) for rank in range(n_processes)]
        plans = [plan for sampler in samplers for plan in sampler]
        return [batch for plan in plans for batch in plan.micro_batches[: len(plan.micro_batches) - plan.n_fillers]]

    def step_of(self, split: Split, micro_batches: Sequence[Sequence[int]]) -> StepBatch:
        """Lay given micro-batches of rows out as one step of this process."""
        plan = StepPlan(tuple(map(tuple, micro_batches)), 0, tuple(row for batch in micro_batches for row in batch))
        return self._dataset(self.pairs_of(split), self.active_layout)[plan]

    def _dataset(self, pairs: Sequence[TokenizedPair], layout: Layout) -> StepDataset:
        assert self.tokenizer is not None, "tokenize() comes first"
        return StepDataset(
            pairs,
            layout=layout,
            pad_id=self.tokenizer.pad_token_id or 0,
            predict_prompt=layout == "chosen_only" and self._trained is not None and self._trained.predict_prompt,
            packed=self.packs,
        )

    def _lengths(self, pairs: Sequence[TokenizedPair], layout: Layout) -> list[int]:
        length = packed_length if self.packs else row_length
        return [length(pair, layout) for pair in pairs]

    def _sampler(
        self,
        split: Split,
        lengths: Sequence[int],
        *,
        shuffle: bool,
        rows: Sequence[int] | None = None,
        rank: int | None = None,
    ) -> StepSampler:
        trainer = self.trainer
        own = 0 if trainer is None else trainer.global_rank
        return StepSampler(
            lengths,
            pairs_per_step=self.pairs_per_step,
            tokens_per_micro_batch=self.tokens_per_micro_batch,
            shuffle=shuffle,
            seed=self.seed,
            rank=own if rank is None else rank,
            world_size=1 if trainer is None else trainer.world_size,
            rows=rows,
            packed=self.packs,
            bucket_steps=self.bucket_steps if shuffle else 1,
            bucket_lengths=[sum(map(len, pair)) for pair in self.splits[split].pairs],
        )


def _check_least(least: int, **options: int) -> None:
    for name, value in options.items():
        if value < least:
            raise UserError(f"datamodule.{name}: expected at least {least}, got {value}")
