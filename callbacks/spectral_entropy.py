"""SpectralEntropy: how low-rank is the update, and does the spread of the states themselves fall?"""

from collections.abc import Sequence
from typing import Any, get_args

from lightning.pytorch import LightningModule, Trainer

from callbacks.observer import Observer
from callbacks.probe_session import log
from tiltmeter.errors import UserError
from tiltmeter.geometry.rows import Variant
from tiltmeter.states.observed_metrics import Metrics, spectral_metrics
from tiltmeter.states.state_pair import StatePair


class SpectralEntropy(Observer):
    """Entropies, ranks and energy shares of ΔH, H_policy and H_base at every site (the paper's Fig. 4).

    Args:
        variants: ``raw``, ``centred`` (less the mean row), ``unit_row``, ``outlier_dims_removed``.
        sites, positions, every_n_steps: see :class:`~callbacks.observer.Observer`.
    """

    def __init__(self, *, variants: Sequence[Variant] = ("raw", "centred"), **options: Any) -> None:
        super().__init__(**options)
        for variant in variants:
            if variant not in get_args(Variant):
                raise UserError(f"callbacks: variants: expected {', '.join(get_args(Variant))}, got {variant}")
        self.variants = tuple(variants)

    def on_observation(self, trainer: Trainer, module: LightningModule, seen: StatePair) -> None:
        """Log the spectra."""
        if not trainer.is_global_zero:
            return
        metrics: Metrics = {}
        for point in self.points(module, seen):
            metrics |= spectral_metrics(seen, point, variants=self.variants)
        log(trainer, metrics)
