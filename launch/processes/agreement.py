"""Facts that all processes of a run must have in common."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from callbacks.process.agreement import Agreement
from datamodules.preference import PreferenceDataModule
from launch.configuration import leaves
from launch.results import versions

_OWN = ("run_dir",)
"""Keys that every process fills in for itself; the first one's counts."""
_ROOT = Path(__file__).resolve().parent.parent
_CODE = ("tiltmeter", "datamodules", "lightning_modules", "callbacks", "launch")


def agreement(config: DictConfig, data: PreferenceDataModule, *, trains: str, resumes: bool = False) -> Agreement:
    """The callback that compares them.

    Args:
        trains: what this fit trains, a base or the run: a process may have found the base that another one lacks.
        resumes: the fit goes on from a checkpoint.
    """
    return Agreement(lambda: _facts(config, data, trains, resumes))


def _facts(config: DictConfig, data: PreferenceDataModule, trains: str, resumes: bool) -> Mapping[str, str]:
    options = {key: str(value) for key, value in leaves(config) if key not in _OWN}
    splits = {
        f"data ({name})": f"{len(split.pairs)} pairs with sha256 {data.digest(name)[:12]}"
        for name, split in data.splits.items()
    }
    start = "a checkpoint" if resumes else "its beginning"
    return {"training": f"{trains} from {start}", "code": code_digest(), **versions(), **options, **splits}


def code_digest() -> str:
    """sha256 over the program's own files, its first 12 digits: says more than a commit where files were changed."""
    files = [path for package in _CODE for path in sorted((_ROOT / package).rglob("*.py"))]
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes())
    return f"sha256 {digest.hexdigest()[:12]}"
