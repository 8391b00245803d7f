"""What a person is told to type means what was meant, through the shell and through Hydra."""

import shlex
from signal import Signals

from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tiltmeter.commands import command, setting
from tiltmeter.errors import Preempted

HYDRA = OverridesParser.create()
AWKWARD = st.text(alphabet=list("ab1e.-_/+\\\"'${}=, ()[]~#:;|é\n0"), max_size=12)


def read_back(word: str) -> object:
    """The value in the configuration, after shell, Hydra and OmegaConf."""
    config = OmegaConf.create({"x": None})
    OmegaConf.update(config, "x", HYDRA.parse_override(word).value())
    return config.x


@given(AWKWARD | st.text())
@example("checkpoints/last-step-000011.ckpt")
@example("my runs/it's, (new)/[1]")
@example("null")
@example("-inf")
@example("2026")
def test_a_printed_setting_is_read_back_as_the_value_that_was_meant(value: str) -> None:
    (word,) = shlex.split(setting("key", value))
    assert read_back(word) == value


def test_plain_paths_stay_without_quotes() -> None:
    for path in ("runs/tiny_hh/2026-01-31_12-00-00", "/data/x.jsonl", "../x", "org/model-7b", "last"):
        assert setting("run", path) == f"run={path}"


def test_overrides_that_hydra_reads_already_are_quoted_for_the_shell_alone() -> None:
    line = command("analyze.py", "sites=[layer_00, layer_01]", run="my run")
    assert shlex.split(line) == ["python", "analyze.py", 'run="my run"', "sites=[layer_00, layer_01]"]


def test_what_a_stopped_run_says_to_type_is_quoted() -> None:
    stopped = Preempted(Signals.SIGTERM, after_step=1, checkpoint="my runs/a=b/last.ckpt")
    (word,) = shlex.split(str(stopped).partition("go on with ")[2])
    assert read_back(word) == "my runs/a=b/last.ckpt"
