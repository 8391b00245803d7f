"""The layout in which a model's hidden states are read where no run says it."""

from typing import Any

import pytest

from tests.tiny_models import make_model, random_pairs
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.pairs.verification import best_layout

BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize(
    ("family", "sizes", "layout"),
    [
        ("llama", {}, "shared_prefix"),
        ("gemma2", {}, "shared_prefix"),
        ("bloom", BLOOM, "concatenated"),
        ("mistral", {"sliding_window": 40}, "shared_prefix"),
        ("mistral", {"sliding_window": 12}, "concatenated"),
    ],
)
def test_prompts_are_shared_where_a_model_can_and_sees_the_pairs_whole(
    family: str, sizes: dict[str, Any], layout: str
) -> None:
    pairs = [*random_pairs(3, longest=9), TokenizedPair([5] * 9, [6] * 9, [7])]
    assert best_layout(make_model(family, attn="eager", **sizes), pairs) == layout
