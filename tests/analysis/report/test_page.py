import csv
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis.figures.training import training_section, training_table
from analysis.open.probe_pairs import ProbePair
from analysis.open.runs import Run, open_run
from analysis.open.subject import subject_of_run
from analysis.report.page import render_page, write_report
from analysis.report.samples import Continuation, Sample, Samples, Span
from tests.analysis.conftest import write_run
from tests.analysis.legible import assert_legible
from tests.processes import run_script
from tiltmeter.pairs.batch import TokenizedPair

HOSTILE = "<script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)>\"'{{ 7*7 }}\x1b[31m\u202e"


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def page_of(run: Run, samples: Samples) -> str:
    return write_report(subject_of_run(run), [training_section(training_table(run))], samples).read_text(
        encoding="utf-8"
    )


def rendered(run: Run, samples: Samples) -> str:
    """A page without sections, which draws nothing."""
    return render_page(subject_of_run(run), [], samples, images=[])


def hostile_samples() -> Samples:
    said = Continuation((Span(HOSTILE, False), Span(HOSTILE, True)), True)
    return Samples([Sample(probe_pair(HOSTILE, HOSTILE, HOSTILE, HOSTILE), said, said)])


def probe_pair(pair_id: str, prompt: str, chosen: str, rejected: str) -> ProbePair:
    return ProbePair(pair_id, "hh", prompt, prompt, chosen, rejected, TokenizedPair([1], [2], [3]), {})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(write_run(tmp_path_factory.mktemp("report")))


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return page_of(run, Samples([], "Because."))


def test_the_report_is_complete(run: Run, page: str) -> None:
    for words in (
        "fake: dpo, 10 steps",
        "someone/model",
        "2026-01-31 12:00",
        "0.900",
        "tables/training.csv",
        "No samples. Because.",
    ):
        assert words in page, words
    assert "What is missing here" in page
    assert f"python analyze.py run={run.folder} analysis=training" in page
    files = sorted(str(p.relative_to(run.report)) for p in run.report.rglob("*") if p.is_file())
    assert files == ["figures/training.pdf", "figures/training.png", "index.html", "tables/training.csv"]
    with (run.report / "tables" / "training.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 12


def test_hostile_text_stays_text(make_run: Callable[..., Path]) -> None:
    config = {"name": HOSTILE, "arm": HOSTILE, "model": {"name_or_path": HOSTILE}, "data": {HOSTILE: HOSTILE}}
    config["datamodule"] = {"labels": HOSTILE}
    page = rendered(open_run(make_run(config=config)), hostile_samples())
    parsed = Page(page)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "{{ 7*7 }}" in page
    assert not re.search("[\x1b\u202e]", page)
    assert "img" not in parsed.tags
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    parsed = Page(page)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(parsed.tags)
    links = [value or "" for name, value in parsed.attributes if name in ("src", "href", "srcset")]
    assert links
    assert all(link.startswith(("data:image/png;base64,", "tables/", "figures/", "#")) for link in links)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in parsed.attributes
    assert "url(" not in page
    assert "@import" not in page


def test_every_link_leads_to_a_file(run: Run, page: str) -> None:
    links = [value or "" for name, value in Page(page).attributes if name == "href"]
    assert links
    assert all((run.report / link).is_file() for link in links if not link.startswith("#"))


def test_the_contents_lead_to_every_section_and_give_its_answer(page: str) -> None:
    contents = page[page.index('<nav class="contents"') : page.index("</nav>")]
    ids = [value for name, value in Page(page).attributes if name == "id"]
    assert [value for name, value in Page(contents).attributes if name == "href"] == ["#training", "#samples"]
    assert {"training", "samples", "contents"} <= set(ids)
    assert "Held-out loss falls from ln 2 = 0.693 to 0.420 in 10 steps." in contents


def test_a_section_says_claim_number_interval_limits_files_and_command(run: Run, page: str) -> None:
    section = page[page.index('<section id="training">') : page.index('<section id="samples">')]
    order = (
        "<strong>Claim.</strong> DPO (Rafailov",
        "Held-out accuracy is 0.900",
        "Interval</h3>",
        "What it does not show</h3>",
        "tables/training.csv",
        "figures/training.pdf",
        "figures/training.png",
        "analysis=training</pre>",
    )
    places = [section.index(words) for words in order]
    assert places == sorted(places)
    assert_legible(training_section(training_table(run)))


def test_a_model_that_says_nothing_is_shown_as_such(run: Run) -> None:
    nothing, blank = Continuation((), False), Continuation((Span(" \n ", True),), True)
    prompt = probe_pair("p", "Hello", "a", "b")
    page = rendered(run, Samples([Sample(prompt, nothing, blank)]))
    assert "(no words)" in page
    assert "(no words, only white space)" in page


def test_what_no_section_shows_is_missing_with_the_analysis_that_shows_it(run: Run) -> None:
    page = rendered(run, Samples([]))
    for words in (
        "analysis=all: what changed inside the model",
        "analysis=steering_sweep: steering sweeps;",
        "verdicts",
    ):
        assert words in page
    assert '<ul class="numbers">' not in page


def test_a_control_says_that_it_is_one(make_run: Callable[..., Path]) -> None:
    page = rendered(open_run(make_run(config={"datamodule": {"labels": "shuffled"}})), Samples([]))
    assert "a control: training labels reversed with probability ½" in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run=last", "runs_root=runs", "analysis=training"], 0, "report/index.html"),
        (["run=last"], 2, "; or ask for what needs no model, as in analysis=[training,geometry]"),
        ([], 2, "tiltmeter: run: expected a run folder, for example run=runs/tiny_synthetic/2026-"),
        (["run=runs/nothing"], 2, "tiltmeter: run: no such folder: runs/nothing"),
        (
            ["run=last", "analysis=geometri"],
            2,
            "analysis=geometri: there is none of that name (there are: all, training, behaviour_by_step, geometry",
        ),
        (["rum=last"], 2, "tiltmeter: rum: unknown configuration key; did you mean run?"),
    ],
)
def test_the_command(
    make_run: Callable[..., Path], tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    make_run()
    done = run_script("analyze.py", *arguments, folder=tmp_path)
    assert done.returncode == code, done.stderr
    said = done.stdout if code == 0 else done.stderr
    assert words in said
    assert len(said.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
