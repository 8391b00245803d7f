"""Weights of a model read from its files one tensor at a time: a folder of safetensors, or a LoRA adapter beside its base."""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tiltmeter.errors import UserError
from tiltmeter.weights.changes import WeightChange, weight_change

PLAIN = ("F64", "F32", "F16", "BF16")
"""Types of numbers, as safetensors names them, that are weights as they are."""
_PREFIX = "base_model.model."


class StoredWeights(Mapping[str, Tensor]):
    """Name → tensor of the safetensors files of a folder; each is read when it is asked for, and not kept.

    Args:
        folder: of ``save_pretrained``.

    Raises:
        UserError: no safetensors there, damaged files, or weights that are quantised; names the tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._refuse_quantized()
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder}: no weights as safetensors (expected model.safetensors); save the model again")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            for name, (shape, kind) in _header(file).items():
                if kind not in PLAIN:
                    raise UserError(
                        f"{file}: {name} is stored as {kind}: quantised or converted weights, whose changes are those of a code; "
                        f"expected {', '.join(PLAIN)}; give the plain weights"
                    )
                self._shapes[name], self._files[name] = shape, file

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor, in the type that it is stored in."""
        with safe_open(self._files[name], framework="pt") as opened:
            found: Tensor = opened.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of the files."""
        return iter(self._shapes)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the files' headers."""
        return self._shapes[name]

    def _refuse_quantized(self) -> None:
        path = self.folder / "config.json"
        try:
            said: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: damaged ({str(error)[:80]}); restore it") from error
        if how := said.get("quantization_config") if isinstance(said, dict) else None:
            method = how.get("quant_method", "not named") if isinstance(how, dict) else "not named"
            raise UserError(
                f"{self.folder}: quantised weights (quant_method {method}), whose changes are those of a code; give the plain "
                "weights"
            )


class LoraMap(NamedTuple):
    """One adapted matrix: ΔW = scale · B A."""

    down: str
    up: str
    scale: float
    is_turned: bool
    """Whether the base holds the matrix as [in, out]."""


class AdaptedWeights(Mapping[str, Tensor]):
    """Weights of a base with a LoRA adapter added: W + scale · B A, a matrix at a time in float32; all others are the base's.

    Args:
        base: the base's weights.
        folder: of the adapter.

    Raises:
        UserError: no LoRA adapter there, one that is more than a sum (DoRA, trained biases or whole modules), or of another base.
    """

    def __init__(self, base: Mapping[str, Tensor], folder: Path) -> None:
        self.base, self.folder = base, folder
        self._file = folder / "adapter_model.safetensors"
        try:
            self._options: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: no LoRA adapter that can be read ({str(error)[:80]}); restore it") from error
        for name in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern"):
            if self._options.get(name):
                raise UserError(f"{folder}: {name} is set, so it is no plain sum; merge it and give the whole model")
        if strange := [name for name in self.maps if name not in base]:
            raise UserError(f"{folder}: it adapts {strange[0]}, which the base doesn't have; give its own base")

    @cached_property
    def maps(self) -> dict[str, LoraMap]:
        """Adapted matrices by their names in the base."""
        shapes = _header(self._file)
        rank, alpha = float(self._options["r"]), float(self._options["lora_alpha"])
        scale = alpha / rank**0.5 if self._options.get("use_rslora") else alpha / rank
        turned = bool(self._options.get("fan_in_fan_out"))
        found = {}
        for name in shapes:
            if ".lora_A." in name:
                module = name.partition(".lora_A.")[0].removeprefix(_PREFIX)
                found[f"{module}.weight"] = LoraMap(name, name.replace(".lora_A.", ".lora_B."), scale, turned)
        if len(found) * 2 != len(shapes):
            raise UserError(f"{self._file}: it holds more than lora_A and lora_B; merge it and give the whole model")
        return found

    def update(self, name: str) -> Tensor:
        """ΔW of an adapted matrix, float32."""
        made = self.maps[name]
        with safe_open(self._file, framework="pt") as opened:
            delta: Tensor = made.scale * opened.get_tensor(made.up).float() @ opened.get_tensor(made.down).float()
        return delta.T if made.is_turned else delta

    def __getitem__(self, name: str) -> Tensor:
        """The adapted matrix, or the base's own tensor."""
        own = self.base[name]
        return own.float() + self.update(name) if name in self.maps else own

    def __iter__(self) -> Iterator[str]:
        """Names of the base."""
        return iter(self.base)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.base)


def check_same_form(base: Mapping[str, Tensor], policy: Mapping[str, Tensor]) -> None:
    """Refuse weights of two models that aren't of one form, by their names. Raises UserError."""
    for name in sorted({*base} ^ {*policy}):
        where = "base" if name in base else "aligned model"
        raise UserError(
            f"weights: {name} is in the {where} alone: two models, or one of them converted into another form; give two "
            "checkpoints of one model in one form"
        )


def weight_changes(
    base: Mapping[str, Tensor], policy: Mapping[str, Tensor], *, k: int = 16
) -> Iterator[tuple[str, WeightChange]]:
    """Every matrix's name and change, one at a time: memory is that of one matrix; vectors are passed over.

    Raises:
        UserError: names or shapes that differ.
    """
    check_same_form(base, policy)
    for name in base:
        one, other = base[name], policy[name]
        if one.shape != other.shape:
            raise UserError(
                f"weights: {name} is of shape {tuple(one.shape)} in the base and {tuple(other.shape)} in the aligned model; give "
                "two checkpoints of one model"
            )
        if one.ndim > 1 and torch.is_floating_point(one):
            yield name, weight_change(one.flatten(1), other.flatten(1), k=k)


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name → shape and type of every tensor of a file, without reading one. Raises UserError."""
    try:
        with safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({str(error)[:80]}); restore it") from error
