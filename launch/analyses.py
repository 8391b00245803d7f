"""The questions that ``analyze.py`` knows, what each needs, and what of a command line concerns it.

Three kinds: read off the tables of a run's folder; drawn from hidden states, those that a run stored or else read again; and
asked of the models. One of the last kind is a class with attributes ``dtype`` and ``device`` and methods ``section(checkpoints)
-> Section`` and ``costs(checkpoints) -> list[Cost]``, built from its node in conf/analyze.yaml: a line here, a node there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from hydra.core.hydra_config import HydraConfig
from omegaconf import ListConfig

from analysis.behaviour.by_step import NAME as BEHAVIOUR_BY_STEP
from analysis.behaviour.by_step import behaviour_by_step_section, behaviour_of_run
from analysis.behaviour.section import NAME as BEHAVIOUR
from analysis.controls.c16_recovery_ladder import NAME as LADDER
from analysis.controls.c17_update_models import NAME as UPDATE_MODELS
from analysis.figures.fig1b_section import NAME as GRADIENT_FIELD
from analysis.figures.fig2_steering import NAME as STEERING
from analysis.figures.hidden_states import SECTIONS as HIDDEN_STATES
from analysis.figures.training import training_section
from analysis.figures.transfer import NAME as TRANSFER
from analysis.open.read_states import OVER_STEPS
from analysis.open.runs import Run
from analysis.report.page import Section
from tiltmeter.errors import UserError

ALL = "all"
OF_FOLDER: Mapping[str, Callable[[Run], Section]] = {
    "training": training_section,
    BEHAVIOUR_BY_STEP: behaviour_of_run,
}
"""Read off the tables of a run's folder."""
OPTIONAL: Mapping[str, Callable[[Run], Section | None]] = {BEHAVIOUR_BY_STEP: behaviour_by_step_section}
"""Those of them that a run need not have."""
NEED_A_RUN = (*OF_FOLDER, *OVER_STEPS)
ASKED: Mapping[str, str] = {
    BEHAVIOUR: "behaviour",
    STEERING: "steering",
    TRANSFER: "transfer",
    LADDER: LADDER,
    UPDATE_MODELS: UPDATE_MODELS,
    GRADIENT_FIELD: "gradient_field",
}
"""Asked of the models → the node of the configuration that it is built from."""
_KEYS: Mapping[str, Sequence[str]] = {
    **{node: (name,) for name, node in ASKED.items()},
    "truthfulqa": (BEHAVIOUR,),
    **dict.fromkeys(("decoding", "judge", "toxicity"), (BEHAVIOUR, STEERING)),
    "hidden_states": HIDDEN_STATES,
    **dict.fromkeys(("dtype", "device", "attn_implementation"), (*HIDDEN_STATES, *ASKED)),
}
"""Keys of the configuration → the analyses that they have an effect on; others concern all."""
_OF_CHECKPOINTS = ("data", "pairs", "out")
"""Keys that only two checkpoints need."""


def chosen_analyses(asked: str | ListConfig, *, of_run: bool) -> dict[str, bool]:
    """Names of the analyses, in the order of the report, and whether each was asked for by its name.

    Args:
        asked: ``all``, a name or several.
        of_run: of a run, else of two checkpoints, which have no folder to read.

    Raises:
        UserError: an unknown name, or one that needs a run.
    """
    known = [*OF_FOLDER, *HIDDEN_STATES, *ASKED]
    names = [asked] if isinstance(asked, str) else list(asked)
    for name in names or ["none"]:
        if name not in (ALL, *known):
            raise UserError(f"analysis={name}: there is none of that name (there are: {', '.join((ALL, *known))})")
    if not of_run and (wrong := [name for name in names if name in NEED_A_RUN]):
        there_are = ", ".join(name for name in known if name not in NEED_A_RUN)
        raise UserError(f"analysis={wrong[0]}: needs a run; two checkpoints are asked with {there_are} or {ALL}")
    left_out = (BEHAVIOUR,) if of_run else NEED_A_RUN  # a run's models were scored while it trained
    whole = [name for name in known if name not in left_out] if ALL in names else []
    return {name: name in names for name in known if name in names or name in whole}


def refuse_unused(names: Iterable[str], *, of_run: bool) -> None:
    """Refuse what was set on the command line and would have no effect on any of these analyses. Raises UserError."""
    needs_two = dict.fromkeys(_OF_CHECKPOINTS, "two checkpoints, base=… aligned=…")
    unused = needs_two if of_run else {"upload": "a run, which W&B knows"}
    for key, analyses in _KEYS.items():
        if not set(analyses) & set(names):
            unused[key] = _needs(analyses)
    for text in _overrides():
        key = _key(text)
        if (needs := unused.get(key.split(".")[0])) is not None:
            raise UserError(f"{key}: has no effect here; it is for {needs}")


def _needs(analyses: Sequence[str]) -> str:
    asked = " or ".join(f"analysis={name}" for name in analyses if name not in HIDDEN_STATES)
    read = "hidden states that no run stored" if set(HIDDEN_STATES) & set(analyses) else ""
    return ", or ".join(text for text in (read, asked) if text)


def options_of(name: str) -> list[str]:
    """The words of the command line that one analysis needs to be made again, without what is asked about.

    Left out: what concerns other analyses alone, and what says how to go about it rather than what to compute.
    """
    never = ("run", "base", "aligned", "analysis", "dry_run", "upload", "debug", "runs_root", "steering.restart")
    return [
        text.lstrip("+")
        for text in _overrides()
        if _key(text) not in never and name in _KEYS.get(_key(text).split(".")[0], (name,))
    ]


def is_set(name: str) -> bool:
    """Whether the command line sets an option that concerns this analysis, but not all of them."""
    return any(name in _KEYS.get(_key(text).split(".")[0], ()) for text in _overrides())


def _overrides() -> list[str]:
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _key(override: str) -> str:
    return override.lstrip("~+").partition("=")[0]
