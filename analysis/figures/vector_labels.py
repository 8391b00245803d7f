"""Steering vectors, operators and sites as figures and tables of a report call them."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.open.observations import site_name
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM
from tiltmeter.steering.vector import (
    DIFFERENCE,
    OWN,
    PCA_CENTRED,
    PCA_RAW,
    PROBE,
    SHUFFLED,
    SINGULAR_CENTRED,
    SINGULAR_RAW,
    V_BAR,
)

_HOW = {
    "add": ("added", "subtracted"),
    "subtract": ("subtracted", "added"),
    "project_out": ("projected out", "projected out"),
    "clamp": ("clamped", "clamped"),
    "rotate": ("rotated to", "rotated away from"),
    "add_keeping_norm": ("added, norms kept", "subtracted, norms kept"),
}
"""Operator → words for what it does to the base, and to the aligned model."""
_DOING = {"interpolation": "Adding", "inversion": "Subtracting"}
_WORDS = {"interpolation": "added to the base", "inversion": "subtracted from the aligned model"}
LAMBDA = {
    "project_out": "λ is the share of what a state has along a vector that is taken out; λ = 0 is the model as it is.",
    "clamp": "λ is what a state has along a vector afterwards, in activation units; λ = 0 is the model as it is.",
    "rotate": "λ is the angle in radians by which a state turns from the base’s mean state towards a vector.",
}
NAMES = {
    V_BAR: "v̄",
    SINGULAR_RAW: "u{} of the update",
    SINGULAR_CENTRED: "u{} of the update, centred",
    PCA_RAW: "PC{} of the base, raw",
    PCA_CENTRED: "PC{} of the base, centred",
    DIFFERENCE: "chosen − rejected",
    PROBE: "preference probe",
    SHUFFLED: "v* of another layer",
}
_SHORT = {FINAL_PRE_NORM: "last layer", FINAL_POST_NORM: "logit bias"}
"""Sites in a legend or table; after the final norm, steering is nothing but a logit bias."""
_AT_RESPONSES = (DIFFERENCE, PROBE)
"""Kinds that are always read there, so that their names need not say it."""
_LONGEST = 26
"""Characters of a name."""


def how(table: pd.DataFrame, direction: str) -> str:
    """The operator along vectors, such as ``added``."""
    return _HOW[table["operator"].iloc[0]][direction == "inversion"]


def doing(table: pd.DataFrame, direction: str) -> str:
    """Start of a sentence, such as ``Adding v*``."""
    is_added = table["operator"].iloc[0] == "add"
    return f"{_DOING[direction]} v*" if is_added else f"v* {how(table, direction)}"


def words(table: pd.DataFrame, direction: str) -> str:
    """The operator and the model it was used on, such as ``added to the base``."""
    is_added = table["operator"].iloc[0] == "add"
    start = {"interpolation": "base", "inversion": "aligned model"}[direction]
    return _WORDS[direction] if is_added else f"{how(table, direction)} in the {start}"


def vector_labels(vectors: pd.DataFrame, settings: Mapping[str, Any]) -> dict[str, str]:
    """Vectors on the page, by name: what each is, and where its states were read when that is not the usual place.

    Args:
        vectors: :func:`analysis.steering.table.read_vectors`; of a sweep that wrote no kinds there are no labels.
        settings: of the sweep.
    """
    return {row["vector"]: _label(row, settings["position"]) for _, row in vectors.iterrows() if "kind" in row}


def _label(row: pd.Series, usual: str) -> str:
    """Label of a vector.

    >>> row = pd.Series({"kind": "singular_raw", "number": 2, "source": "dpo", "position": "diverge"})
    >>> _label(row, "diverge"), _label(row, "prompt_last")
    ('u2 of the update of dpo', 'u2 of the update of dpo a…')
    """
    text = str(row["vector"]) if row["kind"] == OWN else NAMES.get(row["kind"], row["kind"]).format(row["number"])
    if row["kind"] != OWN and row["source"]:
        text += f" of {row['source']}"
    if row["position"] not in ("", usual) and row["kind"] not in _AT_RESPONSES:
        text += f" at {row['position'].replace('_', ' ')}"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def short_site(site: str) -> str:
    """A site where there is little room.

    >>> short_site("layer_03"), short_site("final_post_norm")
    ('layer 3', 'logit bias')
    """
    return _SHORT.get(site, site_name(site))


def how_many(n_random: Mapping[str, int]) -> str:
    """Number of random vectors at a site, in words.

    >>> how_many({"layer_00": 20, "final_post_norm": 99})
    '20 to 99'
    """
    return " to ".join(str(n) for n in dict.fromkeys((min(n_random.values()), max(n_random.values()))))
