"""docs/families.md says what can be done with each family of models, and it is so."""

import pytest

from tests.families import FAMILIES, HEAD, PAGE, try_family
from tests.tiny_models import lightning_warnings


def test_the_table_has_a_row_for_each_family() -> None:
    rows = PAGE.read_text(encoding="utf-8").removeprefix(HEAD).splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(FAMILIES)
    assert len(rows) >= 30


@pytest.mark.slow
@lightning_warnings
@pytest.mark.parametrize("family", FAMILIES)
def test_the_row_of_a_family_is_what_comes_of_it(family: str) -> None:
    assert str(try_family(family)) in PAGE.read_text(encoding="utf-8").splitlines()
