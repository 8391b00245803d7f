"""What all tests share: where the real data is, and a world without network or accounts."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from hypothesis import settings

from tests import fork_server

settings.register_profile("explore", deadline=None)  # new examples every time: pytest --hypothesis-profile=explore
# a busy machine and another draw are no failures
settings.register_profile("house", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("house")
gc.disable()  # while everything is imported: nothing of that is ever freed
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _checked(*, typechecker: Any) -> Callable[[Any], Any]:
    """jaxtyping's decorator, but for functions inside functions: theirs would be made anew, by compiling, at each outer call."""
    return lambda of: of if "<locals>" in of.__qualname__ else _jaxtyped(of, typechecker=typechecker)


_jaxtyped, jaxtyping.jaxtyped = jaxtyping.jaxtyped, _checked


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Where the whole suite is run by several workers, they fork from one process, which imports the libraries once."""
    if node.config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        node.workerinput["fork_server"] = fork_server.start()


def pytest_configure(config: pytest.Config) -> None:
    """In such a worker."""
    if address := getattr(config, "workerinput", {}).get("fork_server"):
        fork_server.join(address)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: where processes take turns at files, the last ones are short and end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """A full collection goes over what a test made, not over the million objects of the libraries, again and again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def configuration_files_are_parsed_once() -> None:
    """Composing takes half of the time where they are; see tests/parsed_once.py."""
    from tests.parsed_once import keep_parsed_files

    keep_parsed_files()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data; unset: skip with the reason; set but missing: fail."""
    root = os.environ.get("TILTMETER_SHARED")
    if not root:
        pytest.skip("TILTMETER_SHARED is not set (docs/data.md says where the real data comes from)")
    folder = Path(root) / "data"
    assert folder.is_dir(), f"TILTMETER_SHARED={root}: no folder {folder}"
    return folder
