"""Judges of what two models say, for analyses that make them speak."""

from collections.abc import Mapping

from analysis.open.checkpoints import Checkpoints
from datamodules.oracle import PlantedOracle
from tiltmeter.scoring.scorer import Scorer

ORACLE = "oracle"


def judges_of(scorers: Mapping[str, Scorer], checkpoints: Checkpoints) -> Mapping[str, Scorer]:
    """The judges that were given; without one the oracle, where preferences are planted."""
    if scorers or checkpoints.world is None:
        return scorers
    oracle = PlantedOracle(checkpoints.world, agreement_pairs=0)
    oracle.start()
    return {ORACLE: oracle}
