"""A study's ``study.yaml`` while it is trained: its runs, what has become of each, and learning rates that were tried."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from analysis.open.runs import is_finished, minutes_of
from analysis.open.studies import FILE, runs_in
from tiltmeter.files import write_text

FORMAT = 2


@dataclass(frozen=True)
class Arm:
    """One run of a study.

    Args:
        state: ``waiting``, ``finished`` or ``failed``.
        run: its folder, from the study's parent.
        minutes: that it took, as far as it is known.
        error: the line that it ended with.
        kl: of an arm that is matched: KL from the base on held-out pairs, nats a token, of the run and of dpo's.
    """

    arm: str
    seed: int
    state: str = "waiting"
    run: str = ""
    minutes: float = 0.0
    error: str = ""
    kl: tuple[float, float] | None = None


def found_in(folder: Path, planned: Sequence[Arm], matched: Sequence[str]) -> tuple[list[Arm], list[Arm]]:
    """Planned runs, as far as they are there, and others that were asked for earlier, which stay in the study.

    Args:
        matched: arms that may have several runs of one seed, of which study.yaml says which one counts.
    """
    there = list(runs_of(folder))
    found = {(run.arm, run.seed): run for run in there if run.arm not in matched}
    finished = {run.run for run in there if run.state == "finished"}
    with suppress(OSError, yaml.YAMLError, KeyError, TypeError):
        said = yaml.safe_load((folder / FILE).read_text(encoding="utf-8"))["runs"]
        for entry in (entry for entry in said if entry["arm"] in matched and entry["run"] in finished):
            kl = entry.get("kl")
            found[entry["arm"], entry["seed"]] = Arm(**{**entry, "kl": None if kl is None else tuple(kl)})
    return [found.pop((run.arm, run.seed), run) for run in planned], list(found.values())


def tries_of(folder: Path) -> list[dict[str, Any]]:
    """Tries of learning rates that a study has so far."""
    with suppress(OSError, yaml.YAMLError, KeyError, TypeError):
        return list(yaml.safe_load((folder / FILE).read_text(encoding="utf-8"))["tries"])
    return []


def runs_of(folder: Path) -> Iterator[Arm]:
    """Runs that say that they belong to a study, the finished ones and those that can be gone on with."""
    for run, config in runs_in(folder):
        yield Arm(str(config["arm"]), int(config["seed"]), *state_of(run))


def state_of(run: Path) -> tuple[str, str, float]:
    """State, name and minutes of a run."""
    if not is_finished(run):
        return "waiting", run.name, 0.0
    return "finished", run.name, minutes_of(run)


def write_study(
    folder: Path, overrides: Sequence[str], draws: int, runs: Sequence[Arm], tries: Sequence[dict[str, Any]]
) -> None:
    """Write study.yaml."""
    said: dict[str, Any] = {"format": FORMAT, "overrides": list(overrides), "draws": draws}
    said["plan"] = [[run.arm, run.seed] for run in runs]
    said["runs"] = [{**asdict(run), "kl": None if run.kl is None else list(run.kl)} for run in runs]
    write_text(folder / FILE, yaml.safe_dump({**said, "tries": list(tries)}, sort_keys=False))
