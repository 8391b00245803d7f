"""Names that a run can log, from the code that makes them, on numbers and texts without meaning."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from analysis.figures.fig3_consistency import OF_PAIRS
from analysis.registry import ANALYSES
from datamodules.oracle import PlantedOracle
from datamodules.synthetic import SyntheticWorld
from tiltmeter.geometry.rows import VARIANTS
from tiltmeter.judges.judge import Question, Reply
from tiltmeter.judges.judge_scorer import JudgeScorer
from tiltmeter.models.generation import Completion
from tiltmeter.models.layers import FINAL_POST_NORM, Unembedding, all_sites
from tiltmeter.pairs.batch import PROMPT, TokenizedPair
from tiltmeter.pairs.preference_losses import PAIR_METRICS
from tiltmeter.scoring.degeneration import DegenerationScorer
from tiltmeter.scoring.overlap import OverlapScorer
from tiltmeter.scoring.preference import preference_scores
from tiltmeter.scoring.preference_classifier import classifier_figures
from tiltmeter.scoring.scorer import SCORED_STEP, Sample, Scorer, as_metrics
from tiltmeter.scoring.toxicity import WordListToxicity
from tiltmeter.scoring.truthfulqa import FIGURES as TRUTHFULQA
from tiltmeter.states.capture import HiddenStates, ReadPoint
from tiltmeter.states.observed_metrics import (
    consistency_metrics,
    place,
    projection_metrics,
    random_update_figures,
    spectral_metrics,
)
from tiltmeter.states.probe_set import DEFAULT_POSITIONS, PreferenceDirections
from tiltmeter.states.state_pair import StatePair

_SPLITS = ("train", "val")
_OTHERS = (
    "throughput/tokens_per_second",
    "throughput/pairs_per_second",
    "gradient/mean_resultant",
    "gradient/energy_along_sequence",
    "gradient/energy_along_steering",
    "alarm/chosen_logp_drop",
    "alarm/accuracy_saturation",
    "alarm/length_ratio",
    "alarm/nan",
    "alarm/skipped_steps",
    "alarm/snapshot",
    "probe/steps_taken",
)
_N_LAYERS, _N_PAIRS, _WIDTH, _VOCABULARY = 2, 4, 3, 6


@lru_cache(maxsize=1)
def loggable_metrics() -> frozenset[str]:
    """Scalars of a DPO run of two layers with every callback and variant."""
    states = StatePair(_states(0), _states(1))
    generator = torch.Generator().manual_seed(2)
    head = Unembedding(torch.randn(_VOCABULARY, _WIDTH, generator=generator))
    pairs = [TokenizedPair([1], [2, 3], [4, 5]) for _ in range(_N_PAIRS)]
    directions = PreferenceDirections(head, pairs)
    names = {f"{split}/{name}" for split in _SPLITS for name in PAIR_METRICS} | set(_OTHERS)
    for point in states.base:
        if point.position == "diverge":
            names |= set(projection_metrics(states, point.site, directions, head=head))
            continue
        names |= set(spectral_metrics(states, point, variants=VARIANTS))
        names |= set(consistency_metrics(states, point, previous=torch.ones(_WIDTH)))
        names |= {f"{name}/{place(point)}" for name in random_update_figures(states, point)}
    return frozenset(names | _behaviour())


def loggable_media() -> frozenset[str]:
    """Figures and histograms; of histograms those of the deepest site."""
    figures = {f"figures/{a.name}" for a in ANALYSES if a.while_training} | {
        f"cosines/{side}/{FINAL_POST_NORM}" for side in OF_PAIRS
    }
    return frozenset(figures | {"samples"})


def _states(seed: int) -> dict[ReadPoint, HiddenStates]:
    generator = torch.Generator().manual_seed(seed)
    rows, sides = torch.arange(_N_PAIRS), torch.full((_N_PAIRS,), PROMPT)
    return {
        ReadPoint(site, position): HiddenStates(torch.randn(_N_PAIRS, _WIDTH, generator=generator), rows, sides)
        for site in all_sites(_N_LAYERS)
        for position in DEFAULT_POSITIONS
    }


def _behaviour() -> set[str]:
    """Figures of generated text by every scorer that a run may have, of what the model knows, and of what it prefers."""
    said = Completion("Yes.", 1, is_cut=False)
    samples = [Sample(str(i), "Why?", "So.", said, said, str(i), 0, {"situation": "why"}) for i in range(6)]
    scorers: list[Scorer] = [
        OverlapScorer(),
        DegenerationScorer(),
        WordListToxicity(),
        PlantedOracle(SyntheticWorld(n_prompts=6)),
        JudgeScorer(_Always(), evaluation_steps=["Read."]),
    ]
    figures = preference_scores([1.0], [0.0], beta=1.0, groups=["a"], weights=[1.0]).figures
    for scorer in scorers:
        scorer.start()
        figures += scorer.score(samples).figures
    for site in all_sites(_N_LAYERS):
        rows = torch.randn(6, _WIDTH)
        probe = classifier_figures(rows, -rows, [s.group for s in samples], of="policy", where=site)
        figures += [figure._replace(name=f"{figure.name}/{site}") for figure in probe]
    known = [name + suffix for name, _ in TRUTHFULQA.values() for suffix in ("", "_zero_shot")]
    names = {f"behaviour/{name}" for name in ["toxicity", "toxicity/base", *known]}
    return names | set(as_metrics(figures)) | {SCORED_STEP}


class _Always:
    """A judge that likes everything."""

    name = "anybody"

    def start(self, *, want_probabilities: bool) -> None: ...

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        return [Reply(probabilities=dict.fromkeys(question.choices[:1], 1.0)) for question in questions]
