"""All analyses, in the order of the report. A new one is one line here, and one node of conf/analyze.yaml if it has options.

``table`` computes, ``section`` draws what the table says (:class:`analysis.contract.Analysis`).
"""

from collections.abc import Iterable, Mapping

from analysis.behaviour.asked import behaviour_section
from analysis.behaviour.by_step import NOT_SCORED, behaviour_by_step_section, scores_by_step
from analysis.contract import Analysis, Needs, of_models, of_states
from analysis.figures.fig1a_plane import preference_plane_section
from analysis.figures.fig1a_projection import projection_section
from analysis.figures.fig1b_gradient_field import gradient_field_section
from analysis.figures.fig1c_clouds import cloud_section
from analysis.figures.fig3_consistency import consistency_section
from analysis.figures.fig3_cosines import cosine_section
from analysis.figures.fig4a_controls import entropy_control_section
from analysis.figures.fig4a_entropy import entropy_section
from analysis.figures.fig4b_signal_rank import signal_rank_section
from analysis.figures.fig4b_singular_values import singular_value_section
from analysis.figures.hidden_states import Watched
from analysis.figures.layer_curves import geometry_section
from analysis.figures.layer_maps import layers_by_step_section
from analysis.figures.training import training_section, training_table
from analysis.report.page import Section
from analysis.steering.run_sweep import cost_of_sweep, run_sweep, swept_section
from analysis.steering.transfer_section import transfer_section


def _observed(seen: Watched) -> Watched:
    return seen


SCORERS = ("decoding", "judge", "toxicity")
ANALYSES: tuple[Analysis, ...] = (
    Analysis("training", Needs("run"), training_table, training_section),
    Analysis("behaviour_by_step", Needs("run"), scores_by_step, behaviour_by_step_section, missing=NOT_SCORED),
    of_states(
        "geometry", _observed, lambda s: geometry_section(s.table, s.random), random_weights=True, while_training=True
    ),
    of_states(
        "entropy", _observed, lambda s: entropy_section(s.table, s.random), random_weights=True, while_training=True
    ),
    of_states(
        "entropy_controls",
        _observed,
        lambda s: s.rows and entropy_control_section(s.rows, s.spectra, s.random),
        random_weights=True,
    ),
    of_states(
        "singular_values",
        _observed,
        lambda s: s.rows and singular_value_section(s.rows, s.spectra, s.random),
        random_weights=True,
    ),
    of_states("signal_rank", _observed, lambda s: s.rows and signal_rank_section(s.rows, s.spectra)),
    of_states(
        "layers_by_step", _observed, lambda s: layers_by_step_section(s.table), several_steps=True, while_training=True
    ),
    of_states(
        "cosines",
        _observed,
        lambda s: s.cosines and cosine_section(s.cosines, s.random),
        random_weights=True,
        while_training=True,
    ),
    of_states(
        "consistency", _observed, lambda s: s.rows and consistency_section(s.rows, s.random), random_weights=True
    ),
    of_states("clouds", _observed, lambda s: s.rows and cloud_section(s.rows)),
    of_states("projection", _observed, lambda s: projection_section(s.table, s.metrics), while_training=True),
    of_states("preference_plane", _observed, lambda s: preference_plane_section(s.parting)),
    of_models(
        "behaviour", behaviour_section, node="behaviour", reaches=(*SCORERS, "truthfulqa"), done_in_training=True
    ),
    of_models("steering_sweep", swept_section, node="steering", table=run_sweep, cost=cost_of_sweep, reaches=SCORERS),
    of_models("transfer", lambda found: transfer_section(*found), node="transfer"),
    of_models("gradient_field", gradient_field_section, node="gradient_field"),
)
BY_NAME: Mapping[str, Analysis] = {analysis.name: analysis for analysis in ANALYSES}


def sections_of_states(seen: Watched, analyses: Iterable[Analysis] = ANALYSES) -> list[Section]:
    """Sections that can be drawn of what was observed of hidden states; none for a run without a probe.

    Raises:
        UserError: a snapshot is damaged; names the file.
    """
    found = [analysis.answer(seen) for analysis in analyses if analysis.needs.what == "states"]
    return [section for section in found if section is not None]
