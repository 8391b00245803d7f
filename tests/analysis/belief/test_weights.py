"""The analysis of weights, of two tiny models on disk whose weights were changed by hand."""

import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from analysis.belief.weights import Weights, both_weights, by_layer, places_of, weights_section
from analysis.open.checkpoints import Checkpoints
from analysis.open.models import LoadedModel
from analysis.open.probe_pairs import ProbePair
from tests.tiny_models import make_model, make_tokenizer, random_pairs
from tiltmeter.errors import UserError
from tiltmeter.weights.stored import StoredWeights


def pairs(n: int) -> list[ProbePair]:
    words = dict.fromkeys(("prompt", "chosen", "rejected"), "text")
    return [
        ProbePair(pair_id=str(i), source="made", group=str(i), ids=ids, attributes={}, **words)
        for i, ids in enumerate(random_pairs(n))
    ]


def two(folder: Path, change: float) -> Checkpoints:
    """A model and one whose first q_proj has an update of rank one."""
    models: list[PreTrainedModel] = [make_model("llama"), make_model("llama")]
    with torch.no_grad():
        weight = models[1].model.layers[0].self_attn.q_proj.weight
        weight += change * torch.outer(torch.linspace(1, 2, len(weight)), torch.linspace(-1, 1, weight.shape[1]))
    for model, name in zip(models, ("base", "aligned"), strict=True):
        model.save_pretrained(folder / name)
    opened = [LoadedModel(model.eval(), make_tokenizer()) for model in models]
    return Checkpoints(*opened, pairs(12), sources=(str(folder / "base"), str(folder / "aligned")))


def test_an_update_of_rank_one_is_found_and_keeps_all_behaviour(tmp_path: Path) -> None:
    checkpoints = two(tmp_path, 0.5)
    assert isinstance(both_weights(checkpoints)[0], StoredWeights)
    tables = Weights(ranks=[1, 2], other=str(tmp_path / "aligned")).table(checkpoints)
    table = tables["weights"].set_index("matrix")
    changed = table[table["changed_share"] > 0]
    assert list(changed.index) == ["model.layers.0.self_attn.q_proj.weight"]
    row = changed.iloc[0]
    assert (row["numerical_rank"], row["layer"], row["kind"]) == (1, 0, "q_proj")
    assert row["energy_1"] == pytest.approx(1, abs=1e-6)
    assert row["mask_overlap"] == 1
    cut = tables["weights_cut"].set_index("rank")
    assert cut.loc["1", "kept"] == pytest.approx(1, abs=1e-3)
    assert cut.loc["1", "margin"] == pytest.approx(cut.loc["whole", "margin"], rel=1e-3)
    section = weights_section(tables)
    assert "of the states’ update lies along one direction" in section.sentences[0]
    assert "matrices did not change" in " ".join(section.reading)


def test_equal_weights_have_no_rank_and_the_section_says_so(tmp_path: Path) -> None:
    tables = Weights(ranks=[1]).table(two(tmp_path, 0.0))
    assert tables["weights"]["stable_rank"].isna().all()
    assert math.isnan(tables["weights_cut"]["kept"].iloc[0])
    assert "No matrix differs" in " ".join(weights_section(tables).reading)


def test_places_are_the_models_own_blocks_and_wrong_options_are_named(tmp_path: Path) -> None:
    checkpoints = two(tmp_path, 0.1)
    places = places_of(checkpoints.base)
    assert places["model.layers.1.mlp.up_proj.weight"] == 1
    assert "model.embed_tokens.weight" not in places
    assert len(by_layer(Weights(ranks=[]).table(checkpoints)["weights"])) == 2
    with pytest.raises(UserError, match="n_components"):
        Weights(n_components=0)
