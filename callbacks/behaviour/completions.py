"""Held-out prompts of a run, and what the model in training says to them, over all processes."""

from collections.abc import Sequence
from typing import Any, cast

import torch.distributed
from lightning.pytorch import LightningModule, Trainer

from callbacks.probe_session import data_of
from datamodules.preference import PreferenceDataModule
from tiltmeter.errors import UserError
from tiltmeter.models.generation import Completion, Decoding
from tiltmeter.scoring.behaviour import Completions, Prompt, complete, one_a_group
from tiltmeter.scoring.scorer import LabelledPair


def labelled_pairs_of(data: PreferenceDataModule) -> list[LabelledPair]:
    """Pairs of the probe, or of validation in a run without one, as a judge is held against them."""
    records = (data.splits["probe"].records or data.splits["val"].records) if data.splits else []
    return [
        LabelledPair(r.pair_id, r.prompt_text, r.chosen_text, r.rejected_text, r.group, r.attributes) for r in records
    ]


def prompts_of(data: PreferenceDataModule, n_prompts: int) -> list[Prompt]:
    """The first prompts of the probe, or of validation in a run without one; each prompt once.

    Raises:
        UserError: there is none.
    """
    split = data.splits["probe" if data.splits["probe"].pairs else "val"]
    if not split.pairs:
        raise UserError("callbacks: expected held-out prompts to complete, got none; set datamodule.probe_pairs")
    prompts = [
        Prompt(r.pair_id, r.prompt_text, pair.prompt_ids, r.chosen_text, r.group, r.attributes)
        for r, pair in zip(split.records, split.pairs, strict=True)
    ]
    return one_a_group(prompts, n_prompts)


def gather_completions(
    trainer: Trainer, module: LightningModule, prompts: Sequence[Prompt], decoding: Decoding
) -> Completions:
    """Have the model complete the prompts as it is now; the same on every process; a collective."""
    tokenizer = data_of(trainer).tokenizer
    assert tokenizer is not None
    rank, world_size = trainer.global_rank, trainer.world_size
    with trainer.precision_plugin.forward_context():
        own: Completions = cast(Any, module).trained_policy.run(
            lambda model: complete(model, tokenizer, prompts, decoding, rank=rank, world_size=world_size)
        )
    if world_size == 1:
        return own
    shares: list[Completions] = [{} for _ in range(world_size)]
    torch.distributed.all_gather_object(shares, own)
    return {key: said for share in shares for key, said in share.items()}


def as_plain(completions: Completions) -> dict[str, list[list[Any]]]:
    """Completions as a checkpoint holds them: text, number of tokens, whether cut, token ids."""
    return {key: [[c.text, c.n_tokens, c.is_cut, c.ids] for c in said] for key, said in completions.items()}


def from_plain(stored: dict[str, list[list[Any]]]) -> Completions:
    """Completions out of a checkpoint."""
    return {key: [Completion(*c) for c in said] for key, said in stored.items()}
