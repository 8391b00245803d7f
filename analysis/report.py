"""report/index.html: one page that needs nothing but itself; every text from the run is hostile until escaped."""

import base64
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from analysis.figures import save_figure
from analysis.samples import Samples
from analysis.subject import Subject
from tiltmeter.errors import UserError
from tiltmeter.files import write_text

_TEMPLATES = Path(__file__).resolve().parent / "templates"


@dataclass(frozen=True)
class Headline:
    """One number of the first screen: as text, what it is, and where it stands."""

    value: str
    name: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """What one analysis hands to the report.

    Args:
        name: of its figure and table files.
        question: heading.
        claim: what is put to the test, in words, and whose claim it is.
        sentences: message of each panel, with its number; the first one is the answer on the first screen.
        interval: how sure the numbers are: the interval of the main one, or why there is none.
        limits: what the figure does not show.
        figure: drawn, not yet saved.
        table: the numbers drawn.
        reading: how to read the figure.
        headlines: numbers for the first screen.
        shown: a table for the page, as text; None: the files have the numbers.
        caption: what that table holds.
        notes: what numbers in its last column stand for, from 1.
        more_tables: name → further tables for report/tables/.
    """

    name: str
    question: str
    claim: str
    sentences: Sequence[str]
    interval: str
    limits: Sequence[str]
    figure: Figure
    table: pd.DataFrame
    reading: Sequence[str]
    headlines: Sequence[Headline]
    shown: pd.DataFrame | None = None
    caption: str = "The numbers by site, as last observed"
    notes: Sequence[str] = ()
    more_tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)


def write_report(subject: Subject, sections: Sequence[Section], samples: Samples) -> Path:
    """Write figures/, tables/ and index.html into the subject's report folder; returns the page.

    Raises:
        UserError: the folder can't be written.
    """
    try:
        drawn = [_write_section(subject.report, section) for section in sections]
        page = render_page(subject, sections, samples, images=drawn)
        target = subject.report / "index.html"
        write_text(target, page)
    except OSError as error:
        raise UserError(f"{subject.report}: cannot be written ({error.strerror or error}); check the folder") from error
    return target


def render_page(subject: Subject, sections: Sequence[Section], samples: Samples, *, images: Sequence[bytes]) -> str:
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
        kind=subject.kind,
        title=subject.title,
        facts=subject.facts,
        origin=subject.origin,
        headlines=[headline for section in sections for headline in section.headlines],
        sections=list(shown),
        missing=_missing(sections),
        samples=samples,
        command_of=subject.command,
    )


def _missing(sections: Sequence[Section]) -> list[str]:
    """What a reader may look for and this page can't show."""
    by_section = {
        "geometry": "analysis=all: what changed inside the model, layer by layer;",
        "steering_sweep": "analysis=steering_sweep: steering sweeps;",
    }
    shown = {section.name for section in sections}
    return [
        *(line for name, line in by_section.items() if name not in shown),
        "verdicts against controls (shuffled and swapped labels, SFT), over several seeds.",
    ]


def _write_section(report: Path, section: Section) -> bytes:
    for name, table in ({section.name: section.table} | dict(section.more_tables)).items():
        write_text(report / "tables" / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    png, _ = save_figure(section.figure, report / "figures", section.name)
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
