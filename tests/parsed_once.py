"""Configuration files are parsed once in a process: what is composed reads about thirty, in Python, and a run composes thrice."""

import copy
from collections.abc import Callable

from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource

from launch.configuration import CONF

NOT_WRITTEN_BY_TESTS = (str(CONF), "hydra.conf")


def keep_parsed_files() -> None:
    """Let Hydra's sources keep what they have read of conf/ and of Hydra itself; each caller gets a copy."""
    Plugins.instance()  # which makes the classes of sources anew when it looks for them
    for scheme in ("file", "pkg"):
        kind = SourcesRegistry.instance().resolve(scheme)
        kind.load_config = kept(kind.load_config)  # type: ignore[method-assign]


def kept(load: Callable[..., ConfigResult]) -> Callable[..., ConfigResult]:
    found: dict[tuple[str, str], ConfigResult] = {}

    def load_config(self: ConfigSource, config_path: str) -> ConfigResult:
        if self.path not in NOT_WRITTEN_BY_TESTS:
            return load(self, config_path)
        key = self.path, config_path
        if key not in found:
            found[key] = load(self, config_path)
        return copy.deepcopy(found[key])

    return load_config
