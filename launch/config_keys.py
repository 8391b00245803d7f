"""From an argument that a message names to the configuration key that sets it."""

from collections.abc import Mapping

from omegaconf import DictConfig

from launch.configuration import class_named, constructor_options, nodes

PASSED_ON: Mapping[str, tuple[str, ...]] = {
    "GEvalScorer": ("JudgeScorer",),
    "JudgeScorer": ("PlantedOracle",),
    "PairTokenizer": ("PreferenceDataModule", "HeldOutPairs"),
    "WinRateScorer": ("JudgeScorer",),
    "add_lora": ("LogProbModule",),
    "check_lora": ("LogProbModule",),
    "make_preference_loss": ("DPOModule",),
    "router_coefficient": ("DPOModule",),
    "settle_packing": ("PreferenceDataModule",),
}
"""Functions and classes that no configuration names, and who has their arguments from it; for all others, ``_target_`` says it."""


def config_key(argument: str, config: DictConfig) -> str:
    """Key of an argument such as ``Decoding.top_p`` in a configuration, by the class that a node makes or one of its bases.

    Returns:
        ``decoding.top_p``; several where several nodes take it, and the bare ``top_p`` where none does.
    """
    owner, _, option = argument.partition(".")
    takers = {owner, *PASSED_ON.get(owner, ())}
    found: dict[str, list[str]] = {}
    exact: list[str] = []
    for path, node in nodes(config):
        made = class_named(str(node._target_))
        names = {base.__name__ for base in made.__mro__}
        for taker in takers & names if option in (constructor_options(node) or ()) else ():
            found.setdefault(taker, []).append(f"{path}.{option}")
            exact += [f"{path}.{option}"] * (made.__name__ == owner)
    keys = exact or found.get(owner) or [key for of_taker in found.values() for key in of_taker]
    return " or ".join(dict.fromkeys(keys)) or option
