"""Simulations call the same function thousands of times: types and shapes are checked by the tests of its own file."""

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture(autouse=True)
def types_are_checked_elsewhere() -> Iterator[None]:
    """Checks take up to half of the time of a simulated interval."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
