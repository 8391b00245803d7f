"""No result of the suite depends on how busy the machine is: what hangs is bounded once, and no clock is asserted on."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CLOCKS = {"time", "perf_counter", "monotonic", "process_time"}


def limits(tree: ast.AST) -> Iterator[int]:
    """Lines with a time limit of their own, or a comparison with a clock."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "timeout" and isinstance(node.value, ast.Constant):
            yield node.lineno
        if isinstance(node, ast.Assert):
            called = (each.func for each in ast.walk(node) if isinstance(each, ast.Call))
            if any(
                isinstance(f, ast.Attribute) and f.attr in CLOCKS and ast.unparse(f.value) == "time" for f in called
            ):
                yield node.lineno


def test_no_test_has_a_time_limit_of_its_own_or_asserts_on_a_clock() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted(ROOT.rglob("*.py"))
        for line in limits(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert not found, "use tests.processes.HANGS, or show the cause instead of the time"


def test_limits_are_found() -> None:
    code = "import time\nrun(timeout=240)\nassert time.monotonic() - start < 20\nrun(timeout=HANGS)\nassert time.time\n"
    assert sorted(limits(ast.parse(code))) == [2, 3]
