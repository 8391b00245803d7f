import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tiltmeter.errors import UserError
from tiltmeter.weights.stored import AdaptedWeights, StoredWeights, weight_changes


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, **tensors: Tensor) -> StoredWeights:
    folder.mkdir(exist_ok=True)
    for i, (name, tensor) in enumerate(tensors.items()):  # a file each, as of a large model
        save_file({name.replace("__", "."): tensor.contiguous()}, folder / f"model-{i}.safetensors")
    return StoredWeights(folder)


def write_adapter(folder: Path, tensors: dict[str, Tensor], **options: object) -> Path:
    folder.mkdir()
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | options
    (folder / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_matrices_of_two_folders_are_compared_one_by_one(tmp_path: Path) -> None:
    w, norm = noise(12, 8), torch.ones(8)
    base = write(tmp_path / "base", a__weight=w, b__weight=w, norm=norm)
    moved = w.clone()
    moved[0] += 1
    policy = write(tmp_path / "aligned", a__weight=moved, b__weight=w, norm=2 * norm)
    found = dict(weight_changes(base, policy, k=4))
    assert list(found) == ["a.weight", "b.weight"]
    assert found["a.weight"].numerical_rank == 1
    assert found["a.weight"].changed_share == pytest.approx(1 / 12)
    assert found["b.weight"].changed_share == 0


def test_an_adapter_is_its_update(tmp_path: Path) -> None:
    base = write(tmp_path / "base", m__q__weight=noise(6, 5), m__o__weight=noise(6, 5, seed=1))
    down, up = noise(2, 5, seed=2), noise(6, 2, seed=3)
    names = [f"base_model.model.m.q.lora_{side}.weight" for side in "AB"]
    folder = write_adapter(tmp_path / "adapter", dict(zip(names, (down, up), strict=True)))
    adapted = AdaptedWeights(base, folder)
    assert torch.allclose(adapted["m.q.weight"], base["m.q.weight"] + 2 * up @ down)
    found = dict(weight_changes(base, adapted, k=3))
    assert found["m.q.weight"].numerical_rank == 2
    assert found["m.o.weight"].changed_share == 0
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "use_dora": True}))
    with pytest.raises(UserError, match="use_dora is set"):
        AdaptedWeights(base, folder)


def test_an_adapter_of_another_base_or_with_whole_modules_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", m__q__weight=noise(6, 5))
    tensors = {f"base_model.model.m.v.lora_{s}.weight": noise(*n) for s, n in (("A", (2, 5)), ("B", (6, 2)))}
    with pytest.raises(UserError, match=r"adapts m\.v\.weight"):
        AdaptedWeights(base, write_adapter(tmp_path / "other", tensors))
    with pytest.raises(UserError, match="more than lora_A and lora_B"):
        AdaptedWeights(base, write_adapter(tmp_path / "more", tensors | {"base_model.model.m.bias": noise(6)}))


def test_quantised_converted_and_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="q is stored as I8: quantised or converted"):
        write(tmp_path / "int8", w=noise(3, 3), q=torch.ones(3, 3, dtype=torch.int8))
    folder = tmp_path / "nf4"
    write(folder, w=noise(3, 3))
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(UserError, match="quant_method bitsandbytes"):
        StoredWeights(folder)
    with pytest.raises(UserError, match="no weights as safetensors"):
        StoredWeights(tmp_path)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"12")
    with pytest.raises(UserError, match="cannot be read"):
        StoredWeights(tmp_path / "cut")


def test_other_names_and_shapes_are_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", w=noise(3, 3))
    with pytest.raises(UserError, match="experts is in the aligned model alone"):
        dict(weight_changes(base, write(tmp_path / "a", w=noise(3, 3), experts=noise(2, 2))))
    with pytest.raises(UserError, match=r"\(3, 3\) in the base and \(4, 3\)"):
        dict(weight_changes(base, write(tmp_path / "b", w=noise(4, 3))))
