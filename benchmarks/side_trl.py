"""TRL's side: its own DPOTrainer with precomputed reference log-probs, its defaults wherever they are the faster choice.

Only tokenisation and the order of the pairs are taken out of its hands, so that both sides see the same token ids.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from peft import get_peft_model
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from benchmarks.common import Message, peak_memory_mb, synchronizer
from benchmarks.worker import Channel, Turns
from benchmarks.workload import BETA, Settings, build_model, load_pairs, random_order, sorted_order
from tiltmeter.models.causal_lm import SPECIAL_TOKENS
from tiltmeter.models.layers import embedding_parameters
from tiltmeter.pairs.batch import TokenizedPair


class PretokenizedDPO(DPOTrainer):
    """TRL's trainer on token ids in an order that is given."""

    order: list[int]

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, dataset: Dataset | None = None) -> list[int]:
        return self.order


class TakeTurns(TrainerCallback):
    """Waits for its turn at the start of an optimizer step."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.turns.before_step()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.turns.end()


def config(settings: Settings) -> DPOConfig:
    """The same optimizer, loss and batch as on tiltmeter's side; no checkpointing, no evaluation, no reports."""
    return DPOConfig(
        output_dir=f"{settings.folder}/{settings.variant}",
        use_cpu=settings.device == "cpu",
        bf16=False,  # on a GPU the weights themselves are bfloat16
        fp16=False,
        gradient_checkpointing=False,
        beta=BETA,
        loss_type="sigmoid",
        max_length=None,  # the pairs are cut already
        precompute_ref_log_probs=True,
        per_device_train_batch_size=settings.pairs_per_micro_batch,
        gradient_accumulation_steps=settings.pairs_per_step // settings.pairs_per_micro_batch,
        max_steps=settings.n_steps,
        learning_rate=settings.model_shape.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )


def open_dataset(folder: Path, pairs: list[TokenizedPair]) -> Dataset:
    """The pairs as a data set on disk, beside which TRL keeps reference log-probs for its second side."""
    place = folder / "trl_pairs"
    if not place.exists():
        columns = {name: [list(getattr(pair, name)) for pair in pairs] for name in TokenizedPair._fields}
        Dataset.from_dict(columns).save_to_disk(str(place))
    return load_from_disk(str(place))


def work(settings: Message, channel: Channel) -> Message:
    """Train with random or length-sorted micro-batches, a turn at a time."""
    logging.set_verbosity_error()
    settled = Settings(**settings)
    folder = Path(settled.folder)
    pairs = load_pairs(settled.folder)
    order = sorted_order(settled, pairs) if settled.variant == "trl_sorted" else random_order(settled, len(pairs))
    # sorted, so that the reference log-probs cost least
    by_length = sorted(range(len(pairs)), key=lambda row: sum(map(len, pairs[row])))
    place = {row: at for at, row in enumerate(by_length)}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    special_ids = {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}
    shape = settled.model_shape
    model = build_model(shape, len(tokenizer), special_ids, settled.device)
    if settled.lora is not None:
        torch.manual_seed(1)
        model = get_peft_model(model, settled.lora)
    elif shape.freeze_embeddings:
        for parameter in embedding_parameters(model):
            parameter.requires_grad_(False)
    dataset = open_dataset(folder, [pairs[row] for row in by_length])
    trainer = PretokenizedDPO(model, args=config(settled), train_dataset=dataset, processing_class=tokenizer)
    trainer.order = [place[row] for row in order]
    trainer.add_callback(TakeTurns(Turns(settled.turns, channel, synchronizer(settled.device))))
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak_mb": peak_memory_mb(settled.device),
        "padding_share": padding_share(pairs, order, settled.pairs_per_micro_batch),
        "n_parameters": sum(p.numel() for p in model.parameters()),
    }


def padding_share(pairs: list[TokenizedPair], order: list[int], per_batch: int) -> float:
    """Padding among the computed tokens, where every micro-batch is padded to its longest row."""
    n_real = n_computed = 0
    for at in range(0, len(order), per_batch):
        batch = [pairs[row] for row in order[at : at + per_batch]]
        lengths = [len(p.prompt_ids) + len(response) for p in batch for response in (p.chosen_ids, p.rejected_ids)]
        n_real += sum(lengths)
        n_computed += len(lengths) * max(lengths)
    return 1 - n_real / n_computed
