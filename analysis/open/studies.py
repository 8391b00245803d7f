"""Open a study as data: its runs by arm, those that can't be judged with the others named, and what is missing."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from analysis.open.kept_models import DATA, FILES, read_provenance
from analysis.open.probe_pairs import PROMPTS_FILE
from analysis.open.runs import Run, is_finished, open_run, read_config
from tiltmeter.errors import UserError
from tiltmeter.files import sha256_of

FILE = "study.yaml"
DPO = "dpo"
TOOLS = ("sparse_autoencoder",)
"""Arms that train no policy, but what other arms need."""
ARM_NAMES: Mapping[str, str] = {
    "sft_chosen": "SFT on chosen",
    "dpo_shuffled": "shuffled labels",
    "dpo_swapped": "swapped labels",
    "dpo_random_pairs": "random pairs",
    "lm_continued": "more LM training",
    "constant_vector": "one vector",
    "constant_vector_shuffled": "vector, shuffled labels",
    "fsrl": "sparse features (FSRL)",
    "random_update": "random weights",
    "random_update_rotated": "random, same spectrum",
}
"""Arms and draws → what figures call them."""


@dataclass(frozen=True)
class Study:
    """Runs of several arms and seeds from one base.

    Args:
        folder: of the study; its runs lie beside it.
        name: of the experiment.
        runs: arm → its finished runs, by seed.
        left_out: a line on each run that is damaged, failed, not finished, or of another base, data or length than the others.
        n_draws: random weight changes to be drawn.
        planned: arm → number of seeds that were asked for.
        overrides: the command line that its runs share.
    """

    folder: Path
    name: str
    runs: Mapping[str, Sequence[Run]]
    left_out: Sequence[str]
    n_draws: int
    planned: Mapping[str, int]
    overrides: Sequence[str] = ()
    kl: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Arm whose learning rate was set by its KL from the base → that of each run, and dpo's; nats a token of held-out pairs."""

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.folder / "report"


def open_study(folder: Path) -> Study:
    """Read a study and its finished runs; one that is damaged costs that run alone.

    Raises:
        UserError: no study there, its file is damaged, or no dpo run can be read.
    """
    said = _read(folder)
    left_out = [
        f"{entry.get('arm')}, seed {entry.get('seed')}: failed: {str(entry.get('error'))[:200]}"
        for entry in said["runs"]
        if entry.get("state") == "failed"
    ]
    found: dict[str, list[Run]] = {}
    chosen = {entry.get("run") for entry in said["runs"]}
    other_tries = {one.get("run") for one in said["tries"]} - chosen
    for path in (path for path, _ in runs_in(folder) if is_finished(path) and path.name not in other_tries):
        try:
            run = open_run(path)
        except UserError as error:
            left_out.append(f"{path.name}: {error}")
        else:
            arm = str(run.setting("arm"))
            if arm not in TOOLS:
                found.setdefault(arm, []).append(run)
    if not found.get(DPO):
        lost = f" ({'; '.join(left_out)})" if left_out else ""
        raise UserError(f"{folder}: no finished run of arm {DPO}{lost}; train the study first")
    first = min(found[DPO], key=_seed)
    runs: dict[str, list[Run]] = {}
    for arm, ones in found.items():
        for run in sorted(ones, key=_seed):
            if differs := _difference(first, run):
                left_out.append(f"{arm}, seed {_seed(run)} ({run.folder.name}): {differs}")
            else:
                runs.setdefault(arm, []).append(run)
    planned: dict[str, int] = {}
    for arm, _ in (entry for entry in said["plan"] if entry[0] not in TOOLS):
        planned[str(arm)] = planned.get(str(arm), 0) + 1
    return Study(
        folder,
        str(first.setting("name")),
        runs,
        left_out,
        int(said["draws"]),
        planned,
        said["overrides"],
        _kl(said["runs"]),
    )


def _kl(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for entry in runs:
        if entry.get("kl"):
            own, target = entry["kl"]
            found.setdefault(str(entry["arm"]), []).append((float(own), float(target)))
    return found


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    if not path.is_file():
        inside = sorted(folder.glob(f"study_*/{FILE}")) if folder.is_dir() else []
        newest = f"; the newest one in it is {inside[-1].parent}" if inside else ""
        raise UserError(f"runs: {folder} has no {FILE}, so it is no study{newest}")
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
        plan = [(arm, seed) for arm, seed in said["plan"]]
        overrides = [str(text) for text in said["overrides"]]
        known = {"runs": list(said["runs"]), "plan": plan, "draws": said["draws"], "overrides": overrides}
        return known | {"tries": list(said.get("tries", ()))}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())[:120]}); train the study again") from error


def runs_in(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder and configuration of each run, finished or not, that says that it belongs to a study."""
    for path in sorted(folder.resolve().parent.glob("*/config.yaml")):
        with suppress(UserError):
            config = read_config(path)
            if config.get("study_folder") == folder.resolve().name:
                yield path.parent, config


def _seed(run: Run) -> int:
    seed = run.setting("seed")
    return seed if isinstance(seed, int) else 0


def _difference(first: Run, run: Run) -> str:
    """Reason for which a run can't be compared with the first; empty: none."""
    try:
        one, other = _identity(first), _identity(run)
    except UserError as error:
        return str(error)
    names = [name for name in one if one[name] != other[name]]
    steps = f" ({run.n_steps} and {first.n_steps})" if names == ["number of optimizer steps"] else ""
    return (
        f"another {' and another '.join(names)} than the first dpo run{steps}, so it isn't judged with it"
        if names
        else ""
    )


def _identity(run: Run) -> dict[str, str]:
    provenance = read_provenance(run.folder)
    base = {k: v for k, v in provenance.get(FILES, {}).items() if k.startswith("base/")}
    held_out = {split: digest for split, digest in provenance.get(DATA, {}).items() if split != "train"}
    prompts = run.folder / PROMPTS_FILE
    return {
        "base": json.dumps(base, sort_keys=True),
        "held-out data or tokenisation": json.dumps(held_out, sort_keys=True),
        "probe": sha256_of(prompts) if prompts.is_file() else "",
        "number of optimizer steps": str(run.n_steps),
    }
