"""report/index.html: one page that needs nothing but itself; every text from the run is hostile until escaped."""

import base64
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from analysis.figures import save_figure
from analysis.runs import Run
from analysis.samples import MAX_NEW_TOKENS, Samples
from tiltmeter.errors import UserError
from tiltmeter.files import write_text

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_CONTROLS = {
    "shuffled": "a control: training labels reversed with probability ½, so held-out accuracy should stay near ½",
    "swapped": "a control: all training labels reversed, so held-out accuracy should fall below ½",
}


@dataclass(frozen=True)
class Headline:
    """One number of the first screen: as text, what it is, and where it stands."""

    value: str
    name: str
    source: str


@dataclass(frozen=True)
class Section:
    """What one analysis hands to the report.

    Args:
        name: of its figure and table files.
        question: heading.
        sentences: message of each panel, with its number.
        figure: drawn, not yet saved.
        table: the numbers drawn.
        reading: how to read the figure.
        headlines: numbers for the first screen.
        shown: a small table for the page, as text; None: the files have the numbers.
    """

    name: str
    question: str
    sentences: Sequence[str]
    figure: Figure
    table: pd.DataFrame
    reading: Sequence[str]
    headlines: Sequence[Headline]
    shown: pd.DataFrame | None = None


def write_report(run: Run, sections: Sequence[Section], samples: Samples) -> Path:
    """Write figures/, tables/ and index.html below the run's report/ folder; returns the page.

    Raises:
        UserError: the folder can't be written.
    """
    try:
        drawn = [_write_section(run, section) for section in sections]
        page = render_page(run, sections, samples, images=drawn)
        target = run.report / "index.html"
        write_text(target, page)
    except OSError as error:
        raise UserError(f"{run.report}: cannot be written ({error.strerror or error}); check the folder") from error
    return target


def render_page(run: Run, sections: Sequence[Section], samples: Samples, *, images: Sequence[bytes]) -> str:
    """The page as text; ``images`` are the sections' PNG files."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = zip(sections, [base64.b64encode(image).decode("ascii") for image in images], strict=True)
    return environment.get_template("report.html.jinja").render(
        title=f"{run.setting('name') or run.folder.name}: {run.setting('arm') or 'one run'}, {run.n_steps} steps",
        facts=facts(run),
        headlines=[headline for section in sections for headline in section.headlines],
        sections=list(shown),
        missing=_missing(sections),
        samples=samples,
        max_new_tokens=MAX_NEW_TOKENS,
        command=f"python analyze.py run={run.folder}",
    )


def _missing(sections: Sequence[Section]) -> list[str]:
    """What a reader may look for and this page can't show."""
    always = [
        "steering sweeps;",
        "claims with verdicts against controls (shuffled and swapped labels, SFT) and over several seeds.",
    ]
    if any(section.name == "geometry" for section in sections):
        return always
    return ["what changed inside the model: geometry of the hidden states, layer by layer;", *always]


def facts(run: Run) -> list[tuple[str, str]]:
    """What was run, for the first screen."""
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


def _write_section(run: Run, section: Section) -> bytes:
    text = section.table.to_csv(index=False, lineterminator="\n")
    write_text(run.report / "tables" / f"{section.name}.csv", text)
    png, _ = save_figure(section.figure, run.report / "figures", section.name)
    return png.read_bytes()


def _printable(value: Any) -> Any:
    r"""Text without what a page can't show or what turns its reading direction; anything else as it is.

    >>> _printable("a\x1b[31mb" + chr(0x202E) + "c")
    'a�[31mb�c'
    """
    if type(value) is not str:
        return value
    kept = value.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n")
    kept = "".join("�" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in kept)
    return re.sub("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", "�", kept)
