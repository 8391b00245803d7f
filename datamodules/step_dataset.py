"""A data set that turns the plan of an optimizer step into its batches."""

import signal
from collections.abc import Sequence

from torch.utils.data import Dataset

from datamodules.sampler import StepPlan
from tiltmeter.pairs.batch import Layout, StepBatch, TokenizedPair, collate_pairs


class StepDataset(Dataset[StepBatch]):
    """Maps the plan of an optimizer step to its batches."""

    def __init__(
        self, pairs: Sequence[TokenizedPair], *, layout: Layout, pad_id: int, predict_prompt: bool, packed: bool
    ) -> None:
        self.pairs = pairs
        self.layout = layout
        self.packed = packed
        self.pad_id = pad_id
        self.predict_prompt = predict_prompt

    def __getitem__(self, plan: StepPlan) -> StepBatch:
        """Collate the micro-batches of one step."""
        n_real = len(plan.micro_batches) - plan.n_fillers
        batches = [
            collate_pairs(
                [self.pairs[row] for row in rows],
                pair_index=rows,
                layout=self.layout,
                weights=[float(i < n_real)] * len(rows),
                pad_id=self.pad_id,
                predict_prompt=self.predict_prompt,
                packed=self.packed,
            )
            for i, rows in enumerate(plan.micro_batches)
        ]
        n_prompt = sum(len(self.pairs[row].prompt_ids) for row in plan.rows)
        n_response = sum(self._n_response(self.pairs[row]) for row in plan.rows)
        n_targets = n_response + (n_prompt - len(plan.rows) if self.predict_prompt else 0)
        return StepBatch(
            batches,
            n_pairs=len(plan.rows),
            n_targets=n_targets,
            n_tokens=n_prompt + n_response,
            n_prompt_tokens=n_prompt,
        )

    def _n_response(self, pair: TokenizedPair) -> int:
        return len(pair.chosen_ids) + (0 if self.layout == "chosen_only" else len(pair.rejected_ids))


def leave_stopping_to_the_trainer(worker: int) -> None:
    """Ignore stop signals in a DataLoader worker: one to the whole job would kill it, and the trainer could not end its step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
