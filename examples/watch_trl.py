"""Watch hidden states under TRL's DPOTrainer: ``python examples/watch_trl.py [FOLDER]`` (needs ``pip install trl``).

Offline, a few seconds: a tiny random Llama and its own tokenizer. The callback works with any ``transformers.Trainer`` whose
evaluation set has the columns ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, as DPOTrainer's has. Everything goes to
FOLDER (default: ``trl_run``).
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from datamodules.tokenization import train_bpe_tokenizer
from tiltmeter.models.layers import unembedding
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.states.capture import Reading, ReadPoint
from tiltmeter.states.observed_metrics import observation_metrics
from tiltmeter.states.probe_set import PreferenceDirections, Probe
from tiltmeter.states.snapshots import BASE, SnapshotWriter, epoch_name
from tiltmeter.states.state_pair import StatePair


class WatchHiddenStates(TrainerCallback):
    """Reads the evaluation pairs before the first step and after every epoch; the figures go to the trainer's own log."""

    def __init__(self, trainer: DPOTrainer, folder: Path) -> None:
        self.trainer = trainer
        held_out: Any = trainer.eval_dataset
        columns = [held_out[name] for name in TokenizedPair._fields]
        self.pairs = [TokenizedPair(*ids) for ids in zip(*columns, strict=True)]
        self.probe = Probe.of_pairs(self.pairs, sites="all", positions=("prompt_last", "content", "diverge"))
        self.steering: dict[ReadPoint, Tensor] | None = None
        names = {row: f"eval/{row}" for row in range(len(self.pairs))}
        self.snapshots = SnapshotWriter(folder, dtype="float32", pair_ids=names)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The base model, which a resumed run has no more."""
        if state.global_step:
            raise ValueError("WatchHiddenStates: expected a run from its first step, got a resumed one; leave it out")
        self.head = copy.deepcopy(unembedding(model))  # the base's, in case it is trained too
        self.directions = PreferenceDirections(self.head, self.pairs)
        self.base = self.probe.read(model)
        self.keep(BASE, self.base)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The policy, against the base."""
        states = StatePair(self.base, self.probe.read(model))
        metrics = observation_metrics(states, self.directions, head=self.head, previous=self.steering)
        self.trainer.log(metrics)
        self.keep(epoch_name(round(state.epoch) - 1), states.policy)
        self.steering = states.steering_vectors()

    def keep(self, name: str, states: Reading) -> None:
        """Every process reads the whole probe; the first one writes."""
        if self.trainer.is_world_process_zero():
            self.snapshots.write(name, states)


def make_pairs(first: int, last: int) -> Dataset:
    """Prompts with a kind and an unkind answer."""
    numbers = range(first, last)
    return Dataset.from_dict(
        {
            "prompt": [f"Can you help me with question {i}?" for i in numbers],
            "chosen": [f" Yes, gladly. Here is the answer to {i}." for i in numbers],
            "rejected": [f" No. Find {i} out yourself." for i in numbers],
        }
    )


def main(folder: Path) -> DPOTrainer:
    """The trainer after training; what was seen is in ``trainer.state.log_history``."""
    pairs, held_out = make_pairs(0, 32), make_pairs(32, 56)
    texts = [text for name in pairs.column_names for text in pairs[name]]
    tokenizer = train_bpe_tokenizer(texts, vocab_size=320)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **special)
    model: PreTrainedModel = LlamaForCausalLM(config)
    settings = DPOConfig(
        output_dir=str(folder / "trl"),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model,
        ref_model=copy.deepcopy(model),  # needed here because the model has no name that TRL could load it by again
        args=settings,
        train_dataset=pairs,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    trainer.add_callback(WatchHiddenStates(trainer, folder / "snapshots"))
    trainer.remove_callback(PrinterCallback)  # it would print every figure
    trainer.train()
    return trainer


if __name__ == "__main__":
    for row in main(Path((sys.argv[1:] or ["trl_run"])[0])).state.log_history:
        if "shift_share/delta/final_post_norm" in row:
            shown = ("shift_share/delta", "top1_energy/delta", "mean_cosine/leave_one_out", "projection/delta")
            figures = ", ".join(f"{name} {row[f'{name}/final_post_norm']:.3f}" for name in shown)
            print(f"epoch {row['epoch']:g}, final_post_norm: {figures}")  # noqa: T201
