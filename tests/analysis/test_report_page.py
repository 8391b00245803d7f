"""The report of a run with every section, as files and as a browser shows it."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from analysis.figures.training import training_section, training_table
from analysis.open.observations import UPDATE
from analysis.open.observed import Observed
from analysis.open.probe_pairs import ProbePair
from analysis.open.runs import Run, open_run
from analysis.open.subject import subject_of_run
from analysis.registry import sections_of_states
from analysis.report.page import write_report
from analysis.report.samples import Continuation, Sample, Samples, Span
from tests.analysis import planted_geometry as planted
from tests.analysis.asked import OF_STATES
from tests.analysis.browser import CHROMIUM, Browser
from tests.analysis.conftest import write_run
from tiltmeter.pairs.batch import TokenizedPair

pytestmark = pytest.mark.slow
WITH_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
HOSTILE = "<script>alert(1)</script><img src=https://evil.invalid/x onerror=alert(2)>"
ENDLESS = "supercalifragilistic" * 30
WIDTHS = (1280, 400)
TOO_WIDE = """[...document.body.querySelectorAll('*')].filter(e => !e.closest('.table') && e.getClientRects().length
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
IMAGES = "[...document.images].map(i => i.complete && i.naturalWidth > 0 && i.alt.length > 0)"
FAINT = """(() => {
  const rgba = text => text.match(/[\\d.]+/g).map(Number).concat(1).slice(0, 4);
  const light = c => c.slice(0, 3).map(x => x / 255).map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) {
    const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] > 0) return c; } return [255, 255, 255, 1]; };
  return [...document.body.querySelectorAll('*')].filter(e => e.getClientRects().length
    && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).filter(e => {
    const [a, b] = [light(rgba(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    return (a + .05) / (b + .05) < 4.5 || parseFloat(getComputedStyle(e).fontSize) < 12;
  }).map(e => e.outerHTML.slice(0, 80)); })()"""
"""Elements whose text has less contrast than WCAG AA asks of small text, or is below 12 px."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose report is written, with samples that try to break out and words that know no end."""
    folder = write_run(tmp_path_factory.mktemp("report"), rows=planted.run_rows())
    planted.write_snapshots(folder / "snapshots")
    found = open_run(folder)
    said = Continuation((Span(HOSTILE, False), Span(ENDLESS, True)), True)
    pair = ProbePair("p", "hh", ENDLESS, HOSTILE, ENDLESS, HOSTILE, TokenizedPair([1], [2], [3]), {})
    sections = [
        training_section(training_table(found)),
        *sections_of_states(Observed.stored(found.folder, found.metrics)),
    ]
    write_report(subject_of_run(found), sections, Samples([Sample(pair, said, said)]))
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def complaints(browser: Browser) -> list[str]:
    """What the console says, and every request but that of the page itself and of images inside it."""
    said = [str(e["params"]) for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    said += [str(e["params"]) for e in browser.events if e["method"] == "Runtime.consoleAPICalled"]
    urls = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    return said + [url for url in urls if not url.startswith("data:")][1:]


def test_every_section_has_its_files_and_the_table(run: Run) -> None:
    page = (run.report / "index.html").read_text(encoding="utf-8")
    for name in OF_STATES:
        assert (run.report / "tables" / f"{name}.csv").is_file()
        assert (run.report / "figures" / f"{name}.png").is_file()
        assert f"analysis={name}" in page
    table = pd.read_csv(run.report / "tables" / "geometry.csv")
    assert list(table.columns[:3]) == ["steps_taken", "position", "site"]
    assert set(UPDATE) <= set(table.columns)
    assert '<th scope="col">ρ₁ centred</th>' in page
    assert f"<td>{table['shift_share'][0]:.3f}</td>" in page
    assert "what changed inside the model" not in page


@WITH_CHROMIUM
def test_a_browser_has_nothing_to_complain_of_and_asks_for_nothing(run: Run, browser: Browser) -> None:
    browser.look(width=1280)
    browser.open(run.report / "index.html")
    assert complaints(browser) == []
    shown = browser.evaluate(IMAGES)
    assert shown == [True] * (1 + len(OF_STATES))
    assert browser.evaluate("document.querySelectorAll('script, img[src^=http]').length") == 0
    dead = (
        "[...document.querySelectorAll('a[href^=\"#\"]')].filter(a => !document.getElementById(a.hash.slice(1))).length"
    )
    assert browser.evaluate(dead) == 0


@WITH_CHROMIUM
def test_the_page_is_readable_on_a_desk_on_a_phone_in_the_dark_and_on_paper(run: Run, browser: Browser) -> None:
    browser.open(run.report / "index.html")
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            browser.look(width=width, scheme=scheme)
            assert browser.evaluate(OVERFLOW) <= 0, width
            assert browser.evaluate(TOO_WIDE) == [], width
            assert browser.evaluate(FAINT) == [], (width, scheme)
    browser.look(width=1280)
    first = "document.querySelector('.contents').getBoundingClientRect().top"
    assert browser.evaluate(first) < 800, "what was run, the numbers and what is missing stand on the first screen"
    browser.look(width=720, scheme="dark", media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate(OVERFLOW) <= 0


@WITH_CHROMIUM
def test_a_page_with_faults_is_found_out(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<body><script>console.log(1); undefined.x</script><img alt=x src='https://evil.invalid/x.png'>"
        "<div style='width: 3000px; color: #bbb; background: #fff'>pale</div>",
        encoding="utf-8",
    )
    browser.look(width=400)
    browser.open(page)
    said = complaints(browser)
    assert any("TypeError" in line for line in said)
    assert "https://evil.invalid/x.png" in said
    assert browser.evaluate(IMAGES) == [False]
    assert browser.evaluate(OVERFLOW) > 0
    assert browser.evaluate(TOO_WIDE)
    assert browser.evaluate(FAINT)
