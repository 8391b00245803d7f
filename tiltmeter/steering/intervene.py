"""Write hooks: hidden states of a model changed along vectors while it runs, at any site, row by row and token by token.

What happens at a site is an :class:`Intervention`; :func:`steer` puts any number of them on a model for the length of a
``with``. Nothing is written in place, and a token that an intervention doesn't reach keeps every bit.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiltmeter.errors import UserError
from tiltmeter.models.hooks import hook_site
from tiltmeter.models.layers import backbone
from tiltmeter.steering.operators import TABLE, Operator, check_vectors
from tiltmeter.steering.vector import check_site_and_width

TOKENS = ("all", "new", "prompt")


@dataclass(frozen=True, eq=False)
class Intervention:
    """One operator along one or several vectors at one site.

    Args:
        site: as :mod:`tiltmeter.models.layers` names it. ``final_post_norm`` adds to the logits alone, the same for every context.
        vectors: [vector d_model], along which; with diagonal coefficients [row row], a vector of its own for each row.
        coefficients: a number for every row and vector; [row] for all vectors of a row; [row vector]; or
            [row token vector] where tokens are those of each forward pass. An operator with one strength for all its
            vectors (``project_out``, ``rotate``) has one in the place of vectors. In units of the vector (add, subtract,
            add_keeping_norm), as a share (project_out), in activation units (clamp), in radians (rotate).
            A single row serves all rows. Where they are 0 nothing is touched, not a bit; only ``clamp`` has no such value.
        operator: see :mod:`tiltmeter.steering.operators`.
        tokens: which tokens. ``all``: every real one; ``prompt``; ``new``: those after the prompt, which the model reads back
            after having made them, so the first new token, predicted from the prompt's last, is not changed. A mask
            [row token] has a column for every token of the sequence, padding and what a cache holds included.

    Raises:
        UserError: an unknown operator or choice of tokens, or vectors or coefficients that don't fit or aren't finite.
    """

    site: str
    vectors: Tensor
    coefficients: float | int | Tensor = 1.0
    operator: Operator = "add"
    tokens: str | Tensor = "all"

    def __post_init__(self) -> None:
        """Check everything that can be checked without a model."""
        if self.vectors.ndim != 2 or not self.vectors.is_floating_point() or not self.vectors.numel():
            raise UserError(
                f"steering: vectors: expected floating-point [vector, d_model], got {self.vectors.dtype} {list(self.vectors.shape)}"
            )
        check_vectors(self.operator, self.vectors)
        if isinstance(self.tokens, str) and self.tokens not in TOKENS:
            raise UserError(f"steering: tokens: expected {', '.join(TOKENS)} or a mask, got {self.tokens!r}")
        if isinstance(self.tokens, Tensor) and (self.tokens.dtype != torch.bool or self.tokens.ndim != 2):
            raise UserError(
                f"steering: tokens: expected a boolean mask [row, token], got {self.tokens.dtype} {list(self.tokens.shape)}"
            )
        given = _as_tensor(self.coefficients)
        if not bool(given.isfinite().all()):
            raise UserError("steering: coefficients: expected finite numbers, got NaN or infinity")
        if given.ndim > 3 or (given.ndim > 1 and given.shape[-1] != self.n_strengths):
            raise UserError(
                f"steering: coefficients: expected a number, [row], [row, {self.n_strengths}] or [row, token, "
                f"{self.n_strengths}] for {self.operator} along {len(self.vectors)} vectors, got {list(given.shape)}"
            )

    @property
    def n_strengths(self) -> int:
        """Coefficients of one token."""
        return 1 if TABLE[self.operator].one_strength else len(self.vectors)

    def strengths(self) -> Float[Tensor, "rows tokens strength"]:
        """The coefficients of every row or one for all, of every token of a pass or one for all."""
        given = _as_tensor(self.coefficients)
        if given.ndim == 3:
            return given
        by_row = given if given.ndim == 2 else given.reshape(-1, 1).expand(-1, self.n_strengths)
        return by_row[:, None]


@contextmanager
def steer(
    model: PreTrainedModel,
    interventions: Intervention | Sequence[Intervention],
    *,
    prompt_width: int | None = None,
    rows_per_coefficient: int = 1,
) -> Iterator[None]:
    """Let interventions act on every forward pass of a model inside the ``with``, in their order at each site.

    The forward pass may be ``generate`` (with a cache or without, padded on any side, beams), the model, its backbone; with
    gradients or without, which reach vectors and coefficients that ask for them. Padding is never touched. At a site that
    is steered, a :func:`~tiltmeter.states.capture.capture` opened inside reads what interventions have left, one that was open
    before reads what they were given. Hooks are gone when the ``with`` ends, however it ends. Compiled modules run
    uncompiled inside it, since a compiled one would not see its new hooks. Activation checkpointing as transformers
    does it leaves hooks outside of what is recomputed, so that the backward pass may run after the ``with``.

    Args:
        prompt_width: tokens of the prompt, padding included; None: the pass on an empty cache is the prompt and what
            follows is new. To be said where passes have no cache, or the prompt comes in pieces.
        rows_per_coefficient: adjacent rows of the model that share a row of coefficients or of a mask: ``num_beams``, or
            ``num_return_sequences`` without beams.

    Raises:
        UserError: an unknown site, vectors of another width, or a model without recognisable blocks or final norm.
        ValueError: from inside the forward pass: another number of rows or tokens than coefficients or a mask are for, or
            no way to know which tokens are new (no cache) or padding (a mask of attention that is not [row, token]).

    Example::

        v = load_vectors(run / "vectors" / "steering.safetensors")["layer_07"]
        strengths = torch.tensor([0.0, 0.5, 1.0])  # one for each row of ids
        with steer(model, Intervention(v.site, v.values[None], strengths, tokens="new")):
            model.generate(input_ids=ids, attention_mask=mask)
    """
    listed = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    for intervention in listed:
        check_site_and_width(model, intervention.site, intervention.vectors.shape[1])
    current = _Pass(prompt_width, rows_per_coefficient)
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        watched = backbone(model).register_forward_pre_hook(current.begin, with_kwargs=True)
        stack.callback(watched.remove)
        for intervention in listed:
            handle = hook_site(model, intervention.site, _Writer(intervention, current, model.device))
            stack.callback(handle.remove)
        yield


class _Pass:
    """Tokens that the forward pass that is running sees, and whose."""

    def __init__(self, prompt_width: int | None, rows_per_coefficient: int) -> None:
        self.prompt_width = prompt_width
        self.copies = rows_per_coefficient
        self.cached: int | None = None
        """Tokens that the cache holds already; None: there is no cache."""
        self.mask: Any = None
        """The attention mask, as the backbone was given it."""
        self.is_packed = False

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at what the backbone is given."""
        given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        cache = given.get("past_key_values")
        self.cached = None if cache is None else int(cache.get_seq_length())
        self.mask = given.get("attention_mask")
        self.is_packed = given.get("packing") is not None

    def reached(self, tokens: str | Tensor, hidden: Tensor) -> Bool[Tensor, "rows token"] | None:
        """Mask of the tokens of this pass that are meant, for every row or one for all; None: not a single one."""
        columns = slice(self.cached or 0, (self.cached or 0) + hidden.shape[1])
        if isinstance(tokens, Tensor):
            by_row = self.by_row(tokens, len(hidden), "the mask of tokens")
            wanted = _cut(by_row, columns, "the mask of tokens")
        else:
            wanted = self._named(tokens, columns)
            if not wanted.any():
                return None
        wanted = wanted.to(hidden.device)
        real = self._real(columns, is_told=isinstance(tokens, Tensor))
        return wanted if real is None else wanted & real.to(hidden.device)

    def by_row(self, given: Tensor, n_rows: int, what: str) -> Tensor:
        """One entry for each of the model's rows, or one for all."""
        if len(given) == 1:
            return given
        if len(given) * self.copies != n_rows:
            raise ValueError(
                f"steering: {what}: {len(given)} rows, each for {self.copies} of the model's, which has {n_rows}"
            )
        return given.repeat_interleave(self.copies, dim=0)

    def _named(self, tokens: str, columns: slice) -> Bool[Tensor, "1 token"]:
        at = torch.arange(columns.start, columns.stop)[None]
        if tokens == "all":
            return torch.ones_like(at, dtype=torch.bool)
        if self.prompt_width is not None:
            first_new = self.prompt_width
        elif self.cached is None:
            raise ValueError(
                f"steering: tokens={tokens}: a pass without a cache doesn't show where the prompt ends; say prompt_width"
            )
        else:
            first_new = columns.start if self.cached else columns.stop
        return at >= first_new if tokens == "new" else at < first_new

    def _real(self, columns: slice, *, is_told: bool) -> Bool[Tensor, "row token"] | None:
        """Mask of the tokens that are no padding; None: all, or those that the user told, where only the user knows."""
        if self.mask is None or self.is_packed:
            return None
        if isinstance(self.mask, Tensor) and self.mask.ndim == 2:
            return _cut(self.mask, columns, "the attention mask").bool()
        if is_told or self.cached:  # only prompts are padded
            return None
        raise ValueError(
            "steering: padding can't be told from an attention mask that isn't [row, token]; give tokens as a mask"
        )


class _Writer:
    """One intervention as a hook."""

    def __init__(self, intervention: Intervention, current: _Pass, device: torch.device) -> None:
        self.current = current
        self.tokens = intervention.tokens
        self.operator = TABLE[intervention.operator]
        self.given = intervention.vectors
        self.vectors = None if self.given.requires_grad else self._prepare().to(device)
        strengths = intervention.strengths()
        self.strengths = strengths if strengths.requires_grad else strengths.to(device)

    def _prepare(self) -> Float[Tensor, "vector d_model"]:
        """The vectors as the operator wants them; anew in each pass where they learn, since each has a graph of its own."""
        exact = torch.float32 if self.given.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        return self.operator.prepare(self.given.to(exact))

    def __call__(self, hidden: Float[Tensor, "row token d_model"]) -> Tensor | None:
        """The hidden states to go on with; None: those that there are."""
        touched = self.current.reached(self.tokens, hidden)
        if touched is None:
            return None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        vectors = (self._prepare() if self.vectors is None else self.vectors).to(hidden.device, wide)
        strengths = self.current.by_row(self.strengths.to(hidden.device, wide), len(hidden), "coefficients")
        if strengths.shape[1] not in (1, hidden.shape[1]):
            raise ValueError(f"steering: coefficients of {strengths.shape[1]} tokens in a pass of {hidden.shape[1]}")
        if not self.operator.changes_at_zero:
            touched = touched & (strengths != 0).any(-1)
        with torch.autocast(hidden.device.type, enabled=False):
            steered = self.operator.apply(hidden.to(wide), vectors, strengths)
        return torch.where(touched[..., None], steered.to(hidden.dtype), hidden)


def _cut(table: Tensor, columns: slice, what: str) -> Tensor:
    if table.shape[1] < columns.stop:
        raise ValueError(f"steering: {what} has {table.shape[1]} tokens, the pass reaches token {columns.stop}")
    return table[:, columns]


def _as_tensor(coefficients: float | int | Tensor) -> Tensor:
    return coefficients if isinstance(coefficients, Tensor) else torch.tensor(coefficients, dtype=torch.float64)
