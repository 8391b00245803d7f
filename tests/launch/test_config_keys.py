"""Arguments that messages name, and the configuration keys that a command calls them by."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from launch.command import one_line_errors
from launch.config_keys import PASSED_ON, config_key
from launch.configuration import CONF, class_named, nodes
from tests.processes import ROOT
from tiltmeter.errors import UserError, argument, arguments_forwarded
from tiltmeter.models.generation import Decoding

TRAIN = [
    "judge=local toxicity=classifier truthfulqa=mc adapter=lora",
    "judge=endpoint toxicity=perspective module=sparse_autoencoder",
    "adapter=sparse",
    "",
]
NAMES_OF_FILES = {"model.safetensors", "steering.safetensors"}


def composed(name: str, *overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=list(overrides))


@pytest.fixture(scope="module")
def shipped() -> list[DictConfig]:
    return [*(composed("train", *choices.split()) for choices in TRAIN), composed("analyze")]


def parsed() -> Iterator[tuple[Path, ast.AST]]:
    for package in ("tiltmeter", "datamodules"):
        for file in sorted((ROOT / package).rglob("*.py")):
            yield file, ast.parse(file.read_text(encoding="utf-8"))


def named_arguments() -> dict[str, Path]:
    """``Decoding.top_p`` of every call of ``argument``, and of every renaming; ``Decoding.*`` where the option is computed."""
    found = {}
    for file, tree in parsed():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "argument":
                (name,) = node.args
                parts = name.values if isinstance(name, ast.JoinedStr) else [name]
                assert isinstance(parts[0], ast.Constant), f"{file}:{node.lineno}: the owner has to be readable"
                found["".join(part.value if isinstance(part, ast.Constant) else "*" for part in parts)] = file
    return found


def definitions() -> dict[str, tuple[str, set[str]]]:
    """Functions and classes by name: their module, and the arguments that they take; ``**`` for any."""
    found = {}
    for file, tree in parsed():
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, (module, _parameters(node)))
            elif isinstance(node, ast.ClassDef):
                fields = {one.target.id for one in node.body if isinstance(one, ast.AnnAssign)}  # type: ignore[union-attr]
                inits = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
                found[node.name] = (module, fields.union(*map(_parameters, inits)))
    return found


def _parameters(function: ast.FunctionDef) -> set[str]:
    given = function.args
    return {one.arg for one in (*given.args, *given.kwonlyargs)} | ({"**"} if given.kwarg else set())


def test_arguments_in_messages_are_those_of_the_function_or_class_that_they_name() -> None:
    known = definitions()
    for name, file in named_arguments().items():
        owner, _, option = name.partition(".")
        if owner != "LoraConfig":  # of peft
            assert option == "*" or {option, "**"} & known[owner][1], f"{file}: {owner} takes no {option}"


def test_every_argument_in_a_message_has_a_key(shipped: list[DictConfig]) -> None:
    """In a configuration of ours, or, for classes that only a user's configuration names, at the node that names them."""
    known = definitions()
    for name, file in named_arguments().items():
        owner, _, option = name.partition(".")
        if option == "*":
            assert _classes(shipped) & {owner, *PASSED_ON.get(owner, ())}, f"{file}: {owner}"
        elif all(config_key(name, config) == option for config in shipped):
            mine = OmegaConf.create({"mine": {"_target_": f"{known[owner][0]}.{owner}"}})
            assert config_key(name, mine) == f"mine.{option}", f"{file}: {name}"


def _classes(configs: list[DictConfig]) -> set[str]:
    targets = {str(node._target_) for config in configs for _, node in nodes(config)} - {"???"}
    return {base.__name__ for target in targets for base in class_named(target).__mro__}


def test_everyone_who_passes_arguments_on_is_in_a_configuration(shipped: list[DictConfig]) -> None:
    assert {taker for takers in PASSED_ON.values() for taker in takers} <= _classes(shipped)
    assert set(PASSED_ON) <= {name.partition(".")[0] for name in named_arguments()}, "one is left over"


@pytest.mark.parametrize(
    ("command", "name", "key"),
    [
        ("train", "Decoding.top_p", "decoding.top_p"),
        ("train", "EndpointJudge.prices", "judge.judge.prices"),
        ("train", "GEvalScorer.score_mode", "judge.score_mode"),
        ("train", "GEvalScorer.prefix", "prefix"),  # none that this configuration could set
        ("train", "LoraConfig.bias", "module.lora.bias"),
        ("train", "OverlapScorer.reference", "callbacks.generation.scorers.overlap.reference"),
        ("train", "PairTokenizer.max_length", "datamodule.max_length"),
        ("train", "check_lora.freeze_embeddings", "module.freeze_embeddings"),
        ("train", "make_preference_loss.loss", "module.loss"),
        ("train", "settle_packing.packed", "datamodule.packed"),
        ("analyze", "PairTokenizer.max_length", "pairs.max_length"),
        ("analyze", "CausalLM.attn_implementation", "attn_implementation"),
        (
            "analyze",
            "DegenerationScorer.max_repetition",
            "behaviour.scorers.degeneration.max_repetition or steering.scorers.degeneration.max_repetition",
        ),
    ],
)
def test_key_is_what_a_user_of_the_command_types(command: str, name: str, key: str) -> None:
    options = ["judge=endpoint", "adapter=lora"] if command == "train" else ["judge=endpoint"]
    assert config_key(name, composed(command, *options)) == key


def test_message_names_keys_inside_a_command_and_arguments_outside() -> None:
    config = OmegaConf.merge(composed("train"), {"debug": True})  # so that errors are raised, not printed
    with pytest.raises(UserError, match=r"^decoding\.top_p: expected above 0"), one_line_errors(config):
        Decoding(top_p=2.0)
    with pytest.raises(UserError, match=r"^top_p: expected above 0"):
        Decoding(top_p=2.0)


def test_argument_that_was_passed_on_is_named_by_who_was_given_it() -> None:
    with one_line_errors(composed("train", "judge=local")):
        with arguments_forwarded({"CausalLM.name_or_path": "LocalJudge.model"}):
            assert argument("CausalLM.name_or_path") == "judge.judge.model"
        assert argument("CausalLM.name_or_path") == "model.name_or_path"


def test_no_text_in_tiltmeter_names_a_config_key() -> None:
    primary = {key for name in ("train", "analyze") for key in composed(name)}
    groups = {path.name for path in CONF.iterdir() if path.is_dir()} | primary - {"hydra"}
    choices = "|".join(path.stem for path in CONF.glob("*/*.yaml"))
    word = re.compile(rf"(?<![.\w])(?:{'|'.join(sorted(groups))})(?:\.[a-z_]+(?:=|: | |$)|=(?:{choices})\b)")
    for file, tree in parsed():
        documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree) if file.is_relative_to(ROOT / "tiltmeter") else ():
            if id(node) not in documented:
                wrong = set(word.findall(_text(node))) - NAMES_OF_FILES
                assert not wrong, f"{file}:{node.lineno}: {wrong}"  # type: ignore[attr-defined]


def _text(node: ast.AST) -> str:
    """Text of a string, with an x for each value in it; empty for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "x" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
