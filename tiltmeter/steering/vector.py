"""A steering vector: a direction with magnitude, the site it belongs to, and where it comes from; on disk as safetensors."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tiltmeter.errors import UserError
from tiltmeter.files import write_atomically
from tiltmeter.geometry import consistency
from tiltmeter.metric_names import split_place
from tiltmeter.models.layers import site_depth
from tiltmeter.states.positions import check_position

_METADATA_KEY = "steering_vectors"


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A vector of hidden-state space that is added to, or taken out of, hidden states at one site.

    Sums, differences and multiples are steering vectors again and say what they were made of; vectors of different sites
    or widths live in different spaces and don't combine.

    Args:
        site: as :mod:`tiltmeter.models.layers` names it.
        values: [d_model], float32, finite.
        made: how, in words, for example ``mean of h_policy - h_base``.
        position: where the states that it was made of were read; None: at several, or at none (rows of the unembedding).
        provenance: data, models, number of pairs, seed …; plain strings and numbers.

    Raises:
        UserError: an unknown site or position, values of another shape or dtype or not finite, provenance that isn't plain.

    >>> a = SteeringVector("layer_07", torch.tensor([3.0, 4.0]), made="by hand")
    >>> (2 * a).values.tolist(), (2 * a).made, a.norm(), a.unit().values.tolist()
    ([6.0, 8.0], '2 (by hand)', 5.0, [0.6000000238418579, 0.800000011920929])
    """

    site: str
    values: Tensor
    made: str = field(kw_only=True)
    position: str | None = field(default=None, kw_only=True)
    provenance: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        """Check everything that can be checked without a model."""
        site_depth(self.site, sys.maxsize)  # no model yet: any depth
        if self.position is not None:
            check_position(self.position)
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
    def d_model(self) -> int:
        """Width of the hidden states that it belongs to."""
        return len(self.values)

    def check_fits(self, model: PreTrainedModel) -> None:
        """Check that a model has this site and this width.

        Raises:
            UserError: it doesn't.
        """
        check_site_and_width(model, self.site, self.d_model)

    def norm(self) -> float:
        """‖v‖ in activation units."""
        return float(self.values.double().norm())

    def unit(self) -> "SteeringVector":
        """v / ‖v‖.

        Raises:
            UserError: a vector of zeros has no direction.
        """
        norm = self.norm()
        if norm == 0:
            raise UserError(f"steering vector: {self.site}: a vector of zeros ({self.made}) has no direction")
        return replace(self, values=(self.values.double() / norm).float(), made=f"unit of ({self.made})")

    def cosine(self, other: "SteeringVector") -> float:
        """⟨a, b⟩ / (‖a‖ ‖b‖) in float64; NaN where either is zero.

        Raises:
            UserError: a vector of another site or width.
        """
        self._check_combines(other)
        return float(consistency.cosine(self.values, other.values))

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        self._check_combines(other)
        return self._combined(other, self.values + other.values, "+")

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        self._check_combines(other)
        return self._combined(other, self.values - other.values, "-")

    def __mul__(self, factor: float | int) -> "SteeringVector":
        return replace(self, values=self.values * factor, made=f"{factor:g} ({self.made})")

    __rmul__ = __mul__

    def _check_combines(self, other: "SteeringVector") -> None:
        if (self.site, self.d_model) != (other.site, other.d_model):
            raise UserError(
                f"steering vector: {self.site} of width {self.d_model} and {other.site} of width {other.d_model} live in "
                "different spaces; combine vectors of one site and one model"
            )

    def _combined(self, other: "SteeringVector", values: Tensor, sign: str) -> "SteeringVector":
        keys = dict.fromkeys([*self.provenance, *other.provenance])
        sides = {key: (self.provenance.get(key, "-"), other.provenance.get(key, "-")) for key in keys}
        return SteeringVector(
            self.site,
            values,
            made=f"({self.made}) {sign} ({other.made})",
            position=self.position if self.position == other.position else None,
            provenance={key: a if a == b else f"{a} | {b}" for key, (a, b) in sides.items()},
        )


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


def save_vectors(path: Path, vectors: Mapping[str, SteeringVector]) -> None:
    """Write vectors by name into one safetensors file, with all that is known about each; whole or not at all.

    Raises:
        FailedWrite: the disk is full or not writable.
    """
    known = {
        name: {"site": v.site, "made": v.made, "position": v.position, "provenance": dict(v.provenance)}
        for name, v in vectors.items()
    }
    tensors = {name: v.values.detach().to("cpu", copy=True).contiguous() for name, v in vectors.items()}
    metadata = {_METADATA_KEY: json.dumps(known, sort_keys=True, ensure_ascii=False)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_vectors(path: Path) -> dict[str, SteeringVector]:
    """Vectors by name: of a file of :func:`save_vectors`, or of a run's ``vectors/steering.safetensors``.

    A run's file names its tensors as :func:`tiltmeter.metric_names.place` does, ``<site>`` or
    ``<position>/<site>``, and says once for all of them how they were made.

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
        known = json.loads(metadata[_METADATA_KEY]) if _METADATA_KEY in metadata else None
        return {
            name: SteeringVector(values=values, **(_of_a_run(name, metadata) if known is None else known[name]))
            for name, values in tensors.items()
        }
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: expected steering vectors and how they were made, found something else ({error!r})"
        ) from error


def _is_plain(fact: object) -> bool:
    """A string or a finite number, which any JSON reader gives back as it was."""
    return isinstance(fact, str | int) or (isinstance(fact, float) and math.isfinite(fact))


def _of_a_run(name: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the callback DirectionalConsistency says about a vector, in its name and in the file's metadata."""
    place = split_place(name)
    if place is None or "what" not in metadata:
        raise KeyError(name)
    provenance = {key: x for key, x in metadata.items() if key not in ("what", "format")}
    return {"site": place[0], "position": place[1], "made": metadata["what"], "provenance": provenance}
