"""README.md and docs/: short enough, every link leads somewhere, and what they say of the code is so."""

import ast
import pkgutil
import re
from pathlib import Path

import pytest

from analysis.registry import BY_NAME
from docs.architecture import BEGIN, END, FLOWS, PACKAGES, PAGE, tree
from tests.processes import ROOT
from tests.test_contributing import NEW

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = "\n".join(file.read_text(encoding="utf-8") for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def anchors(page: Path) -> set[str]:
    """Headings of a page as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_read_in_two_minutes() -> None:
    assert len(README.split()) <= 1500


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)]:
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_names_of_modules_classes_and_functions_on_the_pages_exist() -> None:
    packages = "|".join(set(PACKAGES) - {"callbacks"})  # whose names are keys of the configuration, too
    for page in PAGES:
        for name in re.findall(rf"\b(?:{packages})(?:\.\w+)+", page.read_text(encoding="utf-8")):
            if not re.search(NEW, name):
                assert pkgutil.resolve_name(name.removesuffix(".py")) is not None, (page.name, name)


def test_figures_of_the_paper_are_where_the_readme_says() -> None:
    table = README.split("## The figures of the paper")[1].split("\n## ")[0]
    rows = [row.split(" | ") for row in table.splitlines() if row.startswith("|")][2:]
    assert len(rows) == 8
    for _, analyses, code, tables in rows:
        for name in re.findall(r"`(\w+)`", analyses):
            assert name in BY_NAME, name
        (path, *others) = re.findall(r"`([\w/]+)`", code)
        assert [path, *others] == [name for name in (path, *others) if places(name)], code
        for name in re.findall(r"`(\w+)\.csv`", tables):
            assert re.search(rf'"{name}(\.csv)?"', CODE), name


def places(name: str) -> bool:
    return (ROOT / "analysis" / "figures" / f"{name}.py").is_file() or (ROOT / name).is_dir()


def test_tree_of_the_architecture_page_is_current() -> None:
    written = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert written == tree(), "run: python docs/architecture.py"


def test_flows_name_files_that_exist_and_what_they_hand_on() -> None:
    for steps in FLOWS.values():
        for step in steps:
            text = (ROOT / step.file).read_text(encoding="utf-8")
            assert step.hands_on in text or step.hands_on.islower(), step


def test_first_sentences_begin_with_a_verb_or_a_quantity() -> None:
    """Docstrings of modules, classes, functions and of names alike: none leans on the line above it."""
    leaning = {"What", "Which", "Of", "How", "Where", "Who", "That", "Those", "Whose"}
    found = []
    for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            body = getattr(node, "body", None)
            for line in body if isinstance(body, list) else ():
                text = line.value.value if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) else ""
                if isinstance(text, str) and text.split()[:1] and text.split()[0] in leaning:
                    found.append(f"{file.relative_to(ROOT)}:{line.lineno}: {text.split('.')[0]}")
    assert not found
