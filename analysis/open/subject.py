"""The subject of a report: a run, or two checkpoints; its title, the facts of its first screen, and its folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.open.checkpoints import Checkpoints, settings_that_differ
from analysis.open.models import LoadedModel
from analysis.open.runs import Run
from datamodules.records import LoadReport
from datamodules.tokenization import TokenizationReport
from tiltmeter.commands import command as command_line

_CONTROLS = {
    "shuffled": "a control: training labels reversed with probability ½, so held-out accuracy should stay near ½",
    "random_pairs": "a control: responses of other prompts, so that no preference fits its prompt",
    "prompts": "a control: training goes on with the text of the prompts, in which there is no preference",
    "swapped": "a control: all training labels reversed, so held-out accuracy should fall below ½",
}


@dataclass(frozen=True)
class Subject:
    """Everything that a report says before its sections.

    Args:
        kind: above the title.
        title: heading.
        facts: name and value, for the first screen.
        origin: where the numbers come from, in one sentence that goes on behind their files.
        report: folder that it is written to.
        command: what makes a section again, by its name.
    """

    kind: str
    title: str
    facts: Sequence[tuple[str, str]]
    origin: str
    report: Path
    command: Callable[[str], str]


def subject_of_run(
    run: Run,
    *,
    asked: Sequence[str] = (),
    is_read: bool = True,
    left_out: Sequence[str] = (),
    command: Callable[[str], str] | None = None,
) -> Subject:
    """Subject of a report on a finished run.

    Args:
        asked: analyses that asked its models again.
        is_read: whether anything is read off its folder.
        left_out: analyses that it has nothing for.
        command: what makes a section again, by its name; None: without further options.
    """
    title = f"{run.setting('name') or run.folder.name}: {run.setting('arm') or 'one run'}, {run.n_steps} steps"
    where = ["drawn from the metrics.csv of this one run and the tables and snapshots beside it"] if is_read else []
    if asked:
        of = f"{', '.join(asked)} " if is_read else ""
        where.append(f"{of}of this run’s base and aligned model, asked again after training")
    origin = f"{'; '.join(where)}. Held-out: pairs whose prompts were not trained on."

    def plain(name: str) -> str:
        return command_line("analyze.py", run=run.folder, analysis=name)

    facts = _facts(run)
    if left_out:
        facts.append(("Not shown", f"{', '.join(left_out)}: the run logged nothing for it"))
    return Subject("report of one run", title, facts, origin, run.report, command or plain)


def subject_of_checkpoints(
    checkpoints: Checkpoints,
    base: str,
    aligned: str,
    *,
    reports: Sequence[LoadReport],
    cuts: TokenizationReport,
    left_out: Sequence[str] = (),
    command: Callable[[str], str],
    report: Path,
) -> Subject:
    """Subject of a report on two checkpoints which were not trained here.

    Args:
        base, aligned: as they were given.
        reports: what was read.
        cuts: what encoding the pairs cut or dropped.
        left_out: analyses that only a run can have.
        command: what makes a section again, by its name.
    """
    read = "; ".join(f"{r.source} ({r.location}), {r.n_kept} of {r.n_rows} pairs" for r in reports)
    lost = [f"{n} {what}" for what, n in cuts.dropped.items()]
    lost += [f"{cuts.special_words} with words of special tokens, taken as plain text"] * bool(cuts.special_words)
    lost += [f"{n} {what} cut" for n, what in ((cuts.prompts_cut, "prompts"), (cuts.responses_cut, "responses")) if n]
    facts = [
        ("Base", base + _commit(checkpoints.base)),
        ("Aligned", aligned + _commit(checkpoints.aligned)),
        ("Data", read),
        ("Asked about", "; ".join([_how_many(checkpoints), *lost])),
        ("Written as", cuts.written_as),
        ("Held out?", "not known: the aligned model may have been trained on these prompts"),
    ]
    if differ := settings_that_differ(checkpoints):
        facts.append(("Not weights alone", f"their configurations differ: {'; '.join(differ)}"))
    if left_out:
        facts.append(("Not shown", f"{', '.join(left_out)}: only a run that was trained here has a course over steps"))
    title = f"{Path(aligned).name} against {Path(base).name}"
    return Subject("report of two checkpoints", title, facts, "of these two checkpoints, asked now.", report, command)


def _how_many(checkpoints: Checkpoints) -> str:
    n, n_prompts = len(checkpoints.pairs), len({pair.group for pair in checkpoints.pairs})
    return f"{n} pairs, {'one a prompt' if n == n_prompts else f'of {n_prompts} prompts'}"


def _commit(opened: LoadedModel) -> str:
    """The commit of a model from the hub; nothing for one from a folder."""
    commit = getattr(opened.model.config, "_commit_hash", None)
    return f" at {commit}" if commit else ""


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
