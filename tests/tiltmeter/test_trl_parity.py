"""Against TRL 1.16's own trainer on the same token ids: another code base, another batching, the same numbers.

TRL's chunked head computes in float32 whatever the model's dtype, which alone costs 1e-7. Where more digits are
wanted ``exact_head`` puts TRL's own ``selective_log_softmax`` in its place, which keeps float64; all else is as shipped.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from datamodules.sampler import epoch_order
from datamodules.splits import Split
from lightning_modules.dpo import DPOModule
from lightning_modules.pair_metrics import PairResults
from tests.tiny_models import fit, largest_difference, make_data, make_model, make_tokenizer, random_pairs
from tiltmeter.pairs.batch import Layout, PreferenceBatch, TokenizedPair, collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.pairs.preference_losses import PairLogProbs, make_preference_loss

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

BETA, STEPS, PAIRS_PER_STEP = 0.1, 20, 8
LOSSES: dict[str, dict[str, float]] = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "robust": {"label_smoothing": 0.2},
}


class ExactHead:
    """Stands in for TRL's chunked function, on all positions at once and in the model's dtype."""

    @staticmethod
    def apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *_: Any) -> tuple[Tensor, ...]:
        from trl.trainer.utils import selective_log_softmax

        logits = F.linear(hidden, weight, bias)
        log_probs = selective_log_softmax(logits[None], labels[None])[0]
        unused = torch.zeros_like(log_probs)  # entropy and the like, which TRL only logs
        return log_probs, unused, unused, unused, unused.bool()


@pytest.fixture
def exact_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", ExactHead)


def trl_trainer(
    policy: PreTrainedModel,
    ref: PreTrainedModel,
    pairs: Sequence[TokenizedPair],
    folder: Path,
    tokenizer: Any,
    **options: Any,
) -> Any:
    """TRL's trainer on pairs that are tokenised already, in their order."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Pretokenized(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset if dataset is None else dataset)

        def _compute_loss(self, *arguments: Any) -> Tensor:
            loss: Tensor = super()._compute_loss(*arguments)
            self.exact_losses = [*getattr(self, "exact_losses", []), loss.item()]  # the log rounds to float32
            return loss

    config = DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        beta=BETA,
        max_length=None,
        precompute_ref_log_probs=False,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        dataloader_num_workers=0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        save_strategy="no",
        seed=0,
        disable_tqdm=True,
        **options,
    )
    columns = {name: [list(getattr(pair, name)) for pair in pairs] for name in TokenizedPair._fields}
    data = Dataset.from_dict(columns)
    return Pretokenized(policy, ref_model=ref, args=config, train_dataset=data, processing_class=tokenizer)


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    assert set(a) == set(b)
    return max(largest_difference(a[name], b[name]) for name in a)


Parity = tuple[float, float, float]


def parity(name: str, layout: Layout, folder: Path) -> Parity:
    """TRL's loss; how far ours is from it; and the same for the gradient that differs most."""
    tokenizer: PreTrainedTokenizerFast = make_tokenizer()
    pairs = random_pairs(8, seed=1)
    ref = make_model("gpt2", torch.float64, "eager", vocab_size=len(tokenizer))
    policy = make_model("gpt2", torch.float64, "eager", vocab_size=len(tokenizer), seed=5)
    trainer = trl_trainer(policy, ref, pairs, folder, tokenizer, loss_type=name, **LOSSES[name])
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(pairs))])
    theirs = trainer._compute_loss(trainer.model, batch, False)
    their_gradients = gradients(policy, theirs)

    mine = collate_pairs(pairs, pair_index=range(len(pairs)), layout=layout)
    with torch.no_grad():
        reference = sequence_log_probs(ref, mine).chunk(2)
    logps = sequence_log_probs(policy, mine, chunk_tokens=5).chunk(2)
    counts = mine.target_counts.chunk(2)
    ours = make_preference_loss(name, beta=BETA, **LOSSES[name])(PairLogProbs(*logps, *reference, *counts)).mean()
    our_gradients = gradients(policy, ours)
    assert max(g.abs().max().item() for g in our_gradients.values()) > 1e-2
    return theirs.item(), abs(ours.item() - theirs.item()), worst(our_gradients, their_gradients)


@pytest.mark.usefixtures("exact_head")
@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_equal_trl(name: str, layout: Layout, tmp_path: Path) -> None:
    _, loss, gradient = parity(name, layout, tmp_path)
    assert loss <= 1e-10
    assert gradient <= 1e-10


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_equal_trl_as_shipped_to_its_float32(name: str, tmp_path: Path) -> None:
    value, loss, gradient = parity(name, "shared_prefix", tmp_path)
    assert loss <= 2e-7 * max(1.0, value)
    assert gradient <= 2e-6


@pytest.mark.usefixtures("exact_head")
def test_the_supervised_term_equals_trl_s_of_one_pair(tmp_path: Path) -> None:
    tokenizer, pairs = make_tokenizer(), random_pairs(1, seed=2)
    ref = make_model("gpt2", torch.float64, "eager", vocab_size=len(tokenizer))
    policy = make_model("gpt2", torch.float64, "eager", vocab_size=len(tokenizer), seed=5)
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}
    trainer = trl_trainer(policy, ref, pairs, tmp_path, tokenizer, **options)
    theirs = trainer._compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[0]]), False)
    their_gradients = gradients(policy, theirs)
    mine = collate_pairs(pairs, pair_index=[0], layout="shared_prefix")
    with torch.no_grad():
        reference = sequence_log_probs(ref, mine).chunk(2)
    logps, counts = sequence_log_probs(policy, mine).chunk(2), mine.target_counts.chunk(2)
    ours = make_preference_loss("sigmoid", 0.3, beta=BETA)(PairLogProbs(*logps, *reference, *counts)).mean()
    assert abs(ours.item() - theirs.item()) <= 1e-10
    assert worst(gradients(policy, ours), their_gradients) <= 1e-10


class TracedDPO(DPOModule):
    """Remembers losses and gradient norms in full precision, and the parameters before the first step."""

    def on_fit_start(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.start = copy.deepcopy(self.trained_policy.model)
        self._sum = 0.0
        super().on_fit_start()

    def pair_results(self, batch: PreferenceBatch, split: Split) -> PairResults:
        results = super().pair_results(batch, split)
        self._sum += results.objective.item()
        return results

    def _clip_gradients(self) -> Tensor:
        norm = super()._clip_gradients()
        self.losses.append(self._sum / PAIRS_PER_STEP)
        self.norms.append(norm.item())
        self._sum = 0.0
        return norm


def traced(layout: Layout) -> TracedDPO:
    """Trained for twenty steps."""
    data = make_data(
        STEPS * PAIRS_PER_STEP, pairs_per_step=PAIRS_PER_STEP, tokens_per_micro_batch=300, layout=layout, max_length=80
    )
    module = TracedDPO(
        learning_rate=1e-3,
        beta=BETA,
        warmup_share=0.0,
        schedule="constant",
        freeze_embeddings=False,
        gradient_clip_norm=1.0,
    )
    fit(module, data, family="gpt2", dtype="float64")
    assert len(module.losses) == STEPS
    return module


@pytest.mark.usefixtures("exact_head")
def test_twenty_steps_of_training_follow_trl_in_both_layouts(tmp_path: Path) -> None:
    """One run of TRL's, which knows one layout, for both of ours."""
    both = [traced(layout) for layout in ("shared_prefix", "concatenated")]
    start, data = both[0].start, both[0].data
    pairs = data.splits["train"].pairs
    order = epoch_order(len(pairs), seed=data.seed, epoch=0, shuffle=True)
    options = {"loss_type": "sigmoid", "max_steps": STEPS, "learning_rate": 1e-3}
    shuffled = [pairs[i] for i in order]
    policy, ref = copy.deepcopy(start), copy.deepcopy(start)
    trainer = trl_trainer(policy, ref, shuffled, tmp_path, data.tokenizer, **options)
    trainer.train()
    losses = torch.tensor(trainer.exact_losses, dtype=torch.float64).view(STEPS, 2).mean(1)
    norms = torch.tensor([e["grad_norm"] for e in trainer.state.log_history if "loss" in e], dtype=torch.float64)
    theirs = dict(policy.named_parameters())
    for module in both:
        ours = dict(module.trained_policy.model.named_parameters())
        assert module.losses[-1] < 0.6 < module.losses[0]
        assert largest_difference(torch.tensor(module.losses, dtype=torch.float64), losses) <= 1e-9
        assert largest_difference(torch.tensor(module.norms, dtype=torch.float64), norms) <= 1e-9
        assert worst(ours, theirs) <= 1e-9
        assert worst(ours, dict(start.named_parameters())) > 1e-3
