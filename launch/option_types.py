"""Are the options of our own constructors of the types that their signatures say?"""

import inspect
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_PACKAGES = ("tiltmeter", "datamodules", "lightning_modules", "callbacks", "analysis", "launch")


def option_hints(cls: type) -> dict[str, Any]:
    """Option → annotation, through ``**options`` up the base classes; ``Any`` where a class isn't ours or says nothing."""
    hints: dict[str, Any] = {}
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init is None:
            continue
        parameters = inspect.signature(init).parameters.values()
        known = get_type_hints(init) if base.__module__.split(".")[0] in _PACKAGES else {}
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                hints.setdefault(parameter.name, known.get(parameter.name, Any))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    hints.pop("self", None)
    return hints


def describe_mismatch(value: Any, hint: Any) -> str | None:
    """The value that was expected, when a plain one can't be of an annotated type; None when it can, or can't be judged.

    >>> describe_mismatch("abc", int), describe_mismatch(None, int | None), describe_mismatch(3, float)
    ('a whole number', None, None)
    >>> describe_mismatch("keep_start", Literal["keep_end", "drop"])
    'keep_end or drop'
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, Mapping) or any(not _is_simple(option) for option in options):
        return None
    if any(_fits(value, option) for option in options):
        return None
    return " or ".join(_name(option) for option in options if option is not type(None))


def _is_simple(hint: Any) -> bool:
    return hint in _WORDS or get_origin(hint) is Literal


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _name(hint: Any) -> str:
    return " or ".join(map(str, get_args(hint))) if get_origin(hint) is Literal else _WORDS[hint]
