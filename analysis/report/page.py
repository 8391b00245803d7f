"""report/index.html: one page that needs nothing but itself; every text from the run is hostile until escaped."""

import base64
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from analysis.open.subject import Subject
from analysis.report.coloured import Coloured
from analysis.report.samples import Samples
from analysis.report.style import save_figure
from tiltmeter.errors import FailedWrite, Unsupported, UserError
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
    """An analysis's part of the report.

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
        lost: figures without a number, because too many scores are missing.
        samples: what both models said, where they were made to speak.
        coloured: texts whose tokens are coloured by a number.
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
    headlines: Sequence[Headline] = ()
    shown: pd.DataFrame | None = None
    caption: str = "The numbers by site, as last observed"
    notes: Sequence[str] = ()
    more_tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    lost: Sequence[str] = ()
    samples: Samples | None = None
    coloured: Coloured | None = None


class Attempts:
    """Analyses of one report, of which one that fails never costs the others.

    Args:
        debug: let what fails pass, with its traceback.
        named: analyses asked for by name; others are left out where a model's family can't do them.
    """

    def __init__(self, *, debug: bool = False, named: Collection[str] = ()) -> None:
        self.failed: dict[str, Exception] = {}
        """Name of each analysis that failed → what it raised."""
        self.left_out: dict[str, Unsupported] = {}
        """Name of each analysis that the models' family can't do → why."""
        self._debug, self._named = debug, named

    @contextmanager
    def of(self, *names: str, wrong_input: bool = False) -> Iterator[None]:
        """Note what the block raises as the failure of these analyses, and go on behind it.

        A failed write isn't one analysis's, and passes.

        Args:
            names: analyses that the block makes.
            wrong_input: note a UserError too, which else passes and ends the command.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, Unsupported) and not set(names) & set(self._named):
                self.left_out |= dict.fromkeys(names, error)
                return
            if self._debug or isinstance(error, FailedWrite) or (isinstance(error, UserError) and not wrong_input):
                raise
            self.failed |= dict.fromkeys(names, error)

    @property
    def unanswered(self) -> list[str]:
        """Names of the analyses that failed or were left out."""
        return [*self.failed, *self.left_out]

    def lines_left_out(self) -> list[str]:
        """A line on the analyses that these models can't do, by reason: their names, and why."""
        names: dict[str, list[str]] = {}
        for name, error in self.left_out.items():
            names.setdefault(_reason(error), []).append(name)
        return [f"{', '.join(found)} left out: {reason}" for reason, found in names.items()]

    def lines(self) -> list[str]:
        """A line on each failure: the analysis, and why."""
        return [f"{name} failed: {_reason(error)}" for name, error in self.failed.items()]


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split())[:200]
    return said if isinstance(error, UserError) else f"{type(error).__name__}{': ' if said else ''}{said}"


def write_report(
    subject: Subject, sections: Sequence[Section], samples: Samples, attempts: Attempts | None = None
) -> Path:
    """Write figures/, tables/ and index.html into the subject's report folder; returns the page.

    Args:
        attempts: analyses that failed before, to be named on the page; sections that can't be drawn join them.

    Raises:
        FailedWrite: a full disk, no permission …
    """
    attempts, drawn = attempts or Attempts(), {}
    for section in sections:
        with attempts.of(section.name):
            drawn[section.name] = _write_section(subject.report, section)
    shown = [section for section in sections if section.name in drawn]
    page = render_page(
        subject, shown, samples, images=list(drawn.values()), failed=[*attempts.lines(), *attempts.lines_left_out()]
    )
    target = subject.report / "index.html"
    write_text(target, page)
    return target


def render_page(
    subject: Subject,
    sections: Sequence[Section],
    samples: Samples,
    *,
    images: Sequence[bytes],
    failed: Sequence[str] = (),
) -> str:
    """The page as text; ``images`` are the sections' PNG files, ``failed`` a line on each analysis that could not be made."""
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
        missing=[*failed, *_missing(sections)],
        is_judged=any(section.name == "claims" for section in sections),
        samples=samples,
        command_of=subject.command,
    )


def _missing(sections: Sequence[Section]) -> list[str]:
    """Things that a reader may look for and this page can't show."""
    by_section = {
        "geometry": "analysis=all: what changed inside the model, layer by layer;",
        "steering_sweep": "analysis=steering_sweep: steering sweeps;",
    }
    shown = {section.name for section in sections}
    if "claims" in shown:
        is_of_study = "training" not in shown
        return [] if is_of_study else [line for name, line in by_section.items() if name not in shown]
    return [
        *(line for name, line in by_section.items() if name not in shown),
        "verdicts: inconclusive, since one run has no arms and no other seeds; train.py --multirun study=dsteer trains them, "
        "analyze.py runs=FOLDER judges.",
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
