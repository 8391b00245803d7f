"""The analyses that a command line asks for, and the options that concern each."""

from collections.abc import Collection, Iterable

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig

from analysis.registry import ANALYSES, BY_NAME
from tiltmeter.errors import UserError

ALL = "all"
_CORPUS = "data"
"""Key of where prompts come from; of a run, of another corpus."""
_OF_CHECKPOINTS = (_CORPUS, "pairs", "out")
"""Keys that two checkpoints need."""
_CLAIMS = ("claims", "claims_file")
"""Keys that a study and a run's whole report take."""
_OF_STUDY = (*_CLAIMS, "ask_models", "plan")
"""Keys that a study needs."""
_ALWAYS = ("runs", "debug")
_ALSO_OF_STUDY = (
    *("data", "pairs", "upload", "dtype", "device", "attn_implementation", "gradient_field", "recovery_ladder"),
    *("update_models", "readout", "shift", "sparse_features", *_ALWAYS),
)
"""Keys that a study takes as well as others."""
_HOW = ("run", "base", "aligned", "analysis", "dry_run", "upload", "debug", "runs_root", "steering.restart")
"""Keys that say what is asked about, or how to go about it, rather than what to compute."""


def chosen_analyses(asked: str | ListConfig, *, of_run: bool) -> dict[str, bool]:
    """Names of the analyses, in the order of the report, and whether each was asked for by its name.

    Args:
        asked: ``all``, a name or several.
        of_run: of a run, else of two checkpoints, which have no folder to read.

    Raises:
        UserError: an unknown name, or one that needs a run.
    """
    names = [asked] if isinstance(asked, str) else list(asked)
    possible = {a.name: a for a in ANALYSES if of_run or not a.needs.a_run}
    _check_names(names, possible)
    return {
        name: name in names
        for name, analysis in possible.items()
        if name in names or (ALL in names and not (of_run and analysis.done_in_training))
    }


def _check_names(names: Collection[str], possible: Iterable[str]) -> None:
    for name in names or ["none"]:
        if name not in (ALL, *BY_NAME):
            raise UserError(f"analysis={name}: there is none of that name (there are: {', '.join((ALL, *BY_NAME))})")
        if name not in (ALL, *possible):
            raise UserError(
                f"analysis={name}: needs a run; two checkpoints are asked with {', '.join(possible)} or {ALL}"
            )


def refuse_unused(names: Collection[str], *, of_run: bool, has_claims: bool = False) -> None:
    """Refuse what was set on the command line and would have no effect on any of these analyses. Raises UserError.

    Args:
        has_claims: whether claims stand beside them.
    """
    needs_two = dict.fromkeys(_OF_CHECKPOINTS, "two checkpoints, base=… aligned=…")
    if any(BY_NAME[name].takes_other_corpus for name in names):
        del needs_two[_CORPUS]
    else:
        takes = " or ".join(f"analysis={analysis.name}" for analysis in ANALYSES if analysis.takes_other_corpus)
        needs_two[_CORPUS] += f", or of a run {takes}"
    of_study = dict.fromkeys(_OF_STUDY, "a study, runs=…")
    if has_claims:
        of_study = {key: needed for key, needed in of_study.items() if key not in _CLAIMS}
    unused = of_study | (needs_two if of_run else {"upload": "a run, which W&B knows"})
    for text in _overrides():
        root = _key(text).split(".")[0]
        concerned = _concerned_by(root)
        if concerned and not {*concerned} & {*names}:
            unused[root] = _needs(concerned)
        if root in unused:
            raise UserError(f"{_key(text)}: has no effect here; it is for {unused[root]}")


def refuse_unused_of_study() -> None:
    """Refuse what was set on the command line and would have no effect on a study. Raises UserError."""
    for text in _overrides():
        if _key(text).split(".")[0] not in (*_OF_STUDY, *_ALSO_OF_STUDY):
            takes = ", ".join(key for key in (*_OF_STUDY, *_ALSO_OF_STUDY) if key not in _ALWAYS)
            raise UserError(f"{_key(text)}: has no effect on a study, runs=…, which takes {takes}; leave it out")


def give_corpus(config: DictConfig) -> None:
    """Have analyses that take another corpus beside a run's own pairs ask about that of ``data=…``, where there is one."""
    if config.get(_CORPUS) is not None:
        for analysis in (a for a in ANALYSES if a.takes_other_corpus):
            config[analysis.node].corpus = config[_CORPUS]


def was_set(key: str) -> bool:
    """Whether the command line sets a key or something below it."""
    return any(f"{_key(text)}.".startswith(f"{key}.") for text in _overrides())


def options_of(name: str) -> list[str]:
    """The words of the command line that one analysis needs to be made again, without what is asked about."""
    of_run = was_set("run") and name not in [analysis.name for analysis in ANALYSES if analysis.takes_other_corpus]
    return [
        text.lstrip("+")
        for text in _overrides()
        if _key(text) not in _HOW
        and not (of_run and _key(text).split(".")[0] == _CORPUS)
        and name in (_concerned_by(_key(text).split(".")[0]) or (name,))
    ]


def is_set(name: str) -> bool:
    """Whether the command line sets an option that concerns this analysis, but not all of them."""
    return any(name in _concerned_by(_key(text).split(".")[0]) for text in _overrides())


def _concerned_by(key: str) -> list[str]:
    """Analyses that a key of the configuration has an effect on; none of them: it concerns all."""
    return [analysis.name for analysis in ANALYSES if key in analysis.keys]


def _needs(names: Iterable[str]) -> str:
    states = [name for name in names if BY_NAME[name].needs.what == "states"]
    asked = " or ".join(f"analysis={name}" for name in names if name not in states)
    return ", or ".join(text for text in ("hidden states that no run stored" if states else "", asked) if text)


def _overrides() -> list[str]:
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _key(override: str) -> str:
    return override.lstrip("~+").partition("=")[0]
