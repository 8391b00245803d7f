"""The saved W&B workspace of this project's metrics: ``python -m analysis.report.dashboard --entity NAME [--project tiltmeter]``.

``--dry-run`` needs no account: it checks the workspace and prints it as the JSON that W&B would get. Saving needs a login and
the network. Needs the optional extra: ``pip install 'tiltmeter[dashboard]'``.
"""

import argparse
import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import tiltmeter.threads  # noqa: F401  before torch, which reads its threads' settings as it is imported

# isort: split
from analysis.report.loggable import loggable_media, loggable_metrics
from analysis.report.wandb_login import is_logged_in
from tiltmeter.errors import UserError
from tiltmeter.files import write_text
from tiltmeter.models.layers import FINAL_POST_NORM
from tiltmeter.plain_text import allow_any_encoding

STEP_AXIS = "trainer/global_step"
NAME = "tiltmeter"
_AT_EVERY_SITE = "(layer_[0-9]+|final_pre_norm|final_post_norm)$"
SECTIONS: dict[str, list[tuple[str, list[str] | str]]] = {
    "Loss, accuracy, margins": [
        ("Loss", ["train/loss", "val/loss"]),
        ("Preference accuracy", ["train/rewards/accuracies", "val/rewards/accuracies"]),
        ("Reward margin (β · nats)", ["train/rewards/margins", "val/rewards/margins"]),
    ],
    "Projection and shift share": [
        ("Projection onto v: change (activation units)", [f"projection/delta/{FINAL_POST_NORM}"]),
        (
            "Pairs whose projection grew, and on the preferred side",
            ["projection/share_grown", "hyperplane/share_preferred"],
        ),
        ("cos(v*, v) and cos(v*, v̄)", [f"direction_cosine/{kind}/{FINAL_POST_NORM}" for kind in ("token", "sequence")]),
        ("Shift share f at every site", f"^shift_share/delta/{_AT_EVERY_SITE}"),
        ("f under random weights of equal norm", f"^shift_share/random_update/{_AT_EVERY_SITE}"),
        ("f of the base’s own states", f"^shift_share/base/{_AT_EVERY_SITE}"),
        (
            "f at a content token, and under random weights",
            f"^shift_share/(delta|random_update)/content/{_AT_EVERY_SITE}",
        ),
        ("Top-1 energy ρ₁, centred, at every site", f"^top1_energy/delta_centred/{_AT_EVERY_SITE}"),
        ("Mean cosine with v*, leave-one-out", f"^mean_cosine/leave_one_out/{_AT_EVERY_SITE}"),
        ("The same under random weights of equal norm", f"^mean_cosine/leave_one_out/random_update/{_AT_EVERY_SITE}"),
        ("Has v* settled? cos with the observation before", f"^direction_settled/{_AT_EVERY_SITE}"),
        ("Gradient: mean resultant, energy along v̄ and v*", "^gradient/"),
    ],
    "Layers": [
        ("Layer by step: f, entropy, cosine", ["figures/layers_by_step"]),
        ("Shares and cosines by layer", ["figures/geometry"]),
        ("Entropies by layer", ["figures/entropy"]),
        ("Cosines pair by pair", ["figures/cosines"]),
        ("Projections by layer", ["figures/projection"]),
        ("Entropy of ΔH (nats)", f"^spectral_entropy/delta/energy/{_AT_EVERY_SITE}"),
    ],
    "Behaviour": [
        (
            "Answers preferred to the base's, and to the chosen ones",
            [
                f"behaviour/{who}{than}"
                for who in ("geval_win_rate", "oracle_preference_rate")
                for than in ("", "_vs_chosen")
            ],
        ),
        ("Preference accuracy, held out", ["behaviour/preference_accuracy"]),
        ("Toxicity of policy and base", "^behaviour/(toxicity|toxicity_word_list|hate_speech)(/base)?$"),
        ("G-Eval score of policy and base", "^behaviour/geval_score(/base)?$"),
        ("Degenerate, empty, cut: share of completions", "^behaviour/(degeneration|empty|cut)$"),
        ("Overlap with chosen: ROUGE-L", ["behaviour/rougeL", "behaviour/rougeL/base"]),
        ("TruthfulQA", "^behaviour/truthfulqa_"),
        ("Log-probs of responses (nats)", ["val/logps/chosen", "val/logps/rejected"]),
        ("Implicit rewards (β · nats)", ["val/rewards/chosen", "val/rewards/rejected"]),
        ("Alarms", "^alarm/"),
    ],
    "Samples": [("Base and policy side by side, with every score", ["samples"])],
}
"""Sections in order: panels with their title and either exact names (those of figures are shown as pictures) or a pattern."""


def build_workspace(entity: str, project: str) -> Any:
    """The workspace as an object of wandb-workspaces; nothing is sent.

    Raises:
        UserError: the extra is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its own, about pydantic
            panels = import_module("wandb_workspaces.reports.v2")
            workspaces = import_module("wandb_workspaces.workspaces")
    except ImportError as error:
        raise UserError(
            f"analysis.report.dashboard: wandb-workspaces is not installed ({error}); pip install 'tiltmeter[dashboard]'"
        ) from error

    def panel(title: str, what: list[str] | str) -> Any:
        if isinstance(what, str):
            return panels.LinePlot(title=title, x=STEP_AXIS, metric_regex=what)
        if what == ["samples"]:
            return panels.WeavePanelSummaryTable(table_name="samples")
        if what[0].startswith("figures/"):
            return panels.MediaBrowser(title=title, media_keys=what, num_columns=1)
        return panels.LinePlot(title=title, x=STEP_AXIS, y=what)

    sections = []
    for name, wanted in SECTIONS.items():
        shown = [panel(title, what) for title, what in wanted]
        layout = workspaces.SectionLayoutSettings(columns=3, rows=-(-len(shown) // 3))  # all panels on one page
        sections.append(workspaces.Section(name=name, panels=shown, is_open=True, layout_settings=layout))
    return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=sections)


def spec_of(workspace: Any) -> dict[str, Any]:
    """What W&B would be sent, as JSON values."""
    model = workspace._to_model()
    return {
        "entity": model.entity,
        "project": model.project,
        "name": model.display_name,
        "spec": json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True)),
    }


def check_spec(spec: dict[str, Any]) -> None:
    """Every section has panels, every panel something to show that this code can log.

    Raises:
        UserError: names the section and the panel.
    """
    metrics, media = loggable_metrics(), loggable_media()
    for section, panels in sections_of(spec):
        if not panels:
            raise UserError(f"dashboard: section {section!r} has no panels")
        for panel in panels:
            config = panel.get("config", {})
            title = config.get("chartTitle") or panel.get("viewType")
            names = [*config.get("metrics", []), *config.get("mediaKeys", []), *_tables_of(config)]
            pattern, text = config.get("metricRegex"), config.get("value")
            if not (names or pattern or text):
                raise UserError(f"dashboard: {section}: panel {title!r} shows nothing")
            for name in names:
                if name not in (metrics if "metrics" in config else media):
                    raise UserError(f"dashboard: {section}: panel {title!r}: nothing logs {name}")
            if pattern and not any(re.search(pattern, name) for name in metrics):
                raise UserError(f"dashboard: {section}: panel {title!r}: no logged name matches {pattern}")


def _tables_of(config: dict[str, Any]) -> list[str]:
    """The logged tables that a panel of W&B's own query language shows."""
    query = json.dumps(config.get("panel2Config", {}))
    return re.findall(r'"key": {"nodeType": "const", "type": "string", "val": "(\w+)"', query)


def sections_of(spec: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Name and panels of each section, in order."""
    for section in spec["spec"]["section"]["panelBankConfig"]["sections"]:
        yield section["name"], section["panels"]


def save(workspace: Any) -> str:
    """Save it to W&B; returns its address.

    Raises:
        UserError: not logged in, or W&B refuses.
    """
    if not is_logged_in():
        raise UserError(
            "analysis.report.dashboard: not logged in to W&B; run wandb login, or look at it with --dry-run"
        )
    try:
        workspace.save()
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"analysis.report.dashboard: W&B did not take it ({reason}); check --entity and --project"
        ) from error
    return str(workspace.url)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.report.dashboard", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--entity", default="", help="W&B user or team; needed to save")
    parser.add_argument("--project", default="tiltmeter", help="W&B project (tiltmeter, as in conf/logger/wandb.yaml)")
    parser.add_argument(
        "--dry-run",
        nargs="?",
        const="-",
        metavar="FILE",
        help="check it and write it as JSON to FILE or standard output",
    )
    options = parser.parse_args(arguments)
    allow_any_encoding()
    try:
        if options.dry_run is None and not options.entity:
            raise UserError("--entity: expected your W&B user or team; --dry-run needs none")
        workspace = build_workspace(options.entity, options.project)
        spec = spec_of(workspace)
        check_spec(spec)
        _report(options.dry_run, json.dumps(spec, indent=2, ensure_ascii=False) + "\n", workspace)
    except (UserError, OSError) as error:
        sys.stderr.write(f"tiltmeter: {error}\n")
        return 2
    return 0


def _report(dry_run: str | None, text: str, workspace: Any) -> None:
    if dry_run is None:
        sys.stdout.write(f"Workspace: {save(workspace)}\n")
    elif dry_run == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(dry_run), text)
        sys.stdout.write(f"Workspace checked and written: {dry_run}\n")


if __name__ == "__main__":
    sys.exit(main())
