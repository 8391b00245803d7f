"""Reports on Weights & Biases: the folder as an artifact, figures as media, in the run of the training or a study's own."""

import hashlib
import io
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from analysis.open.runs import Run
from analysis.open.studies import DPO, Study
from analysis.report.page import Section
from analysis.report.style import png_bytes
from launch.loggers.wandb_logger import choose_mode, id_of
from tiltmeter.errors import UserError
from tiltmeter.metric_names import STEP_AXIS, metric

_SENT = (".html", ".csv", ".json", ".png", ".pdf")
_TEXTS = (".html", ".csv", ".json")
_PICTURE = re.compile(r"(data:image/png;base64,[A-Za-z0-9+/=]+)")
_PATH = re.compile(r"(?<![\w/.:<])/(?:[\w.@+~-]+/)+(?=[\w.@+~-])")
"""The folders of an absolute path; addresses on the web and closing tags are none."""
_NAME = re.compile(r"[\w.-]{1,128}")
_SETTINGS: dict[str, Any] = {
    "init_timeout": 30,
    "finish_timeout": 300,
    "silent": True,
    "save_code": False,
    "console": "off",
    **dict.fromkeys(("disable_git", "x_disable_meta", "x_disable_stats"), True),
    "x_save_requirements": False,
}
"""Nothing of this machine: no command line, folders, packages or repository."""
_ROWS_A_STEP = 10
"""W&B counts calls and takes none back; a run makes fewer than so many for each row of metrics.csv."""


def check_upload(run: Run) -> str:
    """The id of the run on W&B, known before anything is computed.

    Raises:
        UserError: training logged nothing to W&B, or it is switched off now.
    """
    found = id_of(run.folder)
    if found is None:
        raise UserError(f"upload: {run.folder} has no wandb/ folder, so W&B has no such run; leave upload out")
    if choose_mode("auto") == "disabled":
        raise UserError("upload: W&B is disabled by WANDB_MODE or WANDB_DISABLED; unset it, or leave upload out")
    return found


def upload_report(run: Run, page: Path, sections: Sequence[Section]) -> str:
    """Send a written report, online when logged in, else into an offline run of the same id; one line that says where.

    Files are sent without the folders of absolute paths in them. A failure of W&B is that line, and no failure of the report.
    """
    last = max(run.n_steps - 1, 0)
    where = Place(run.folder, str(id_of(run.folder)), "train", {STEP_AXIS: last}, _ROWS_A_STEP * len(run.metrics))
    return _sent(where, run, page, sections)


def upload_study(study: Study, page: Path, sections: Sequence[Section]) -> str:
    """Send a study's report as a run of its own in the group of its arms, claims as a table; see :func:`upload_report`."""
    name = f"study-{hashlib.sha256(study.folder.name.encode()).hexdigest()[:12]}"
    where = Place(study.folder, name, "study", {}, None, group=study.folder.name)
    return _sent(where, study.runs[DPO][0], page, sections, tables=("claims", "claims_checks"))


class Place(NamedTuple):
    """A run on W&B that a report goes to."""

    folder: Path
    name: str
    """Its id."""
    job_type: str
    at: Mapping[str, float]
    """Numbers logged beside the figures, so that they stand at their step."""
    step: int | None
    """W&B's own count, behind all that was logged before; None: a run of its own."""
    group: str | None = None


def _sent(where: Place, run: Run, page: Path, sections: Sequence[Section], *, tables: Sequence[str] = ()) -> str:
    try:
        return _upload(where, run, page, sections, tables)
    except Exception as error:  # the network, the service, a full disk
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        return f"W&B: the report could not be sent ({reason}); it is in {page.parent}"


def _upload(where: Place, run: Run, page: Path, sections: Sequence[Section], tables: Sequence[str]) -> str:
    import wandb  # slow to import, and absent is no failure

    mode = choose_mode("auto")
    project, entity = (_plain(run, f"logger.{what}") for what in ("project", "entity"))
    opened = wandb.init(
        dir=str(where.folder),
        id=where.name,
        resume="allow" if mode == "online" else None,  # offline, W&B has nothing to look it up in
        project=project,
        entity=entity,
        group=where.group,
        job_type=where.job_type,
        mode=mode,  # type: ignore[arg-type]
        settings=_SETTINGS,
        reinit="finish_previous",
    )
    media: dict[str, Any] = {
        metric("report", section.name): wandb.Image(
            Image.open(io.BytesIO(png_bytes(section.figure))), caption=". ".join(section.sentences)
        )
        for section in sections
    }
    for section in sections:
        for name, table in ({section.name: section.table} | dict(section.more_tables)).items():
            if name in tables:
                plain = table.map(lambda cell: without_paths(cell) if isinstance(cell, str) else cell)
                media[metric("report", f"{name}_table")] = wandb.Table(dataframe=plain)
    opened.log(media | dict(where.at), step=where.step)
    kept = Path(opened.dir).parent / "report"
    copy_without_paths(page.parent, kept)
    artifact = wandb.Artifact(
        f"report-{where.name}", type="report", description="report/ of the run folder: open index.html."
    )
    artifact.add_dir(str(kept), policy="immutable", skip_cache=True)  # read where it is, not copied to a cache
    opened.log_artifact(artifact)
    url = opened.url
    opened.finish()
    if mode == "offline":
        folder = shlex.quote(str(kept.parents[1]))
        behind = " behind training’s" if where.job_type == "train" else ""
        return f"W&B: the report is kept offline; upload it{behind} with: wandb sync {folder}/*run-*-{where.name}"
    return f"W&B: the report is at {url}"


def copy_without_paths(report: Path, to: Path) -> None:
    """Copy a report's pages, tables and figures; in texts, the folders of absolute paths become ``…/``."""
    for file in sorted(report.rglob("*")):
        if not file.is_file() or file.is_symlink() or file.suffix not in _SENT:
            continue
        target = to / file.relative_to(report)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes()
        if file.suffix in _TEXTS:
            content = without_paths(content.decode("utf-8", "replace")).encode("utf-8")
        target.write_bytes(content)


def without_paths(text: str) -> str:
    """The text with only the last name of every absolute path.

    >>> without_paths("run=/home/me/runs/a/b.csv, 1/2 of https://example.org/a/b </td>")
    'run=…/b.csv, 1/2 of https://example.org/a/b </td>'
    """
    parts = _PICTURE.split(text)  # every second one is a picture, in which slashes are digits
    return "".join(part if i % 2 else _PATH.sub("…/", part) for i, part in enumerate(parts))


def _plain(run: Run, key: str) -> str | None:
    """A name out of the run's configuration; None for anything that is none."""
    value = run.setting(key)
    return value if isinstance(value, str) and _NAME.fullmatch(value) else None
