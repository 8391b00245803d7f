"""What a report is about: a run, or two checkpoints; its title, the facts of its first screen, and where it goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.runs import Run
from datamodules.records import LoadReport

_CONTROLS = {
    "shuffled": "a control: training labels reversed with probability ½, so held-out accuracy should stay near ½",
    "swapped": "a control: all training labels reversed, so held-out accuracy should fall below ½",
}


@dataclass(frozen=True)
class Subject:
    """What a report says before its sections.

    Args:
        kind: above the title.
        title: heading.
        facts: name and value, for the first screen.
        origin: where the numbers come from, in one sentence.
        report: folder that it is written to.
        command: what makes it again, to which sections add ``analysis=NAME``.
    """

    kind: str
    title: str
    facts: Sequence[tuple[str, str]]
    origin: str
    report: Path
    command: str


def subject_of_run(run: Run) -> Subject:
    """That of a finished run."""
    title = f"{run.setting('name') or run.folder.name}: {run.setting('arm') or 'one run'}, {run.n_steps} steps"
    origin = (
        "drawn from the metrics.csv of this one run and the tables and snapshots beside it. Held-out: pairs whose prompts were not "
        "trained on."
    )
    command = f"python analyze.py run={run.folder}"
    return Subject("report of one run", title, _facts(run), origin, run.report, command)


def subject_of_checkpoints(
    base: str, aligned: str, data: str, reports: Sequence[LoadReport], n_pairs: int, report: Path
) -> Subject:
    """That of two checkpoints which were not trained here.

    Args:
        data: the choice of data on the command line.
        reports: what was read.
        n_pairs: pairs that are asked about.
    """
    read = "; ".join(f"{r.source} ({r.location}), {r.n_kept} of {r.n_rows} pairs" for r in reports)
    facts = [("Base", base), ("Aligned", aligned), ("Data", read), ("Asked about", f"{n_pairs} pairs, one a prompt")]
    facts.append(("Held out?", "not known: the aligned model may have been trained on these prompts"))
    command = f"python analyze.py base={base} aligned={aligned} data={data}"
    title = f"{Path(aligned).name} against {Path(base).name}"
    return Subject("report of two checkpoints", title, facts, "of these two checkpoints, asked now.", report, command)


def _facts(run: Run) -> list[tuple[str, str]]:
    control = _CONTROLS.get(str(run.setting("datamodule.labels")), "")
    rows = [
        ("Experiment", str(run.setting("name") or "not named")),
        ("Arm", str(run.setting("arm") or "not named") + (f" ({control})" if control else "")),
        ("Model", _model(run)),
        ("Data", _options(run, "data")),
        ("Training", f"{run.n_steps} optimizer steps; {_options(run, 'module')}"),
        ("Seed", str(run.setting("seed"))),
        ("Started", run.started.strftime("%Y-%m-%d %H:%M") if run.started else "unknown: the folder was renamed"),
        ("Run folder", str(run.folder)),
    ]
    return rows


def _model(run: Run) -> str:
    if run.setting("model.init") == "random":
        family, sizes = run.setting("model.architecture.model_type"), run.node("model.architecture")
        shape = f"{sizes.get('num_hidden_layers', '?')} layers of width {sizes.get('hidden_size', '?')}"
        return f"small {family} from scratch, {shape}; its base was made here by SFT"
    revision = run.setting("model.revision")
    return str(run.setting("model.name_or_path") or "unknown") + (f" at {revision}" if revision else "")


def _options(run: Run, node: str) -> str:
    """The class's own name and every single-valued option that deviates from its defaults."""
    target = str(run.setting(f"{node}._target_") or "unknown").rpartition(".")[2]
    options = [f"{k}={v}" for k in run.node(node) if k != "_target_" and (v := run.setting(f"{node}.{k}")) is not None]
    return target + (f" ({', '.join(options)})" if options else "")
