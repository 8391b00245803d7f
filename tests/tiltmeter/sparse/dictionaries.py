"""Tiny sparse autoencoders for tests: random weights, and files of every published format with the names that it uses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_MODEL, WIDTH = 6, 10


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def published(*, seed: int = 0, d_model: int = D_MODEL, width: int = WIDTH) -> dict[str, Tensor]:
    """Weights as Gemma Scope and SAELens lay them out: W_enc [d_model, width], W_dec [width, d_model]."""
    shapes = {"W_enc": (d_model, width), "W_dec": (width, d_model), "b_enc": (width,), "b_dec": (d_model,)}
    made = {name: noise(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    return made | {"threshold": noise(width, seed=seed + 9).abs()}


def jump_relu_by_hand(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Features and reconstruction in float64 loops over features, sharing no code with tiltmeter."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    features = torch.zeros(len(x), len(w["b_enc"]), dtype=torch.float64)
    for n, row in enumerate(x.double()):
        for j in range(features.shape[1]):
            pre = float((row * w["W_enc"][:, j]).sum() + w["b_enc"][j])
            features[n, j] = pre if pre > float(w["threshold"][j]) else 0.0
    made = torch.stack([sum(f[j] * w["W_dec"][j] for j in range(len(f))) + w["b_dec"] for f in features])
    return features, made


def gemma_1(folder: Path, weights: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    return folder


def gemma_2(folder: Path, weights: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    small = {name.replace("W_", "w_"): tensor for name, tensor in weights.items()}
    save_file(small, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def saelens(folder: Path, weights: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
