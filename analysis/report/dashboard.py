"""The saved W&B workspace of this project's metrics: ``python -m analysis.report.dashboard --entity NAME [--project tiltmeter]``.

``--study FOLDER``: one of the runs of a study, grouped by arm, each arm in its colour, behind the verdicts on claims.

``--dry-run`` needs no account: it prints the workspace as the JSON that W&B would get. Saving needs a login and
the network. Needs the optional extra: ``pip install 'tiltmeter[dashboard]'``.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import tiltmeter.threads  # noqa: F401  before torch, which reads its threads' settings as it is imported

# isort: split
from analysis.claims.claim import ARMS
from analysis.open.studies import open_study
from analysis.report.style import COLOURS
from analysis.report.wandb_login import is_logged_in
from tiltmeter.errors import UserError
from tiltmeter.files import write_text
from tiltmeter.metric_names import STEP_AXIS, at, find, keys_of, matrix, metric
from tiltmeter.models.layers import FINAL_POST_NORM, FINAL_PRE_NORM
from tiltmeter.plain_text import allow_any_encoding
from tiltmeter.scoring.scorer import AGREEMENT
from tiltmeter.scoring.truthfulqa import FIGURES
from tiltmeter.states.capture import ReadPoint
from tiltmeter.states.positions import Position

_MODULE, NAME = "analysis.report.dashboard", "tiltmeter"
_EVERY_SITE = f"(layer_[0-9]+|{FINAL_PRE_NORM}|{FINAL_POST_NORM})"


def _at_every_site(*keys: str, position: Position = "prompt_last") -> str:
    """W&B's pattern for metrics of hidden states: how many sites there are, only a run knows."""
    return f"^({'|'.join(at(key, (_EVERY_SITE, position)) for key in keys)})$"


def _figures(*names: str, and_base: bool = False) -> list[str]:
    return [metric("behaviour", name, of) for name in names for of in ("", *["base"] * and_base)]


def _of_both_splits(what: str) -> list[str]:
    return [metric(split, what) for split in ("train", "val")]


_F, _F_RANDOM, _GROWN = (
    metric("shift_share", "delta"),
    metric("shift_share", "random_update"),
    metric("projection", "share_grown"),
)
_COSINE, _LAST = metric("mean_cosine", "leave_one_out"), ReadPoint(FINAL_POST_NORM, "diverge")
_PREFERRED = [who + than for who in ("geval_win_rate", "oracle_preference_rate") for than in ("", "_vs_chosen")]
_TRUTHFULQA = [name + shots for name, _ in FIGURES.values() for shots in ("", "_zero_shot")]
SECTIONS: dict[str, list[tuple[str, list[str] | str]]] = {
    "Loss, accuracy, margins": [
        ("Loss", _of_both_splits("loss")),
        ("Preference accuracy", _of_both_splits("rewards/accuracies")),
        ("Reward margin (β · nats)", _of_both_splits("rewards/margins")),
    ],
    "Projection and shift share": [
        ("Projection onto v: change (activation units)", [at(metric("projection", "delta"), _LAST)]),
        ("Pairs whose projection grew, and on the preferred side", [_GROWN, metric("hyperplane", "share_preferred")]),
        ("cos(v*, v) and cos(v*, v̄)", [at(key, _LAST) for key in keys_of("direction_cosine")]),
        ("Shift share f at every site", _at_every_site(_F)),
        ("f under random weights of equal norm", _at_every_site(_F_RANDOM)),
        ("f of the base’s own states", _at_every_site(metric("shift_share", "base"))),
        ("f at a content token, and under random weights", _at_every_site(_F, _F_RANDOM, position="content")),
        ("Top-1 energy ρ₁, centred, at every site", _at_every_site(metric("top1_energy", matrix("delta", "centred")))),
        ("Mean cosine with v*, leave-one-out", _at_every_site(_COSINE)),
        ("The same under random weights of equal norm", _at_every_site(metric(_COSINE, "random_update"))),
        ("Has v* settled? cos with the observation before", _at_every_site(metric("direction_settled"))),
        ("Gradient: mean resultant, energy along v̄ and v*", keys_of("gradient")),
    ],
    "Layers": [
        ("Layer by step: f, entropy, cosine", [metric("figures", "layers_by_step")]),
        ("Shares and cosines by layer", [metric("figures", "geometry")]),
        ("Entropies by layer", [metric("figures", "entropy")]),
        ("Cosines pair by pair", [metric("figures", "cosines")]),
        ("Projections by layer", [metric("figures", "projection")]),
        ("Entropy of ΔH (nats)", _at_every_site(metric("spectral_entropy", "delta", "energy"))),
    ],
    "Behaviour": [
        (
            "Answers preferred to the base's, and to the chosen ones; the judge's agreement with labels",
            [*_figures(*_PREFERRED), AGREEMENT],
        ),
        ("Preference accuracy, held out", _figures("preference_accuracy")),
        ("Toxicity of policy and base", _figures("toxicity", "toxicity_word_list", "hate_speech", and_base=True)),
        (
            "G-Eval score of policy and base; the judge's agreement with labels",
            [*_figures("geval_score", and_base=True), AGREEMENT],
        ),
        ("Degenerate, empty, cut: share of completions", _figures("degeneration", "empty", "cut")),
        ("Overlap with chosen: ROUGE-L", _figures("rougeL", and_base=True)),
        ("TruthfulQA", _figures(*_TRUTHFULQA)),
        ("Log-probs of responses (nats)", [metric("val", f"logps/{side}") for side in ("chosen", "rejected")]),
        ("Implicit rewards (β · nats)", [metric("val", f"rewards/{side}") for side in ("chosen", "rejected")]),
        ("Alarms", keys_of("alarm")),
    ],
    "Samples": [("Base and policy side by side, with every score", [metric("samples")])],
}
"""Sections in order: panels with their title and either names (those of figures are shown as pictures) or a pattern of W&B's."""
STUDY_SECTIONS: dict[str, list[tuple[str, list[str] | str]]] = {
    "Verdicts": [
        ("Claims: T, threshold, verdict", [metric("report", "claims_table")]),
        ("Claims beside their controls", [metric("report", "claims")]),
        ("cos(v*, v*) of arms", [metric("report", "vectors_of_arms")]),
    ]
}
"""Sections before those, of what ``analyze.py runs=… upload=true`` sends of a study."""


def build_workspace(entity: str, project: str, *, study: str | None = None) -> Any:
    """The workspace as an object of wandb-workspaces; nothing is sent.

    Args:
        study: name of a study's folder, which is the group of its runs; None: all runs.

    Raises:
        UserError: the extra is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its own, about pydantic
            panels = import_module("wandb_workspaces.reports.v2")
            workspaces = import_module("wandb_workspaces.workspaces")
            expressions = import_module("wandb_workspaces.expr")
    except ImportError as error:
        reason = f"{_MODULE}: wandb-workspaces is not installed ({error}); pip install 'tiltmeter[dashboard]'"
        raise UserError(reason) from error

    def panel(title: str, what: list[str] | str) -> Any:
        if isinstance(what, str):
            return panels.LinePlot(title=title, x=STEP_AXIS, metric_regex=what)
        unit = found.metric.unit if (found := find(what[0])) else ""
        if unit == "table":
            return panels.WeavePanelSummaryTable(table_name=what[0])
        if unit == "picture":
            return panels.MediaBrowser(title=title, media_keys=what, num_columns=1)
        return panels.LinePlot(title=title, x=STEP_AXIS, y=what)

    sections = []
    for name, wanted in [*({} if study is None else STUDY_SECTIONS).items(), *SECTIONS.items()]:
        shown = [panel(title, what) for title, what in wanted]
        layout = workspaces.SectionLayoutSettings(columns=3, rows=-(-len(shown) // 3))  # all panels on one page
        sections.append(workspaces.Section(name=name, panels=shown, is_open=True, layout_settings=layout))
    if study is None:
        return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=sections)
    runs = workspaces.RunsetSettings(
        filters=expressions.And(expressions.Metric("Group") == study),
        groupby=[expressions.Config("arm")],
        group_colors={arm: COLOURS[arm] for arm in ARMS},
    )
    return workspaces.Workspace(
        entity=entity, project=project, name=f"{NAME} {study}", sections=sections, runset_settings=runs
    )


def spec_of(workspace: Any) -> dict[str, Any]:
    """The workspace as JSON values, as W&B would be sent it."""
    model = workspace._to_model()
    spec = json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))
    return {"entity": model.entity, "project": model.project, "name": model.display_name, "spec": spec}


def save(workspace: Any) -> str:
    """Save it to W&B; returns its address.

    Raises:
        UserError: not logged in, or W&B refuses.
    """
    if not is_logged_in():
        raise UserError(f"{_MODULE}: not logged in to W&B; run wandb login, or look at it with --dry-run")
    try:
        workspace.save()
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{_MODULE}: W&B did not take it ({reason}); check --entity and --project") from error
    return str(workspace.url)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--entity", default="", help="W&B user or team; needed to save")
    parser.add_argument("--project", default="tiltmeter", help="W&B project (tiltmeter, as in conf/logger/wandb.yaml)")
    parser.add_argument("--study", type=Path, metavar="FOLDER", help="of a study: its runs by arm, and the verdicts")
    said = "write it as JSON to FILE or standard output"
    parser.add_argument("--dry-run", nargs="?", const="-", metavar="FILE", help=said)
    options = parser.parse_args(arguments)
    allow_any_encoding()
    try:
        if options.dry_run is None and not options.entity:
            raise UserError("--entity: expected your W&B user or team; --dry-run needs none")
        study = None if options.study is None else open_study(options.study).folder.resolve().name
        workspace = build_workspace(options.entity, options.project, study=study)
        if options.dry_run is None:
            sys.stdout.write(f"Workspace: {save(workspace)}\n")
            return 0
        text = json.dumps(spec_of(workspace), indent=2, ensure_ascii=False) + "\n"
        if options.dry_run == "-":
            sys.stdout.write(text)
        else:
            write_text(Path(options.dry_run), text)
            sys.stdout.write(f"Workspace written: {options.dry_run}\n")
    except (UserError, OSError) as error:
        sys.stderr.write(f"tiltmeter: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
