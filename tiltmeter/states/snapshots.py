"""Snapshots of hidden states on disk: one safetensors file per observation and a manifest that says what every row is.

    snapshots/
      manifest.json                what was read, of which pairs, the sha256 of every file
      base.safetensors             before training
      epoch=000.safetensors  …     after each epoch

A file holds one [N, d] tensor per site and position, named ``<site>/<position>``. Rows are the same in every file, so
``epoch − base`` is the update matrix. The manifest is written last: a file that it doesn't list was not finished.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from tiltmeter.errors import UserError
from tiltmeter.files import sha256_of, write_atomically, write_json
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.states.capture import HiddenStates, Reading, ReadPoint
from tiltmeter.states.positions import POSITIONS, SIDE_NAMES, check_position
from tiltmeter.states.state_pair import StatePair

FORMAT = 1
MANIFEST = "manifest.json"
BASE = "base"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_SIDES = {name: side for side, name in SIDE_NAMES.items()}
_NAME = re.compile(r"base|[A-Za-z0-9_.=+-]+")


class RowLabels(NamedTuple):
    """Labels of the rows at one position; the same for every site and file."""

    pair_ids: list[str]
    """Id of the pair that each row belongs to; join on it, never on the row number."""
    sides: list[str]
    """``prompt``, ``chosen`` or ``rejected``."""


@dataclass
class Manifest:
    """Contents of a folder of snapshots. ``about`` is free: model, tokenizer hash, seed, whatever a reader should know."""

    dtype: str
    d_model: int
    sites: list[str]
    labels: dict[str, RowLabels]
    """Pair ids and sides by position."""
    about: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of each file by its name."""

    def to_json(self) -> dict[str, Any]:
        """Content of manifest.json; row counts are there for people."""
        labels = {position: x._asdict() | {"n_rows": len(x.pair_ids)} for position, x in self.labels.items()}
        return asdict(self) | {"format": FORMAT, "labels": labels}


def check_dtype(dtype: str) -> None:
    """Raises UserError unless snapshots can be stored so."""
    if dtype not in DTYPES:
        raise UserError(f"snapshots: dtype: expected one of {', '.join(DTYPES)}, got {dtype}")


class SnapshotWriter:
    """Writes observations of one probe set into a folder; every file is whole or not there.

    Args:
        folder: made if missing. One that already holds snapshots of the same rows, as after a resume, is continued.
        dtype: ``bfloat16`` or ``float32``. bfloat16 rounding is 5 / 23 / 74 % of ‖δ‖ at ‖δ‖/‖h‖ = .05 / .01 / .003.
        pair_ids: id of every pair by its row in the data set (``HiddenStates.pair_index``).
        about: what else a reader should know; JSON values.

    Raises:
        UserError: an unknown dtype, or the folder's manifest is damaged.
    """

    def __init__(
        self, folder: Path, *, dtype: str, pair_ids: Mapping[int, str], about: Mapping[str, Any] | None = None
    ) -> None:
        check_dtype(dtype)
        self.folder = folder
        self.dtype = dtype
        self.pair_ids = pair_ids
        self.about = dict(about or {})
        self.manifest = _read_manifest(folder) if (folder / MANIFEST).exists() else None

    def write(self, name: str, states: Reading) -> Path:
        """Write one observation as ``<name>.safetensors``, replacing one of that name, then the manifest.

        Args:
            name: :data:`BASE`, or :func:`epoch_name`, or any plain name.
            states: rows at every site and position over the probe set
                (:func:`tiltmeter.states.capture.read_hidden_states`).

        Raises:
            ValueError: a position is missing at some site, or its rows are of other pairs there.
            FailedWrite: the disk is full or not writable; neither a half file nor a manifest entry is left.
            UserError: rows, sites or positions other than in the folder's earlier files, or a name that is not plain.
        """
        if not _NAME.fullmatch(name) or name.startswith("."):
            raise UserError(f"snapshots: expected a plain file name such as base or epoch=000, got {name!r}")
        manifest = self._describe(states)
        if self.manifest is not None:
            _check_same(self.manifest, manifest, self.folder)
            manifest.files = dict(self.manifest.files)
            manifest.about = self.manifest.about
        tensors = {
            _key(point): found.rows.detach().to("cpu", DTYPES[self.dtype]).contiguous()
            for point, found in states.items()
        }
        target = self.folder / f"{name}.safetensors"
        digest: list[str] = []

        def write(temporary: Path) -> None:
            save_file(tensors, temporary)
            digest.append(sha256_of(temporary))

        write_atomically(target, write)
        manifest.files[target.name] = digest[0]
        write_json(self.folder / MANIFEST, manifest.to_json())
        self.manifest = manifest
        return target

    def _describe(self, states: Reading) -> Manifest:
        labels: dict[str, RowLabels] = {}
        for point, found in states.items():
            ids = [self.pair_ids[i] for i in found.pair_index.tolist()]
            own = RowLabels(ids, [SIDE_NAMES[side] for side in found.sides.tolist()])
            if labels.setdefault(point.position, own) != own:
                raise ValueError(
                    f"snapshots: rows at {point.position} are of other pairs at {point.site} than elsewhere"
                )
        sites = list(dict.fromkeys(point.site for point in states))
        if not states or len(states) != len(sites) * len(labels):
            raise ValueError(
                f"snapshots: expected every position at every site, got {[_key(point) for point in states]}"
            )
        d_model = next(iter(states.values())).rows.shape[1]
        return Manifest(self.dtype, d_model, sites, labels, self.about)


class SnapshotReader:
    """Reads a folder of snapshots; files are checked against the manifest before anything of them is used.

    Raises:
        UserError: no manifest, a damaged one, or one of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)

    @property
    def names(self) -> list[str]:
        """Observations, base first, then epochs in order."""
        names = [Path(file).stem for file in self.manifest.files]
        return sorted(names, key=lambda name: (name != BASE, len(name), name))

    @property
    def points(self) -> list[ReadPoint]:
        """Every site and position that each file holds."""
        return [ReadPoint(s, p) for s in self.manifest.sites for p in POSITIONS if p in self.manifest.labels]

    @property
    def pair_ids(self) -> list[str]:
        """Id of every pair by ``HiddenStates.pair_index``."""
        return list(dict.fromkeys(name for labels in self.manifest.labels.values() for name in labels.pair_ids))

    def pair(self, name: str, pairs: Mapping[str, tuple[str, TokenizedPair]] | None = None) -> StatePair:
        """An observation beside the base's.

        Args:
            pairs: prompt and token ids of pairs by id, as far as they are known; a pair's id stands for its prompt else.

        Raises:
            UserError: as :meth:`load`.
        """
        ids, known = self.pair_ids, pairs or {}
        return StatePair(
            self.load(BASE),
            self.load(name),
            ids,
            [known[i][0] if i in known else i for i in ids],
            [known[i][1] for i in ids] if known.keys() >= set(ids) else (),
            name=name,
            dtype=self.manifest.dtype,
        )

    def load(self, name: str) -> dict[ReadPoint, HiddenStates]:
        """All rows of one observation, in the dtype they were stored in; ``pair_index`` counts in :attr:`pair_ids`.

        Raises:
            UserError: not in the manifest, missing, or its content is not what was written; the file is named.
        """
        file = f"{name}.safetensors"
        path = self.folder / file
        if file not in self.manifest.files:
            raise UserError(f"snapshots: {path}: not in {MANIFEST}, which lists {', '.join(self.names) or 'no files'}")
        if not path.is_file():
            raise UserError(
                f"snapshots: {path}: listed in {MANIFEST} but missing; restore it or take the snapshot again"
            )
        if sha256_of(path) != self.manifest.files[file]:
            raise UserError(
                f"snapshots: {path}: damaged (its sha256 is not that of {MANIFEST}); restore it from a copy"
            )
        tensors = load_file(path)
        number = {pair: i for i, pair in enumerate(self.pair_ids)}
        of_rows = {
            position: ([number[pair] for pair in labels.pair_ids], [_SIDES[side] for side in labels.sides])
            for position, labels in self.manifest.labels.items()
        }
        return {p: HiddenStates(tensors[_key(p)], *map(torch.tensor, of_rows[p.position])) for p in self.points}


def epoch_name(epoch: int) -> str:
    """Name of the observation after an epoch, counted from 0.

    >>> epoch_name(3)
    'epoch=003'
    """
    return f"epoch={epoch:03d}"


def _key(point: ReadPoint) -> str:
    return f"{point.site}/{point.position}"


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw.pop("format")
        if version != FORMAT:
            raise UserError(f"snapshots: {path}: format {version} is not known (expected {FORMAT}); update tiltmeter")
        labels: dict[str, RowLabels] = {}
        for position, x in raw.pop("labels").items():
            labels[check_position(position)] = RowLabels(x["pair_ids"], x["sides"])
            if unknown := set(x["sides"]) - set(_SIDES):
                raise ValueError(f"no side is called {min(unknown)}")
        return Manifest(labels=labels, **raw)
    except FileNotFoundError as error:
        raise UserError(
            f"snapshots: {path}: no such file (expected a folder written by HiddenStateSnapshot)"
        ) from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"snapshots: {path}: damaged ({error}); restore it from a copy") from error


def _check_same(old: Manifest, new: Manifest, folder: Path) -> None:
    for what in ("dtype", "d_model", "sites", "labels"):
        before, now = getattr(old, what), getattr(new, what)
        if before != now:
            shown = f", got {now} where it has {before}" if what != "labels" else " (other pairs, sides or positions)"
            raise UserError(
                f"snapshots: {folder}: holds snapshots with other {what}{shown}; files of one folder must match row by "
                "row, so write to another folder"
            )
