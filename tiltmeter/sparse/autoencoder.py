"""Sparse autoencoders of hidden states, JumpReLU or TopK: x ≈ f W_dec + b_dec with few features f ≥ 0 active at a token.

Row j of the encoder's and of the decoder's matrix belongs to feature j, whatever way round a file holds them.
"""

import math
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiltmeter.errors import UserError
from tiltmeter.models.cpu_linear import linear
from tiltmeter.models.layers import is_site, site_depth
from tiltmeter.models.lora import plain_state
from tiltmeter.pairs.reference_cache import hash_weights

Norm = Literal["none", "constant_norm_rescale", "layer_norm"]
"""Change of a state before it is encoded, undone after it is decoded, in SAELens's words: none; to length √d; to mean 0 and
deviation 1 over its dimensions."""
_LAYER_NORM_EPS = 1e-5


class SaeId(NamedTuple):
    """Identity of an autoencoder: where it reads, and in which model."""

    site: str
    """Site of its states, as :mod:`tiltmeter.models.layers` names it."""
    model: str = ""
    """Name or hub id of the model whose states it was trained on; empty: not known."""
    weights: str = ""
    """sha256 of that model's weights, by :func:`weights_of`; empty: not known."""


class _Scale(NamedTuple):
    """Normalised state = (x − shift) / divide; and back: y · multiply + shift."""

    shift: Tensor | float
    divide: Tensor | float
    multiply: Tensor | float


class SparseAutoencoder(nn.Module):
    """Linear encoder, activation, linear decoder; made with zeros, to be loaded or initialised.

    Args:
        id: where it reads, and what it was trained on.
        d_model: width of the hidden states.
        width: number of features.
        norm: what states are divided by first.
        subtracts_bias: the decoder's bias is taken off before encoding (``apply_b_dec_to_input``).

    Raises:
        UserError: an unknown site or norm, or a size below 1.
    """

    kind: ClassVar[str]
    published_l0: float | None = None
    """Mean number of features active at a token, as its files say it; None: they don't."""

    def __init__(
        self, id: SaeId, d_model: int, width: int, *, norm: str = "none", subtracts_bias: bool = False
    ) -> None:
        super().__init__()
        if not is_site(id.site):
            raise UserError(
                f"sparse autoencoder: site: expected one such as layer_07 or final_pre_norm, got {id.site!r}"
            )
        if norm not in get_args(Norm):
            raise UserError(f"sparse autoencoder: norm: expected one of {', '.join(get_args(Norm))}, got {norm!r}")
        if d_model < 1 or width < 1:
            raise UserError(
                f"sparse autoencoder: expected at least one feature of one dimension, got {width} of {d_model}"
            )
        self.id, self.d_model, self.width, self.norm, self.subtracts_bias = id, d_model, width, norm, subtracts_bias
        self.encoder_weight = nn.Parameter(torch.zeros(width, d_model))
        self.encoder_bias = nn.Parameter(torch.zeros(width))
        self.decoder_weight = nn.Parameter(torch.zeros(width, d_model))
        self.decoder_bias = nn.Parameter(torch.zeros(d_model))

    @abstractmethod
    def activate(self, pre: Float[Tensor, "*row width"]) -> Float[Tensor, "*row width"]:
        """Features from pre-activations."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Arguments of the constructor that only this kind has."""

    @property
    def site(self) -> str:
        """Site of its states."""
        return self.id.site

    def describe(self) -> str:
        """Line that says what it is: kind, number of features, site, model, norm, and L0 where its files have it."""
        kind = " ".join([self.kind, *(f"{name}={value}" for name, value in self.options().items())])
        model = f" of {self.id.model}" if self.id.model else ""
        norm = "states as they are" if self.norm == "none" else f"states by {self.norm}"
        l0 = "" if self.published_l0 is None else f", L0 {self.published_l0:g}"
        return f"{self.width} features ({kind}) of {self.site}, width {self.d_model}{model}, {norm}{l0}"

    def pre_activations(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row width"]:
        """x̃ W_encᵀ + b_enc, x̃ the normalised state, less the decoder's bias where that is taken off."""
        scale = self._scale(x)
        rows = ((x - scale.shift) / scale.divide).to(self.encoder_weight.dtype)
        return linear(rows - self.decoder_bias if self.subtracts_bias else rows, self.encoder_weight, self.encoder_bias)

    def encode(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row width"]:
        """Features of hidden states, f ≥ 0, in the dtype of the weights."""
        return self.activate(self.pre_activations(x))

    def decode(
        self, features: Float[Tensor, "*row width"], like: Float[Tensor, "*row d_model"] | None = None
    ) -> Float[Tensor, "*row d_model"]:
        """Hidden states that features stand for: f W_dec + b_dec, the norm undone.

        Args:
            like: states that the features are of, whose norm is put back; needed unless ``norm`` is ``none``.

        Raises:
            ValueError: it is needed and missing.
        """
        made = linear(features, self.decoder_weight.t(), self.decoder_bias)
        if self.norm == "none":
            return made
        if like is None:
            raise ValueError(f"decode: like: expected the states that were encoded, whose {self.norm} is put back")
        scale = self._scale(like)
        return made * scale.multiply + scale.shift

    def move(
        self, change: Float[Tensor, "*row width"], like: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "*row d_model"]:
        """Change of the decoded state by a change of features: Δf W_dec, the norm undone.

        Args:
            like: states that the features are of.
        """
        moved = linear(change, self.decoder_weight.t())
        return moved if self.norm == "none" else moved * self._scale(like).multiply

    def forward(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """Reconstructed hidden states, SAE(x)."""
        return self.decode(self.encode(x), like=x)

    @torch.no_grad()
    def error(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """x − SAE(x), without gradient: what the features don't hold."""
        return x - self(x)

    def check_fits(self, model: PreTrainedModel, *, any_model: bool = False) -> None:
        """Check that a model has this site, this width, and is the one whose states it was trained on, as far as that is known.

        Args:
            any_model: another model of that shape will do, such as a chat model in the place of its base.

        Raises:
            UserError: it isn't.
        """
        what = f"sparse autoencoder of {self.site}"
        site_depth(self.site, model.config.num_hidden_layers)
        if self.d_model != model.config.hidden_size:
            raise UserError(
                f"{what}: expected width {model.config.hidden_size}, that of the model's states, got {self.d_model}; take one "
                "that was trained on this model"
            )
        name = str(model.config._name_or_path)
        is_named = bool(self.id.model and name) and not Path(name).is_dir() and not self.id.weights
        is_other = is_named and _short(name) != _short(self.id.model)
        if not any_model and (is_other or (self.id.weights and self.id.weights != weights_of(model))):
            raise UserError(
                f"{what}: trained on {self.id.model or 'a model'} with other weights than {name or 'this model'}; take one of this "
                "model, or any_model=True where that is meant"
            )

    def _scale(self, x: Tensor) -> _Scale:
        if self.norm == "none":
            return _Scale(0.0, 1.0, 1.0)
        if self.norm == "constant_norm_rescale":
            length = x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / math.sqrt(self.d_model)
            return _Scale(0.0, length, length)
        deviation = x.std(dim=-1, keepdim=True)
        return _Scale(x.mean(dim=-1, keepdim=True), deviation + _LAYER_NORM_EPS, deviation)


class JumpReLU(SparseAutoencoder):
    """f_j = p_j where p_j > max(θ_j, 0), else 0 (arXiv 2407.14435); with θ = 0 the ReLU autoencoder."""

    kind = "jumprelu"

    def __init__(self, id: SaeId, d_model: int, width: int, **options: Any) -> None:
        super().__init__(id, d_model, width, **options)
        self.threshold = nn.Parameter(torch.zeros(width))

    def activate(self, pre: Float[Tensor, "*row width"]) -> Float[Tensor, "*row width"]:
        """Pre-activations above their thresholds, which have no gradient."""
        return pre * (pre > self.threshold.detach().clamp(min=0))

    def options(self) -> dict[str, Any]:
        """No argument of its own."""
        return {}


class TopK(SparseAutoencoder):
    """f keeps the k largest pre-activations of a token, and of them those above 0 (arXiv 2406.04093).

    Args:
        k: most features active at a token.

    Raises:
        UserError: k is below 1 or above the number of features.
    """

    kind = "topk"

    def __init__(self, id: SaeId, d_model: int, width: int, *, k: int, **options: Any) -> None:
        super().__init__(id, d_model, width, **options)
        if not 1 <= k <= width:
            raise UserError(f"sparse autoencoder: k: expected 1 … {width}, the number of features, got {k}")
        self.k = k

    def activate(self, pre: Float[Tensor, "*row width"]) -> Float[Tensor, "*row width"]:
        """The k largest of each row, never below 0."""
        return keep_largest(pre, self.k)

    def options(self) -> dict[str, Any]:
        """The k that it keeps."""
        return {"k": self.k}


KINDS: dict[str, type[JumpReLU] | type[TopK]] = {each.kind: each for each in (JumpReLU, TopK)}
"""Kind, as files say it → its class."""


def keep_largest(pre: Float[Tensor, "*row width"], k: int) -> Float[Tensor, "*row width"]:
    """The k largest entries of each row, those below 0 as 0, and 0 elsewhere.

    >>> keep_largest(torch.tensor([3.0, -1.0, 2.0, 1.0]), 2).tolist()
    [3.0, 0.0, 2.0, 0.0]
    """
    values, places = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, places, values.relu())


def weights_of(model: PreTrainedModel) -> str:
    """sha256 of a model's weights in bfloat16, so that it is the same in any precision; without what is put into it (adapters)."""
    return hash_weights({name: weight.bfloat16() for name, weight in plain_state(model).items()})


def _short(name: str) -> str:
    """Name of a model without its owner: ``google/gemma-2-2b`` and ``gemma-2-2b`` are one."""
    return name.rstrip("/").rpartition("/")[2].lower()
