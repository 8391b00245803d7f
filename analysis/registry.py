"""All analyses, in the order of the report. A new one is one line here, and one node of conf/analyze.yaml if it has options.

``table`` computes, ``section`` draws what the table says (:class:`analysis.contract.Analysis`).
"""

from collections.abc import Iterable, Mapping

from analysis.behaviour.asked import behaviour_section
from analysis.behaviour.by_step import NOT_SCORED, behaviour_by_step_section, scores_by_step
from analysis.behaviour.rewards import rewards_section
from analysis.belief.depth import depth_section
from analysis.belief.readout import readout_section
from analysis.belief.shift import shift_section
from analysis.belief.similarity import draw_similarity, similarity_tables
from analysis.belief.traces import traces_section
from analysis.belief.weights import weights_section
from analysis.contract import Analysis, Needs, of_models, of_states
from analysis.controls.c16_recovery_ladder import recovery_ladder_section
from analysis.controls.c17_update_models import update_models_section
from analysis.figures.fig1a_projection import (
    draw_preference_plane,
    draw_projections,
    preference_plane_tables,
    projection_tables,
)
from analysis.figures.fig1b_gradient_field import gradient_field_section
from analysis.figures.fig1c_clouds import cloud_tables, draw_clouds
from analysis.figures.fig3_consistency import consistency_tables, cosine_tables, draw_consistency, draw_cosines
from analysis.figures.fig4a_entropy import (
    draw_entropies,
    draw_entropy_controls,
    entropy_control_tables,
    entropy_tables,
)
from analysis.figures.fig4b_singular_values import (
    draw_signal_ranks,
    draw_singular_values,
    signal_rank_tables,
    singular_value_tables,
)
from analysis.figures.layer_curves import draw_geometry, geometry_tables
from analysis.figures.layer_maps import draw_layers_by_step, layers_by_step_tables
from analysis.figures.training import training_section, training_table
from analysis.figures.transfer import transfer_section
from analysis.neighbours.section import neighbours_section
from analysis.open.observed import Observed
from analysis.report.page import Section
from analysis.sparse.section import sparse_features_section
from analysis.steering.run_sweep import cost_of_sweep, run_sweep, swept_section

SCORERS = ("decoding", "judge", "toxicity")
ANALYSES: tuple[Analysis, ...] = (
    Analysis("training", Needs("run"), training_table, training_section),
    Analysis("behaviour_by_step", Needs("run"), scores_by_step, behaviour_by_step_section, missing=NOT_SCORED),
    of_states("geometry", geometry_tables, draw_geometry, random_weights=True, while_training=True),
    of_states("entropy", entropy_tables, draw_entropies, random_weights=True, while_training=True),
    of_states("entropy_controls", entropy_control_tables, draw_entropy_controls, random_weights=True),
    of_states("singular_values", singular_value_tables, draw_singular_values, random_weights=True),
    of_states("signal_rank", signal_rank_tables, draw_signal_ranks),
    of_states("layers_by_step", layers_by_step_tables, draw_layers_by_step, several_steps=True, while_training=True),
    of_states("cosines", cosine_tables, draw_cosines, random_weights=True, while_training=True),
    of_states("consistency", consistency_tables, draw_consistency, random_weights=True),
    of_states("clouds", cloud_tables, draw_clouds),
    of_states("similarity", similarity_tables, draw_similarity, random_weights=True),
    of_states("projection", projection_tables, draw_projections, while_training=True),
    of_states("preference_plane", preference_plane_tables, draw_preference_plane),
    of_models(
        "behaviour", behaviour_section, node="behaviour", reaches=(*SCORERS, "truthfulqa"), done_in_training=True
    ),
    of_models("rewards", rewards_section, node="rewards", every_pair=True),
    of_models("steering_sweep", swept_section, node="steering", table=run_sweep, cost=cost_of_sweep, reaches=SCORERS),
    of_models("transfer", lambda found: transfer_section(*found), node="transfer"),
    of_models("recovery_ladder", recovery_ladder_section, node="recovery_ladder"),
    of_models("update_models", update_models_section, node="update_models"),
    of_models("weights", weights_section, node="weights"),
    of_models("depth", depth_section, node="depth", reaches=("judge",)),
    of_models("readout", readout_section, node="readout"),
    of_models(
        "shift", shift_section, node="shift", reaches=("decoding", "judge", "truthfulqa"), takes_other_corpus=True
    ),
    of_models("traces", traces_section, node="traces"),
    of_models("neighbours", neighbours_section, node="neighbours", reaches=("decoding", "judge")),
    of_models("sparse_features", sparse_features_section, node="sparse_features", reaches=("judge",)),
    of_models("gradient_field", gradient_field_section, node="gradient_field"),
)
BY_NAME: Mapping[str, Analysis] = {analysis.name: analysis for analysis in ANALYSES}


def sections_of_states(seen: Observed, analyses: Iterable[Analysis] = ANALYSES) -> list[Section]:
    """Sections that can be drawn of what was observed of hidden states; none for a run without a probe.

    Raises:
        UserError: a snapshot is damaged; names the file.
    """
    found = [analysis.answer(seen) for analysis in analyses if analysis.needs.what == "states"]
    return [section for section in found if section is not None]
