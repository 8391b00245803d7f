"""What do verdicts say of worlds whose preference is planted, once models were trained in them? A study in each, whole.

    python benchmarks/trained_worlds.py [--ranks 1 2 4] [--without 2] [--root FOLDER]

Each world is a study of its own, ``train.py --multirun study=quick`` and ``analyze.py runs=STUDY``, as a person would start them.
Preferences are planted with a rank; in the worlds without one labels are coin flips, so nothing that has to beat
shuffled labels may be called supported there. Claims are those that are shipped, held against what ``study=quick`` has: shuffled
labels, random weights, the base's own states. Studies that were stopped go on if the same root is given again.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file can be run from anywhere
from benchmarks import common

# isort: split
import pandas as pd
import yaml

from analysis.claims.claim import DRAWN, OWN
from analysis.claims.verdict import SUPPORTED
from analysis.open.studies import open_study
from tiltmeter.errors import UserError

ACCURACY = "val/rewards/accuracies"
SHUFFLED = "dpo_shuffled"
JUDGED = ("K1", "K3", "K4", "K5", "K6")
"""Claims that need no model to be asked once more."""
EXPERIMENT = (
    "study=quick",
    "experiment=tiny_synthetic",
    "callbacks=geometry",
    "~callbacks.random_update",
    "logger=csv",
)


class World(NamedTuple):
    """A synthetic world to train in."""

    name: str
    overrides: tuple[str, ...]
    has_preference: bool


def worlds(ranks: Sequence[int], n_without: int) -> Iterator[World]:
    """Worlds of each planted rank, and some in which labels are coin flips."""
    for rank in ranks:
        yield World(f"rank {rank}", (f"data.planted_rank={rank}",), has_preference=True)
    for seed in range(1, n_without + 1):
        yield World(f"no preference, world {seed}", ("data.label_noise=0.5", f"data.seed={seed}"), has_preference=False)


def run_study(world: World, root: Path) -> Path:
    """Train a world's study and report it; its folder."""
    own = root / world.name.replace(" ", "_").replace(",", "")
    _call("train.py", "--multirun", *EXPERIMENT, *world.overrides, f"runs_root={own}")
    (study,) = own.glob("tiny_synthetic/study_*")
    claims = own / "claims.yaml"
    claims.write_text(yaml.safe_dump(claims_of_quick(), sort_keys=False), encoding="utf-8")
    _call("analyze.py", f"runs={study}", f"claims_file={claims}")
    return study


def _call(program: str, *arguments: str) -> None:
    """Raises UserError with the last line that it printed."""
    done = subprocess.run(
        [sys.executable, str(common.ROOT / program), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{program}: {(done.stderr.strip() or 'it printed nothing').splitlines()[-1][:300]}")


def claims_of_quick() -> dict[str, dict[str, Any]]:
    """The shipped claims that stored states decide, less arms that ``study=quick`` doesn't train and the other corpus."""
    shipped = yaml.safe_load((common.ROOT / "conf" / "claims" / "dsteer.yaml").read_text(encoding="utf-8"))
    has = {SHUFFLED, *DRAWN, *OWN}
    found = {}
    for key in JUDGED:
        claim = shipped[key]
        survives = [entry for entry in claim.get("survives", []) if entry != "other_corpus"]
        found[key] = claim | {"beats": [arm for arm in claim["beats"] if arm in has], "survives": survives}
    return found


def false_claims(world: World) -> frozenset[str]:
    """Claims that are false in a world: without a preference, all that have to beat shuffled labels."""
    beats = (key for key, claim in claims_of_quick().items() if SHUFFLED in claim["beats"])
    return frozenset() if world.has_preference else frozenset(beats)


def accuracy(study: Path) -> float:
    """Held-out preference accuracy of the study's dpo runs at their end, the mean."""
    found = [read_final(run.folder, ACCURACY) for run in open_study(study).runs["dpo"]]
    return sum(found) / len(found)


def read_final(run: Path, metric: str) -> float:
    """Last value of a metric that a run logged."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [float(row[metric]) for row in csv.DictReader(file) if row.get(metric)][-1]


def cells(verdicts: pd.DataFrame) -> Mapping[str, str]:
    """Claim → T and its verdict."""
    rows = verdicts.set_index("claim")
    return {key: f"{rows.loc[key, 't']:.3f} {rows.loc[key, 'verdict']}" for key in JUDGED}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of verdicts, and how many are false."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=common.positive, nargs="*", default=[1, 2, 4])
    parser.add_argument("--without", type=int, default=2, help="worlds without a preference")
    parser.add_argument("--root", type=Path, help="folder to keep the studies in; default: a temporary one")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.root or Path(temporary)
        n_false = n_asked = 0
        rows = []
        for world in worlds(options.ranks, options.without):
            common.progress(f"{world.name}: train and judge a study")
            study = run_study(world, root)
            verdicts = pd.read_csv(study / "report" / "tables" / "claims.csv")
            false = false_claims(world)
            said = set(verdicts[verdicts["verdict"] == SUPPORTED]["claim"])
            n_asked, n_false = n_asked + len(false), n_false + len(false & said)
            rows.append([world.name, f"{accuracy(study):.3f}", *cells(verdicts).values()])
    common.print_table("T and verdict", ["world", "held-out accuracy", *JUDGED], rows)
    print(f"{n_false} of {n_asked} claims that are false there were called supported.")
    common.print_result(trained_false_positives=n_false, trained_false_claims=n_asked)


if __name__ == "__main__":
    with common.clear_errors():
        main()
