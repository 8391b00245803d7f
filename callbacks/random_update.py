"""RandomUpdate: what would hidden states do if training had changed the weights as much, at random?"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.probe_session import data_of, log, model_of, report_failed_write
from tiltmeter.models.cpu_linear import onednn_is_faster, use_fast_linear
from tiltmeter.states.positions import Position, check_position
from tiltmeter.states.probe_set import Probe
from tiltmeter.weights.random_update import FORMS, N_DRAWS, Form, check_draws, read_random_updates


class RandomUpdate(Callback):
    """Reads the probe under random weight changes of the update's own norm when training ends (control C8).

    Writes ``snapshots/random_update.json`` and logs the means over draws as ``…/random_update/…``. Costs one forward pass a
    draw over the probe. A sharded or larger model is left to ``analyze.py``, which makes up for what it doesn't find.

    Args:
        n_draws: of each form.
        forms: ``gaussian``; ``rotated``: with the update's own singular values.
        seed: of the draws.
        sites, positions: see :class:`~callbacks.observer.Observer`.
        max_parameters: largest model that is copied and read here.
    """

    def __init__(
        self,
        *,
        n_draws: int = N_DRAWS,
        forms: Sequence[Form] = FORMS,
        seed: int = 0,
        sites: str | Sequence[str] = "all",
        positions: Sequence[Position] = ("prompt_last", "content"),
        max_parameters: float = 5e8,
    ) -> None:
        check_draws(n_draws, forms)
        self.n_draws, self.forms, self.seed, self.sites = n_draws, tuple(forms), seed, sites
        self.positions = tuple(check_position(position) for position in positions)
        self.max_parameters = max_parameters

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and read, on the first process alone: the others have nothing left to do but to wait for it."""
        module, data, model = cast(Any, pl_module), data_of(trainer), model_of(pl_module)
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        if not trainer.is_global_zero or trainer.global_step == 0 or not data.splits["probe"].pairs:
            return
        if module.device_mesh is not None or n_parameters > self.max_parameters:
            return
        if module.factory.not_merged is not None:
            module.print("Random weight changes: none, since no weight has changed")
            return
        policy: dict[str, Tensor] = dict(model.state_dict())
        if module.lora is not None:
            policy = module.factory.make_merged(policy)[1]
        base = module.factory.make_plain().to(model.device, model.dtype)
        if onednn_is_faster():
            use_fast_linear(base)
        pairs = data.splits["probe"].pairs
        probe = Probe.of_pairs(pairs, layout=data.layout, sites=self.sites, positions=self.positions)
        draw = partial(read_random_updates, n_draws=self.n_draws, forms=self.forms, seed=self.seed)
        with trainer.precision_plugin.forward_context():
            found = draw(base, policy, pairs, probe, steps_taken=trainer.global_step)
        log(trainer, found.means())
        folder = Path(trainer.default_root_dir) / "snapshots"
        try:
            found.write(folder)
        except OSError as error:
            report_failed_write(folder, error, trainer)
