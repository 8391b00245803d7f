import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from analysis.open.stored_head import unembedding_rows
from tests.analysis import planted_geometry as planted
from tiltmeter.errors import UserError


def test_an_unembedding_is_read_from_one_file_or_several_or_not_at_all(tmp_path: Path) -> None:
    weight = planted.unembedding_weight().bfloat16()
    save_file({"model.embed_tokens.weight": weight, "other": weight + 1}, tmp_path / "model.safetensors")
    found = unembedding_rows(tmp_path, [3, 1, 3])
    assert found is not None
    assert found.dtype == torch.float32
    assert torch.equal(found, weight[[3, 1, 3]].float())
    parts = tmp_path / "parts"
    parts.mkdir()
    assert unembedding_rows(parts, [1]) is None
    save_file({"lm_head.weight": weight}, parts / "model-2.safetensors")
    places = {"model.embed_tokens.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = unembedding_rows(parts, [2])
    assert found is not None
    assert torch.equal(found, weight[2:3].float())
    save_file({"strange": weight}, tmp_path / "model.safetensors")
    assert unembedding_rows(tmp_path, [1]) is None


def test_an_unembedding_that_is_damaged_or_of_another_model_is_named(tmp_path: Path) -> None:
    save_file({"lm_head.weight": planted.unembedding_weight()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: has 10 tokens, so no token 10"):
        unembedding_rows(tmp_path, [10])
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        unembedding_rows(tmp_path, [1])
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index\.json: damaged"):
        unembedding_rows(tmp_path, [1])
