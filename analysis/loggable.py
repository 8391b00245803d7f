"""Names that a run can log: those of hidden states from the code that makes them, on numbers without meaning."""

from functools import lru_cache

import torch

from analysis.cosines import SIDES
from analysis.hidden_states import SECTIONS
from tiltmeter.batch import PROMPT, TokenizedPair
from tiltmeter.capture import HiddenStates, ReadPoint
from tiltmeter.geometry import VARIANTS
from tiltmeter.layers import FINAL_POST_NORM, Unembedding, all_sites
from tiltmeter.positions import Position
from tiltmeter.preference_losses import PAIR_METRICS
from tiltmeter.probe import PreferenceDirections
from tiltmeter.watching import consistency_metrics, projection_metrics, spectral_metrics

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
    "alarm/snapshot",
    "probe/steps_taken",
)
_N_LAYERS, _N_PAIRS, _WIDTH, _VOCABULARY = 2, 4, 3, 6


@lru_cache(maxsize=1)
def loggable_metrics() -> frozenset[str]:
    """Scalars of a DPO run of two layers with every callback and variant."""
    base, policy = _states(0), _states(1)
    generator = torch.Generator().manual_seed(2)
    head = Unembedding(torch.randn(_VOCABULARY, _WIDTH, generator=generator))
    pairs = [TokenizedPair([1], [2, 3], [4, 5]) for _ in range(_N_PAIRS)]
    directions, clusters = PreferenceDirections(head, pairs), [str(i) for i in range(_N_PAIRS)]
    names = {f"{split}/{name}" for split in _SPLITS for name in PAIR_METRICS} | set(_OTHERS)
    for point in base:
        if point.position == "diverge":
            names |= set(projection_metrics(base, policy, point.site, directions, clusters=clusters, head=head))
            continue
        names |= set(spectral_metrics(base, policy, point, variants=VARIANTS))
        names |= set(consistency_metrics(base, policy, point, previous=torch.ones(_WIDTH)))
    return frozenset(names)


def loggable_media() -> frozenset[str]:
    """Figures and histograms; of histograms those of the deepest site."""
    return frozenset({f"figures/{name}" for name in SECTIONS} | {f"cosines/{side}/{FINAL_POST_NORM}" for side in SIDES})


def _states(seed: int) -> dict[ReadPoint, HiddenStates]:
    generator = torch.Generator().manual_seed(seed)
    rows, sides = torch.arange(_N_PAIRS), torch.full((_N_PAIRS,), PROMPT)
    positions: tuple[Position, ...] = ("prompt_last", "diverge")
    return {
        ReadPoint(site, position): HiddenStates(torch.randn(_N_PAIRS, _WIDTH, generator=generator), rows, sides)
        for site in all_sites(_N_LAYERS)
        for position in positions
    }
