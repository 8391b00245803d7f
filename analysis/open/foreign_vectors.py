"""Vectors that are not estimated from this pair of models: v* of other runs, opened as data, and files of the user's own."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from analysis.open.models import LoadedModel, load_model
from analysis.open.runs import Run, open_run
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.steering.vector import SteeringVector, load_vectors

_LONGEST = 30
"""Characters of the name of an arm that is shown."""


def runs_by_arm(folders: Sequence[Path]) -> list[tuple[str, Run]]:
    """Runs by their arm, which counts on where two have the same. Raises UserError."""
    found: list[tuple[str, Run]] = []
    seen: Counter[str] = Counter()
    for folder in folders:
        try:
            run = open_run(folder)
        except UserError as error:
            raise UserError(f"steering.controls: {error}") from error
        arm = str(run.setting("arm") or "")
        arm = arm if arm.isidentifier() and len(arm) <= _LONGEST else "run"
        seen[arm] += 1
        found.append((arm + (f"_{seen[arm]}" if seen[arm] > 1 else ""), run))
    return found


def open_like(run: Run, own: LoadedModel, dtype: str) -> tuple[LoadedModel, LoadedModel]:
    """The two models of another run. Raises UserError: of another shape or tokenizer than our own."""
    shape = _shape(own)
    opened = []
    for where, revision in (run.base_source, (str(run.aligned), None)):
        model = load_model(where, revision=revision, dtype=DTYPES[dtype], device=str(own.model.device))
        if (got := _shape(model)) != shape:
            raise UserError(
                f"steering.controls: {run.folder}: expected models of {shape}, as those that are steered, got {got}"
            )
        if model.tokenizer.get_vocab() != own.tokenizer.get_vocab():
            raise UserError(
                f"steering.controls: {run.folder}: its tokenizer is another than that of the models that are steered"
            )
        opened.append(model)
    return opened[0], opened[1]


def _shape(opened: LoadedModel) -> str:
    config = opened.model.config
    return f"{config.num_hidden_layers} blocks of width {config.hidden_size}"


def vectors_of_file(path: Path, model: PreTrainedModel, sites: Sequence[str]) -> dict[str, SteeringVector]:
    """The vectors of a file by name, at least one of them at one of the sites.

    Raises:
        UserError: the file is missing or damaged, or has vectors of another model, of zeros, or none at these sites.
    """
    held = load_vectors(path)
    for name, vector in held.items():
        try:
            vector.check_fits(model)
        except UserError as error:
            raise UserError(f"steering.vectors: {path}: {error}") from error
        if not vector.norm():
            raise UserError(f"steering.vectors: {path}: {name} is a vector of zeros; leave it out")
    got = list(dict.fromkeys(vector.site for vector in held.values()))
    if not set(got) & set(sites):
        raise UserError(
            f"steering.vectors: {path}: expected vectors of the sites that are swept, {', '.join(sites)}, got "
            f"{', '.join(got) or 'none'}; set steering.sites"
        )
    return held
