"""Checks a command line before anything starts: unknown keys, files and values become one line with the nearest match.

Defaults live once, in constructor signatures; the YAML files hold only what deviates. So a key may be set on the command
line if it is in the YAML or if the node's ``_target_`` takes it, and nothing else may.
"""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.option_types import describe_mismatch, option_hints
from tiltmeter.commands import setting
from tiltmeter.errors import UserError
from tiltmeter.plain_text import did_you_mean

CONF = Path(__file__).resolve().parent.parent / "conf"
_SECRET = re.compile(r"\b(sk-[\w-]{16,}|hf_[A-Za-z0-9]{20,}|[0-9a-f]{40})\b")
_HOME = re.compile(r"~[\w.-]*(/|$)")
_BARE_HOME = re.compile(r"(?<=[=,\[])~[\w.-]*(?=[/,\]]|$)")
"""Outside quotes, where Hydra's grammar has no such character."""
_FLAGS_WITH_VALUE = (
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
)
_REVISION_KEYS = ("revision",)
"""Keys whose 40 hexadecimal digits are a commit, not an API key."""


def prepare_overrides(arguments: Sequence[str], *, config_name: str) -> list[str]:
    """Check the overrides of a command line and rewrite those that name a constructor's option.

    Args:
        arguments: ``sys.argv[1:]``; flags (``--multirun``, ``--cfg job``, ``--help`` …) are passed through.
        config_name: primary configuration, ``train`` or ``analyze``.

    Returns:
        the arguments for Hydra; ``data.path=x`` becomes ``++data.path=x`` where only the constructor knows ``path``, and
        ``model.name_or_path=x`` alone implies ``model=pretrained`` where the experiment would make a model from scratch.

    Raises:
        UserError: something is misspelt or unknown, or looks like a secret.
    """
    if broken := [text for text in arguments if re.search("[\ud800-\udfff]", text)]:
        raise UserError(f"{broken[0]}: these bytes are no text in this locale's encoding; set LANG=C.UTF-8")
    flags, overrides = _split_arguments(arguments)
    parsed = [_parse(_BARE_HOME.sub(lambda found: os.path.expanduser(found[0]), text)) for text in overrides]  # noqa: PTH111
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = _compose_choices(parsed, config_name)
        if _names_a_pretrained_model(parsed, tree):
            parsed.insert(0, _parse("model=pretrained"))
            tree = _compose_choices(parsed, config_name)
    for override in parsed:
        if override.key_or_group.endswith("._target_"):
            OmegaConf.update(tree, override.key_or_group, override.value(), force_add=True)
    rewritten = [_rewrite(o, tree) for o in parsed]
    if not {"--multirun", "-m", "hydra.mode=MULTIRUN"} & {*arguments}:
        _refuse_sweeps(parsed)
    return flags + rewritten


def check_config(config: DictConfig, *, config_name: str = "train") -> None:
    """Check a composed configuration: every node's keys against its constructor, no secret anywhere.

    Args:
        config: as Hydra composed it.
        config_name: its primary configuration, ``train`` or ``analyze``.

    Raises:
        UserError: an unknown key or a value that looks like a secret.
    """
    primary = _root_keys(config_name)
    for key in config:
        if key not in primary:
            raise UserError(f"{key}: unknown configuration key{did_you_mean(str(key), primary)}")
    for key in missing_keys(config):
        raise UserError(f"{key}: expected a value, got none; add {key}=… to the command line")
    for path, node in nodes(config):
        _check_node(path, node)
    for path, value in leaves(config):
        if isinstance(value, str) and _SECRET.search(value) and path.split(".")[-1] not in _REVISION_KEYS:
            raise UserError(
                f"{path}: this looks like a secret; configuration is saved and logged, give keys in the environment"
            )


def expand_home(config: DictConfig) -> None:
    """Replace ``~`` and ``~user`` at the start of every value by the folder that a shell takes it for, in place."""
    for path, value in leaves(config):
        if isinstance(value, str) and _HOME.match(value):
            OmegaConf.update(config, path, os.path.expanduser(value))  # noqa: PTH111 (it leaves unknown users alone)


OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)
OmegaConf.register_new_resolver("unseen_by", lambda base: "given" if base is None else "unseen", replace=True)


def missing_keys(config: DictConfig) -> list[str]:
    """Keys that only the user can give a value; what refers to one of them is none itself."""
    return sorted(path for path, value in leaves(config) if value == MISSING)


def _check_node(path: str, node: DictConfig) -> None:
    """Its keys and their types against the constructor's signature."""
    known = constructor_options(node) or {}
    for key, value in OmegaConf.to_container(node, resolve=True).items():  # type: ignore[union-attr]
        if str(key).startswith("_"):
            continue
        if key not in known:
            raise UserError(f"{path}.{key}: {node._target_} has no such option{did_you_mean(str(key), known)}")
        if (expected := describe_mismatch(value, known[str(key)])) is not None:
            raise UserError(f"{path}.{key}: expected {expected}, got {value}")


def _root_keys(config_name: str) -> set[str]:
    """Keys of a primary configuration and the groups of its defaults list; ``module`` files set ``monitor`` beside them."""
    primary = yaml.safe_load((CONF / f"{config_name}.yaml").read_text(encoding="utf-8"))
    groups = {group for entry in primary.get("defaults", []) if isinstance(entry, dict) for group in entry}
    return set(primary) | groups | ({"monitor"} if "module" in groups else set())


def _split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and overrides."""
    flags: list[str] = []
    overrides: list[str] = []
    for i, argument in enumerate(arguments):
        if argument.startswith("-") or (i and arguments[i - 1] in _FLAGS_WITH_VALUE):
            flags.append(argument)
        elif "=" in argument[1:] or argument.startswith("~"):
            overrides.append(argument)
        else:
            raise UserError(f"{argument}: expected key=value, for example experiment=tiny_hh")
    return flags, overrides


def _parse(text: str) -> Override:
    """One override; a value outside Hydra's grammar is explained with its quoted form."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        key, _, value = text.partition("=")
        if value == "1" or not key:
            raise UserError(f"{text}: cannot be read as key=value; expected for example seed=1") from error
        _parse(f"{key}=1")  # where it is the key that can't be read
        raise UserError(
            f"{text}: Hydra can’t read this value as it stands; to set {key} to this very text, quote it: {setting(key, value)}"
        ) from error


def _refuse_sweeps(parsed: Sequence[Override]) -> None:
    for override in parsed:
        if override.is_sweep_override():
            key, _, value = str(override.input_line).partition("=")
            raise UserError(
                f"{key}={value}: several values are a sweep, which needs --multirun; a text with commas is quoted, "
                f"{setting(key, value)}, and a list is in brackets, {shlex.quote(f'{key}=[{value}]')}"
            )


def _names_a_pretrained_model(parsed: list[Override], tree: DictConfig) -> bool:
    keys = {o.key_or_group for o in parsed}
    return "model.name_or_path" in keys and "model" not in keys and OmegaConf.select(tree, "model.init") == "random"


def _is_group(override: Override) -> bool:
    key = override.key_or_group.split("@")[0]
    return (CONF / key).is_dir() and not key.startswith("hydra")


def _compose_choices(overrides: Sequence[Override], config_name: str) -> DictConfig:
    """The tree of keys for the chosen groups; of a sweep, the first choice stands for all."""
    chosen = []
    for override in filter(_is_group, overrides):
        names = [name.strip("[]() '\"") for name in str(override.input_line).partition("=")[2].split(",")]
        folder = CONF / override.key_or_group.split("@")[0]
        available = {p.stem for p in folder.glob("*.yaml")}
        for name in names:
            if name and name != "null" and name not in available:
                have = ", ".join(sorted(available))
                raise UserError(
                    f"{folder.name}={name}: there is none of that name{did_you_mean(name, available)} (there are: {have})"
                )
        if names:
            chosen.append(f"{override.key_or_group}={names[0]}")
    try:
        return compose(config_name, overrides=chosen)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"configuration: {str(error).strip().splitlines()[0]}") from error


def _rewrite(override: Override, tree: DictConfig) -> str:
    text = str(override.input_line)
    key = override.key_or_group
    if key == "hydra/launcher":
        _check_launcher(text.partition("=")[2])
    if _is_group(override) or key.startswith(("hydra.", "hydra/")) or not text[0].isalnum():
        return text
    if _has_key(tree, key) or OmegaConf.select(tree, key, throw_on_missing=False) is not None:
        return text
    if _may_add(tree, key):
        return f"++{text}"
    raise UserError(f"{key}: unknown configuration key{did_you_mean(key, set(_known_keys(tree)))}")


def _check_launcher(name: str) -> None:
    """Refuse a launcher that isn't installed; Hydra's own is always there."""
    package = f"hydra_{name.partition('_')[0]}_launcher"
    if name != "basic" and (find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{package}") is None):
        raise UserError(
            f"hydra/launcher={name}: not installed; joblib and submitit_slurm come with pip install 'tiltmeter[spread]'"
        )


def _may_add(tree: DictConfig, key: str) -> bool:
    """Whether a key that the tree lacks is an option of a constructor, or of a mapping that takes any."""
    parent_path, _, name = key.rpartition(".")
    parent = OmegaConf.select(tree, parent_path) if parent_path else tree
    if not isinstance(parent, DictConfig):
        return False
    options = constructor_options(parent)
    if options is not None:
        return name in options
    return bool(parent_path) and "_target_" not in parent and _is_free(parent_path, tree)


def _is_free(path: str, tree: DictConfig) -> bool:
    """A plain mapping given to a constructor (model.architecture) takes any key."""
    owner, _, name = path.rpartition(".")
    parent = OmegaConf.select(tree, owner) if owner else None
    options = constructor_options(parent) if isinstance(parent, DictConfig) else None
    return options is not None and name in options


def _has_key(tree: DictConfig, key: str) -> bool:
    parent_path, _, name = key.rpartition(".")
    parent = OmegaConf.select(tree, parent_path) if parent_path else tree
    return isinstance(parent, DictConfig) and name in set(parent)  # `in parent` denies keys that are still ???


def constructor_options(node: DictConfig) -> dict[str, Any] | None:
    """Options of a node's ``_target_`` and their annotations; None without a target."""
    return option_hints(class_named(str(node._target_))) if "_target_" in node else None


def class_named(target: str) -> type:
    """Class that a ``_target_`` names. Raises UserError: there is none."""
    try:
        found = resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"_target_={target}: there is no such class ({error}); expected module.Class, beside train.py or on PYTHONPATH"
        ) from error
    if not isinstance(found, type):
        raise UserError(f"_target_={target}: expected a class, got {type(found).__name__}")
    return found


def nodes(config: DictConfig, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Path and node of everything with a ``_target_``; references are not followed."""
    for key in config:
        value = config._get_node(key)
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_interpolation():
            if "_target_" in value:
                yield here, value
            yield from nodes(value, here)


def leaves(config: DictConfig | ListConfig, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of everything that isn't a mapping or a list, as written: references are not followed."""
    container = OmegaConf.to_container(config, resolve=False)
    stack: list[tuple[str, Any]] = [(path, container)]
    while stack:
        here, value = stack.pop()
        if isinstance(value, dict):
            stack += [(f"{here}.{k}" if here else str(k), v) for k, v in value.items()]
        elif isinstance(value, list):
            stack += [(f"{here}.{i}", v) for i, v in enumerate(value)]
        else:
            yield here, value


def _known_keys(tree: DictConfig) -> Iterator[str]:
    yield from (str(key) for key in tree)
    yield from (path for path, _ in leaves(tree))
    for path, node in nodes(tree):
        yield from (f"{path}.{name}" for name in constructor_options(node) or ())
