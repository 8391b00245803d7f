"""What training did to hidden states: the sections of the report, in its order."""

from collections.abc import Callable, Mapping, Sequence

from analysis.figures.fig1a_projection import preference_plane_section, projection_section
from analysis.figures.fig1c_clouds import cloud_section
from analysis.figures.fig3_consistency import consistency_section, cosine_section
from analysis.figures.fig4a_entropy import entropy_control_section, entropy_section
from analysis.figures.fig4b_singular_values import signal_rank_section, singular_value_section
from analysis.figures.layer_curves import geometry_section
from analysis.figures.layer_maps import layers_by_step_section
from analysis.open.observed import Observed
from analysis.open.runs import Run
from analysis.report.page import Section
from tiltmeter.errors import UserError

_BUILDERS: Mapping[str, Callable[[Observed], Section | None]] = {
    "geometry": geometry_section,
    "entropy": entropy_section,
    "entropy_controls": entropy_control_section,
    "singular_values": singular_value_section,
    "signal_rank": signal_rank_section,
    "layers_by_step": layers_by_step_section,
    "cosines": cosine_section,
    "consistency": consistency_section,
    "clouds": cloud_section,
    "projection": projection_section,
    "preference_plane": preference_plane_section,
}
SECTIONS = tuple(_BUILDERS)
"""Names of the sections, in the order of the report."""
BESIDE_RANDOM = ("geometry", "entropy", "entropy_controls", "singular_values", "cosines", "consistency")
"""Those that hold the update against random weight changes."""
WHILE_TRAINING = ("geometry", "entropy", "layers_by_step", "cosines", "projection")
"""Those that are quick enough to be drawn after every look at the probe."""
OVER_STEPS = ("layers_by_step",)
"""Sections that need several observations."""
READ_NOW = tuple(name for name in SECTIONS if name not in OVER_STEPS)
"""Sections for which one reading of two models is enough."""


def hidden_state_section(name: str, seen: Observed) -> Section | None:
    """One section; None when nothing was logged or stored for it.

    Raises:
        UserError: a file is damaged; names it.
    """
    return _BUILDERS[name](seen)


def section_of_run(name: str, run: Run) -> Section:
    """One section of a finished run.

    Raises:
        UserError: the run has nothing for it, or a file is damaged.
    """
    found = hidden_state_section(name, Observed.stored(run.folder, run.metrics))
    if found is None:
        raise UserError(
            f"analysis={name}: {run.folder} has no readings for it (expected a run trained with callbacks=geometry or "
            "callbacks=full that took at least one step)"
        )
    return found


def hidden_state_sections(seen: Observed, names: Sequence[str] = SECTIONS) -> list[Section]:
    """The sections of these names that there are readings for.

    Raises:
        UserError: a file is damaged; names it.
    """
    found = [hidden_state_section(name, seen) for name in names]
    return [section for section in found if section is not None]
