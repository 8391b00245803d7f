"""What every section of a report owes its reader, checked on the section itself."""

from itertools import combinations

from matplotlib.axes import Axes
from matplotlib.text import Text

from analysis.report.page import Section
from analysis.report.style import house_style


def assert_legible(section: Section) -> None:
    """It says what it tests, how surely and what it does not show; its labels are plain text, inside the figure and apart."""
    for said in (section.claim, section.interval, *section.limits, *section.reading):
        assert said.strip().endswith((".", ")")), (section.name, said)
    assert section.limits, section.name
    with house_style():
        section.figure.draw_without_rendering()
        assert not (found := [fault for axes in section.figure.axes for fault in _faults(axes)]), (section.name, found)


def _faults(axes: Axes) -> list[str]:
    ticks = [*axes.get_xticklabels(which="both"), *axes.get_yticklabels(which="both")]
    faults = [f"formula: {t.get_text()}" for t in ticks if "$" in t.get_text() or "mathdefault" in t.get_text()]
    titles = [axes.title, axes._left_title]  # type: ignore[attr-defined]
    labels = [text for text in (*axes.texts, *titles) if text.get_visible() and text.get_text().strip()]
    page = axes.figure.bbox.padded(1)
    for text in (*labels, axes.xaxis.label, axes.yaxis.label):
        box = text.get_window_extent()
        if text.get_text() and not (
            page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        ):
            faults.append(f"cut: {text.get_text()}")
    return faults + [f"{a.get_text()} on {b.get_text()}" for a, b in combinations(labels, 2) if _touch(a, b)]


def _touch(a: Text, b: Text) -> bool:
    """Their letters share more than a line's leading."""
    first, second = a.get_window_extent(), b.get_window_extent()
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return width > 1 and height > 0.25 * min(first.height, second.height)
