"""A steering vector: a direction with magnitude, which one it is, and how it was made; on disk as safetensors."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tiltmeter.errors import UserError
from tiltmeter.files import write_atomically
from tiltmeter.geometry import consistency
from tiltmeter.models.layers import site_depth
from tiltmeter.states.positions import Position, check_position

V_STAR, V_BAR = "v*", "v_bar"
"""Kinds: mean of h_policy - h_base; mean of unembedding rows, chosen less rejected."""
DIFFERENCE, PROBE = "difference_of_means", "probe"
SINGULAR_RAW, SINGULAR_CENTRED, PCA_RAW, PCA_CENTRED = "singular_raw", "singular_centred", "pca_raw", "pca_centred"
SHUFFLED = "shuffled_layer"
RANDOM, RANDOM_PCA, RANDOM_COVARIANCE = "random", "random_pca", "random_covariance"
UNRELATED = "unrelated_contrast"
RANDOM_KINDS = (RANDOM, RANDOM_PCA, RANDOM_COVARIANCE, UNRELATED)
"""Kinds of which many are drawn, and whose distribution the others are judged against."""
TRAINED = "trained"
"""Kind: a vector that was trained with a run's loss."""
OWN = "own"
"""Kind: a vector of the user's own."""
_METADATA_KEY = "steering_vectors"


class VectorId(NamedTuple):
    """Identity of a vector. Tables and files keep these fields; names are made of them and never read back.

    >>> VectorId("singular_raw", "layer_07", "prompt_last", draw=2)._replace(source="sft_chosen").draw
    2
    """

    kind: str
    site: str
    """Site that it lives at, as :mod:`tiltmeter.models.layers` names it."""
    position: Position | None = None
    """Position of the states that it was made of; None: at several, or at none (rows of the unembedding)."""
    draw: int = 0
    """Number among several of its kind, from 1; 0: there is one."""
    source: str = ""
    """Run or file that it comes from; empty: the models that it steers."""


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A vector of hidden-state space that is added to, or taken out of, hidden states at one site.

    Args:
        id: which vector.
        values: [d_model], float32, finite.
        made: how, in words, for example ``mean of h_policy - h_base``.
        provenance: data, models, number of pairs, seed …; plain strings and numbers.

    Raises:
        UserError: an unknown site or position, values of another shape or dtype or not finite, provenance that isn't plain.

    >>> a = SteeringVector(VectorId(OWN, "layer_07"), torch.tensor([3.0, 4.0]), made="by hand")
    >>> a.scaled(2).values.tolist(), a.norm()
    ([6.0, 8.0], 5.0)
    """

    id: VectorId
    values: Tensor
    made: str = field(kw_only=True)
    provenance: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        """Check everything that can be checked without a model."""
        site_depth(self.site, sys.maxsize)  # no model yet: any depth
        if self.id.position is not None:
            check_position(self.id.position)
        if self.values.dtype != torch.float32 or self.values.ndim != 1 or not len(self.values):
            raise UserError(
                f"steering vector: {self.site}: expected one row of float32, got {self.values.dtype} of shape "
                f"{tuple(self.values.shape)}"
            )
        if not bool(self.values.isfinite().all()):
            raise UserError(f"steering vector: {self.site}: expected finite values, got NaN or infinity; make it again")
        odd = [key for key, x in self.provenance.items() if not isinstance(key, str) or not _is_plain(x)]
        if odd:
            raise UserError(
                f"steering vector: provenance: expected strings and numbers, got something else at {odd[0]!r}"
            )

    @property
    def site(self) -> str:
        """Site where it lives."""
        return self.id.site

    @property
    def d_model(self) -> int:
        """Width of the hidden states that it belongs to."""
        return len(self.values)

    def check_fits(self, model: PreTrainedModel) -> None:
        """Check that a model has this site and this width. Raises UserError."""
        check_site_and_width(model, self.site, self.d_model)

    def norm(self) -> float:
        """‖v‖ in activation units."""
        return float(self.values.double().norm())

    def cosine(self, other: "SteeringVector") -> float:
        """⟨a, b⟩ / (‖a‖ ‖b‖) in float64; NaN where either is zero.

        Raises:
            UserError: a vector of another site or width, which lives in another space.
        """
        if (self.site, self.d_model) != (other.site, other.d_model):
            raise UserError(
                f"steering vector: {self.site} of width {self.d_model} and {other.site} of width {other.d_model} live in "
                "different spaces; compare vectors of one site and one model"
            )
        return float(consistency.cosine(self.values, other.values))

    def scaled(self, factor: float | int) -> "SteeringVector":
        """Scale the length by ``factor``; the direction stays."""
        return replace(self, values=self.values * factor, made=f"{factor:g} ({self.made})")


def check_site_and_width(model: PreTrainedModel, site: str, d_model: int) -> None:
    """Check that a model has a site, and hidden states of a width.

    Raises:
        UserError: it doesn't.
    """
    site_depth(site, model.config.num_hidden_layers)
    if d_model != model.config.hidden_size:
        raise UserError(
            f"steering vector: {site}: expected width {model.config.hidden_size}, that of the model's hidden states, got "
            f"{d_model}; use a vector made with this model or one of its size"
        )


def save_vectors(path: Path, vectors: Mapping[str, SteeringVector], *, about: Mapping[str, str] | None = None) -> None:
    """Write vectors by name into one safetensors file, with all that is known about each; whole or not at all.

    Args:
        about: facts about the whole file.

    Raises:
        FailedWrite: the disk is full or not writable.
    """
    known = {name: v.id._asdict() | {"made": v.made, "provenance": dict(v.provenance)} for name, v in vectors.items()}
    tensors = {name: v.values.detach().to("cpu", copy=True).contiguous() for name, v in vectors.items()}
    metadata = {**(about or {}), _METADATA_KEY: json.dumps(known, sort_keys=True, ensure_ascii=False)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_vectors(path: Path) -> dict[str, SteeringVector]:
    """Vectors by name, of a file of :func:`save_vectors`; earlier versions of it are read too.

    Raises:
        UserError: no such file, a damaged one, or one that holds something else; the file is named.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file (expected a safetensors file of steering vectors)") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or no safetensors file ({error}); restore it from a copy") from error
    try:
        known = json.loads(metadata[_METADATA_KEY]) if _METADATA_KEY in metadata else _first_format(tensors, metadata)
        return {name: _vector(values, **known[name]) for name, values in tensors.items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: expected steering vectors and how they were made, found something else ({error!r})"
        ) from error


def _vector(values: Tensor, *, kind: str = OWN, **known: Any) -> SteeringVector:
    """A vector of a file; sweeps used to write no kind."""
    where = {name: known.pop(name) for name in VectorId._fields if name in known}
    return SteeringVector(VectorId(kind, **where), values, **known)


def _is_plain(fact: object) -> bool:
    """A string or a finite number, which any JSON reader gives back as it was."""
    return isinstance(fact, str | int) or (isinstance(fact, float) and math.isfinite(fact))


def _first_format(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Facts about the vectors of a training run's file of the first format: tensors at ``<site>`` or ``<position>/<site>``."""
    made = metadata["what"]
    provenance = {key: x for key, x in metadata.items() if key not in ("what", "format")}
    known = {}
    for name in tensors:
        position, _, site = name.rpartition("/")
        place = {"kind": V_STAR, "site": site, "position": position or "prompt_last"}
        known[name] = place | {"made": made, "provenance": provenance}
    return known
