"""Optimizers by name, of torch and, in 8 bits, of bitsandbytes; their options are checked before a model is touched."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from tiltmeter.errors import UserError

_CLASSES = {
    name.lower(): ("torch.optim", name)
    for name in ("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "Adafactor", "SGD")
} | {
    "adamw_8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "paged_adamw_8bit": ("bitsandbytes.optim", "PagedAdamW8bit"),
    "lion_8bit": ("bitsandbytes.optim", "Lion8bit"),
    "rmsprop_8bit": ("bitsandbytes.optim", "RMSprop8bit"),
}
_OF_WHOLE_WEIGHTS = {"adafactor", *(name for name in _CLASSES if name.endswith("_8bit"))}
"""Optimizers that read whole rows, columns or blocks of a weight; refused under FSDP, where a process holds a part of each."""
_NEVER = {"self", "params", "args", "maximize", "differentiable"}
_KEYS = {"lr": "learning_rate", "weight_decay": "weight_decay", "betas": "betas"}
"""Options that have a key of their own in the module."""


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer by name and its options; making it is a separate step, so that wrong ones are refused at once.

    Args:
        name: ``adamw`` …, one of torch's, or one of bitsandbytes' that end in ``_8bit``.
        learning_rate, weight_decay: of any.
        betas: of those that have them; None: the optimizer's own.
        options: any others of its constructor.

    Raises:
        UserError: an unknown name or option, a value that it refuses, or a package or GPU that is missing.
    """

    name: str
    learning_rate: float
    weight_decay: float
    betas: Sequence[float] | None
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Try the options on one number."""
        if self.name not in _CLASSES:
            raise UserError(f"module.optimizer: expected one of {', '.join(_CLASSES)}, got {self.name}")
        package = _CLASSES[self.name][0].partition(".")[0]
        if find_spec(package) is None:
            raise UserError(f"module.optimizer={self.name}: needs {package}, which isn't here; pip install {package}")
        if self.name.startswith("paged_") and not torch.cuda.is_available():
            without = self.name.removeprefix("paged_")
            raise UserError(f"module.optimizer={self.name}: needs a GPU, and none was found here; take {without}")
        known = set(inspect.signature(self._class).parameters) - _NEVER
        for key in self.options:
            if key in _KEYS:
                raise UserError(f"module.optimizer_options.{key}: set module.{_KEYS[key]} instead")
            if key not in known:
                has = ", ".join(sorted(known - _KEYS.keys()))
                raise UserError(f"module.optimizer_options.{key}: {self.name} has no such option (it has: {has})")
        if self.betas is not None and len(self.betas) != 2:
            raise UserError(f"module.betas: expected two numbers, got {len(self.betas)}")
        if self.betas is not None and "betas" not in known:
            raise UserError(f"module.betas: {self.name} has none; leave it out, or see module.optimizer_options")
        try:
            self.make([Parameter(torch.zeros(1))])
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"module.optimizer_options: {self.name} refuses them: {error}") from error

    def check_sharding(self) -> None:
        """Refuse to be used where every process holds a part of each weight.

        Raises:
            UserError: it looks at whole weights.
        """
        if self.name in _OF_WHOLE_WEIGHTS:
            others = ", ".join(name for name in _CLASSES if name not in _OF_WHOLE_WEIGHTS)
            raise UserError(
                f"module.optimizer={self.name}: it looks at whole weights, of which a process has a part with trainer=fsdp; "
                f"take one of {others}"
            )

    def make(self, parameters: Iterable[Parameter]) -> Optimizer:
        """The optimizer of some parameters."""
        betas = {} if self.betas is None else {"betas": tuple(self.betas)}
        options = {
            key: tuple(v) if isinstance(v, Sequence) and not isinstance(v, str) else v
            for key, v in self.options.items()
        }
        made: Optimizer = self._class(
            parameters, lr=self.learning_rate, weight_decay=self.weight_decay, **betas, **options
        )
        return made

    @property
    def _class(self) -> Any:
        module, name = _CLASSES[self.name]
        return getattr(import_module(module), name)
