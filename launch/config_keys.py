"""From an argument that a message names to the configuration key that sets it."""

from collections.abc import Mapping

from omegaconf import DictConfig

from launch.configuration import class_named, constructor_options, nodes

PASSED_ON: Mapping[str, tuple[str, ...]] = {
    "GEvalScorer": ("JudgeScorer",),
    "JudgeScorer": ("PlantedOracle",),
    "Learner": ("SparseAutoencoderModule",),
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
    taking = {
        f"{path}.{option}": [base.__name__ for base in class_named(str(node._target_)).__mro__]
        for path, node in nodes(config)
        if option in (constructor_options(node) or ())
    }
    exact = [key for key, names in taking.items() if names[0] == owner]
    inherited = [key for key, names in taking.items() if owner in names]
    passing = [key for key, names in taking.items() if not set(names).isdisjoint(PASSED_ON.get(owner, ()))]
    return " or ".join(exact or inherited or passing) or option
