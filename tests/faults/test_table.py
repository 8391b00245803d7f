"""The table of README.md: every row is there, and so is every test it names."""

import re
from pathlib import Path

from tests.processes import ROOT

TABLE = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
ROWS = [line.split(" | ") for line in TABLE.splitlines() if line.startswith("| F")]


def test_every_row_names_tests_that_there_are() -> None:
    assert [row[0] for row in ROWS] == [f"| F{number}" for number in range(1, 35)]
    for number, *_, tests in ROWS:
        named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", tests)
        assert named, number
        for path, function in named:
            file = ROOT / (path if "/" in path else f"tests/faults/{path}")
            assert file.is_file(), f"{number}: {path}"
            assert not function or f"def {function}(" in file.read_text(encoding="utf-8"), f"{number}: {function}"


def test_the_count_below_it_is_the_rows_own() -> None:
    in_part = [row[0].removeprefix("| ") for row in ROWS if "**In part:**" in row[2]]
    not_run = [row[0].removeprefix("| ") for row in ROWS if "**not run:**" in row[2]]
    whole = len(ROWS) - len(in_part) - len(not_run)
    assert f"{whole + len(in_part)} of the {len(ROWS)} rows have tests" in TABLE
    assert f"{whole} whole, {len(in_part)} in part ({', '.join(in_part)}:" in TABLE
    assert f"{', '.join(not_run)} is not run." in TABLE
