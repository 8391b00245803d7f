"""Hidden states under random weight changes as large as training's own (control C8): no training, seconds.

Any change of the weights moves states of alike tokens alike. Before "one constant shift" is said of an update, it is held
against updates that know nothing of preferences: W + ΔW with

- ``gaussian``: independent normal entries, ‖ΔW‖_F that of training's update of the same matrix,
- ``rotated``: also its singular values, singular vectors drawn at random.

A parameter that training left alone is left alone; vectors (norms, biases) have one "singular value", their norm.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from tiltmeter.errors import UserError
from tiltmeter.files import write_json
from tiltmeter.metric_names import at
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.pairs.reference_cache import hash_pairs, hash_weights
from tiltmeter.states.observed_metrics import Metrics, random_update_figures
from tiltmeter.states.positions import Position
from tiltmeter.states.probe_set import Probe
from tiltmeter.states.state_pair import StatePair

Form = Literal["gaussian", "rotated"]
FORMS: tuple[Form, ...] = get_args(Form)
N_DRAWS = 5
FILE = "random_update.json"
"""Name of the file of draws, beside the snapshots of a run."""
_FORMAT = 1
_ROUNDING = 1e-5
"""Singular values below this share of the first are the rounding of merged float32 weights: an adapter's update has few."""


def singular_values(update: Tensor) -> Float[Tensor, " k"]:
    """Singular values of a parameter's update above its rounding, float64, largest first; one of a vector is its norm."""
    sigma = torch.linalg.svdvals(update.detach().to("cpu", torch.float64).reshape(len(update), -1))
    return sigma[sigma > _ROUNDING * sigma[0]]


def random_change(
    update: Tensor,
    *,
    name: str,
    draw: int,
    seed: int = 0,
    form: Form = "gaussian",
    sigma: Float[Tensor, " k"] | None = None,
) -> Tensor:
    """A random matrix of the update's shape and Frobenius norm, float64 on the CPU.

    Args:
        update: W_policy − W_base of one parameter.
        sigma: its :func:`singular_values`, where they are known; they take longer than all else.
        name: of the parameter; with seed, draw and form it decides what is drawn, in any process and order.

    Raises:
        ValueError: the update holds NaN or infinity.
    """
    exact = update.detach().to("cpu").to(torch.float64)
    norm = exact.norm()
    if not torch.isfinite(norm):
        raise ValueError(f"random_change: the update of {name} is not finite")
    digest = hashlib.sha256(f"{form} {seed} {draw} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    if form == "rotated" and exact.ndim > 1:
        sigma = singular_values(exact) if sigma is None else sigma
        sigma = sigma * (norm / sigma.norm())
        left, right = (_random_basis(n, len(sigma), generator) for n in exact.flatten(1).shape)
        return (left * sigma @ right.T).reshape(exact.shape)
    noise = torch.randn(exact.shape, generator=generator).to(torch.float64)
    return noise * (norm / noise.norm())


@contextmanager
@torch.no_grad()
def random_update(
    model: PreTrainedModel,
    policy: Mapping[str, Tensor],
    *,
    draw: int,
    seed: int = 0,
    form: Form = "gaussian",
    spectra: dict[str, Tensor] | None = None,
) -> Iterator[None]:
    """Inside, the base model's weights are W_base + ΔW, ΔW random and as large as training's; afterwards, its own again.

    Its own weights come back bit for bit, however the ``with`` ends: they are put aside, not computed back. One more copy of
    what changed exists inside; differences are taken one parameter at a time.

    Args:
        model: the base model, whole and without adapters.
        policy: the trained model's state dict, adapters merged; tensors may be on another device, or read as they are asked for.
        draw: which of the random updates, from 0.
        spectra: singular values by parameter; what is missing is added, for the next draw of this update.

    Raises:
        ValueError: another model's state dict, or weights that are not finite.
    """
    own: list[tuple[Tensor, Tensor]] = []
    known = {} if spectra is None else spectra
    try:
        for name, parameter in dict[str, Tensor](model.named_parameters()).items():
            if name not in policy or policy[name].shape != parameter.shape:
                raise ValueError(f"random_update: the policy has no {name} of shape {tuple(parameter.shape)}")
            before = parameter.detach().to("cpu").to(torch.float64)
            update = policy[name].detach().to("cpu").to(torch.float64) - before
            if update.any():
                if form == "rotated" and update.ndim > 1 and name not in known:
                    known[name] = singular_values(update)
                sigma = known.get(name)
                changed = before + random_change(update, name=name, draw=draw, seed=seed, form=form, sigma=sigma)
                own.append((parameter, parameter.data))
                parameter.data = changed.to(parameter)
        yield
    finally:
        for parameter, data in own:
            parameter.data = data


class Draw(NamedTuple):
    """Figures of hidden states under one random update, at one site and position."""

    form: Form
    draw: int
    position: Position
    site: str
    figures: Metrics
    """Values under the names of :func:`tiltmeter.states.observed_metrics.random_update_figures`."""


@dataclass(frozen=True)
class RandomUpdates:
    """Draws of random weight changes, and what they were made from.

    Args:
        weights: sha256 of base and policy.
        pairs: sha256 of the pairs that were read.
        steps_taken: optimizer steps between base and policy; None: not known.
    """

    seed: int
    steps_taken: int | None
    weights: Mapping[str, str]
    pairs: str
    draws: Sequence[Draw]

    def means(self, form: Form = "gaussian") -> Metrics:
        """Each figure's mean over the draws of one form, as metrics: ``shift_share/random_update/content/layer_03``."""
        sums: dict[str, list[float]] = {}
        for draw in self.draws:
            for name, value in draw.figures.items() if draw.form == form else ():
                sums.setdefault(at(name, (draw.site, draw.position)), []).append(value)
        return {name: math.fsum(values) / len(values) for name, values in sums.items()}

    def write(self, folder: Path) -> None:
        """Write the draws to :data:`FILE`. Raises OSError."""
        about = {name: value for name, value in asdict(self).items() if name != "draws"}
        write_json(folder / FILE, about | {"format": _FORMAT, "draws": [draw._asdict() for draw in self.draws]})

    @classmethod
    def read(cls, folder: Path) -> "RandomUpdates | None":
        """Read the draws that :meth:`write` wrote; None where there is no file.

        Raises:
            UserError: the file is damaged or of another format; names it.
        """
        path = folder / FILE
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if raw.pop("format") != _FORMAT:
                raise ValueError("another format")
            draws = [Draw(**draw) for draw in raw.pop("draws")]
            return cls(draws=[draw._replace(figures=_numbers(draw.figures)) for draw in draws], **raw)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{path}: damaged ({str(error)[:80]}); delete it, and python analyze.py makes it again"
            raise UserError(reason) from error


def check_draws(n_draws: int, forms: Sequence[str]) -> None:
    """Check that so many draws of these forms can be made. Raises UserError."""
    if n_draws < 2:
        raise UserError(f"random updates: n_draws: expected at least 2, of which a spread can be told, got {n_draws}")
    for form in forms:
        if form not in FORMS:
            raise UserError(f"random updates: forms: expected {', '.join(FORMS)}, got {form}")


def read_random_updates(
    model: PreTrainedModel,
    policy: Mapping[str, Tensor],
    pairs: Sequence[TokenizedPair],
    probe: Probe,
    *,
    n_draws: int = N_DRAWS,
    forms: Sequence[Form] = FORMS,
    seed: int = 0,
    steps_taken: int | None = None,
) -> RandomUpdates:
    """Read the probe once under the base's weights and once under each random update, and keep the figures alone.

    Args:
        model: the base model; see :func:`random_update`, also for ``policy``.
        pairs: that the probe reads; their hash is kept.
        n_draws: of each form.

    Raises:
        ValueError: see :func:`random_update`.
    """
    base, prompts = probe.read(model), [str(list(pair.prompt_ids)) for pair in pairs]
    draws, spectra = [], dict[str, Tensor]()
    for form in forms:
        for draw in range(n_draws):
            with random_update(model, policy, draw=draw, seed=seed, form=form, spectra=spectra):
                changed = StatePair(base, probe.read(model), clusters=prompts)
            found = {point: random_update_figures(changed, point) for point in base}
            draws += [Draw(form, draw, p.position, p.site, figures) for p, figures in found.items() if figures]
    weights = {"base": hash_weights(model.state_dict()), "policy": hash_weights(dict(policy))}
    read = hashlib.sha256(hash_pairs(pairs).numpy().tobytes()).hexdigest()
    return RandomUpdates(seed, steps_taken, weights, read, draws)


def _random_basis(n: int, k: int, generator: torch.Generator) -> Tensor:
    """k orthonormal columns of length n, uniform (Haar): QR of normal numbers with R's diagonal made positive."""
    q, r = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _numbers(figures: Any) -> Metrics:
    return {str(name): float(value) for name, value in figures.items()}
