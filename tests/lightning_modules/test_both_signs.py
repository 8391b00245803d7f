"""BiPO: the loss of a vector and of its opposite, by its formula, and the symmetry of both."""

import pytest
import torch

from lightning_modules.dpo import DPOModule
from lightning_modules.policy import Policy
from lightning_modules.sft import SFTModule
from tests.tiny_models import make_model, random_pairs, reference_log_probs
from tiltmeter.errors import UserError
from tiltmeter.models.trained_vector import VectorOptions, insert_vector
from tiltmeter.pairs.batch import TokenizedPair, collate_pairs
from tiltmeter.steering.intervene import Intervention, steer

BOTH = VectorOptions("layer_00", scale=1.0, both_signs=True)
VALUES = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def loss_of(pairs: list[TokenizedPair], values: torch.Tensor, options: VectorOptions) -> float:
    """Mean loss of the module on pairs, the reference that of the model alone."""
    module, model = DPOModule(learning_rate=1e-3, beta=0.2, vector=options), make_model("llama", torch.float64).eval()
    with torch.no_grad():
        module.reference = {"train": reference_log_probs(model, pairs).view(2, -1).T}
        insert_vector(model, options).double().d.copy_(values)
        module.policy = Policy(model)
        batch = collate_pairs(pairs, pair_index=range(len(pairs)), layout="concatenated")
        return float(module.pair_results(batch, "train").objective) / len(pairs)


def test_loss_is_that_of_both_signs_by_the_formula() -> None:
    pairs, model = random_pairs(4), make_model("llama", torch.float64).eval()
    ratios = {}
    with torch.no_grad():
        reference = reference_log_probs(model, pairs)
        for sign in (1, -1):
            with steer(model, [Intervention("layer_00", sign * VALUES[None])]):
                chosen, rejected = (reference_log_probs(model, pairs) - reference).view(2, -1)
            ratios[sign] = chosen - rejected
    by_hand = sum(-torch.nn.functional.logsigmoid(sign * 0.2 * ratios[sign]).mean() for sign in (1, -1)) / 2
    assert loss_of(pairs, VALUES, BOTH) == pytest.approx(float(by_hand), rel=1e-9)


def test_the_opposite_vector_on_swapped_pairs_has_the_same_loss() -> None:
    pairs = random_pairs(4)
    swapped = [TokenizedPair(p.prompt_ids, p.rejected_ids, p.chosen_ids) for p in pairs]
    assert loss_of(swapped, -VALUES, BOTH) == pytest.approx(loss_of(pairs, VALUES, BOTH), rel=1e-9)
    one_sign = VectorOptions("layer_00", scale=1.0)
    halves = loss_of(pairs, VALUES, one_sign) + loss_of(swapped, -VALUES, one_sign)
    assert loss_of(pairs, VALUES, BOTH) == pytest.approx(halves / 2, rel=1e-9)


def test_both_signs_without_a_preference_or_with_blocks_computed_again_are_refused() -> None:
    with pytest.raises(UserError, match=r"module\.vector\.both_signs: needs a preference loss"):
        SFTModule(learning_rate=1e-3, vector=BOTH)
    with pytest.raises(UserError, match=r"module\.vector\.both_signs: not with module\.activation_checkpointing=true"):
        DPOModule(learning_rate=1e-3, vector=BOTH, activation_checkpointing=True)
