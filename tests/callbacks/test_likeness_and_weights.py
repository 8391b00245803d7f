from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from callbacks.changed_weights import ChangedWeights
from callbacks.representation_similarity import RepresentationSimilarity
from tests.callbacks.watched import dpo, watch
from tests.tiny_models import lightning_warnings, make_model
from tiltmeter.errors import UserError
from tiltmeter.geometry.similarity import linear_cka
from tiltmeter.metric_names import at
from tiltmeter.states.capture import ReadPoint
from tiltmeter.weights.sampled import sampled_weights

pytestmark = lightning_warnings
SITE = "layer_00"


def test_likeness_is_one_before_training_and_that_of_the_states_after(tmp_path: Path) -> None:
    likeness = RepresentationSimilarity(positions=["prompt_last"])
    kept = {}
    plain = likeness.on_observation
    likeness.on_observation = lambda t, m, seen: (kept.__setitem__(seen.steps_taken, seen), plain(t, m, seen))  # type: ignore
    logger = watch(tmp_path, [likeness]).logger
    values = [row[at("similarity/cka", (SITE, "prompt_last"))] for row in rows_with(logger, "similarity/cka/layer_00")]
    assert values[0] == pytest.approx(1, abs=1e-9)
    last = kept[max(kept)]
    expected = linear_cka(*last.rows(ReadPoint(SITE, "prompt_last")))
    assert values[-1] == pytest.approx(expected, abs=1e-9)
    assert values[-1] < 1


def rows_with(logger: object, name: str) -> list[dict[str, float]]:
    return [row for row in logger.rows if name in row]  # type: ignore[attr-defined]


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, lora_alpha=4)])
def test_weights_change_as_the_model_trains(tmp_path: Path, lora: LoraConfig | None) -> None:
    seen = watch(tmp_path, [ChangedWeights(n_entries=2000)], module=dpo(learning_rate=1e-2, lora=lora))
    values = [row["weights/changed_share"] for row in rows_with(seen.logger, "weights/changed_share")]
    assert values[0] == 0
    assert 0.02 < values[-1] <= 1


def test_the_sample_is_the_same_and_told_of_every_matrix() -> None:
    model = make_model("llama")
    first = sampled_weights(model, n_entries=500)
    assert torch.equal(first, sampled_weights(model, n_entries=500))
    with torch.no_grad():
        for parameter in model.model.layers[0].self_attn.q_proj.parameters():
            parameter.mul_(1.5)
    assert 0 < float((sampled_weights(model, n_entries=500) != first).float().mean()) < 0.5
    with pytest.raises(UserError, match="n_entries"):
        ChangedWeights(n_entries=0)
