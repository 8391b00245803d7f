"""Read hooks: the wanted rows of hidden states at several sites, from one forward pass, without keeping the rest."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tiltmeter.errors import Unsupported
from tiltmeter.models.hooks import hook_site
from tiltmeter.models.layers import FINAL_POST_NORM, resolve_sites
from tiltmeter.pairs.batch import REJECTED, PreferenceBatch
from tiltmeter.pairs.log_probs import run_backbone
from tiltmeter.states.positions import Position, Readings, readings


class ReadPoint(NamedTuple):
    """Site and position of a captured reading."""

    site: str
    position: Position


class HiddenStates(NamedTuple):
    """Hidden states of one site and position, and what each row belongs to."""

    rows: Float[Tensor, "reading d_model"]
    pair_index: Int[Tensor, " reading"]
    """Row of the data set."""
    sides: Int[Tensor, " reading"]
    """PROMPT, CHOSEN or REJECTED of :mod:`tiltmeter.pairs.batch`."""


Reading = Mapping[ReadPoint, HiddenStates]
"""Hidden states of one model's forward passes at every site and position."""


@contextmanager
def capture(
    model: PreTrainedModel,
    sites: str | Sequence[str],
    wanted: Mapping[Position, Readings],
    *,
    dtype: torch.dtype | None = None,
) -> Iterator[dict[ReadPoint, Float[Tensor, "reading d_model"]]]:
    """Record readings at sites while one forward pass runs inside the ``with``; the dictionary fills as blocks finish.

    Rows are gathered inside the hook into new, detached memory, so a batch's hidden states are freed as without hooks.
    The forward pass may be the backbone, the whole model, with or without gradients; a recomputation of blocks in a
    backward pass (activation checkpointing) is not recorded. Hooks are gone when the ``with`` ends, however it ends.
    Compiled modules run uncompiled inside the ``with``, since a compiled one would not see its new hooks.

    Args:
        sites: ``"all"``, a site or several (:mod:`tiltmeter.models.layers`).
        wanted: what to read of the batch that the forward pass is given (:func:`tiltmeter.states.positions.readings`).
        dtype: of what is kept; None: that of the hidden states.

    Raises:
        UserError: an unknown site, or a model without recognisable blocks or final norm.
        ValueError: from inside the forward pass: it runs on another batch, or it is the second one.
    """
    names = resolve_sites(sites, model.config.num_hidden_layers)
    captured: dict[ReadPoint, Tensor] = {}

    def record(site: str, hidden: Tensor) -> None:
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass: blocks are being recomputed
            return
        for position, found in wanted.items():
            point = ReadPoint(site, position)
            if point in captured:
                raise Unsupported(
                    f"capture: a second forward pass at {site}, or a family that runs the module there twice; expected one pass in "
                    "each capture"
                )
            captured[point] = found.gather(hidden.detach(), dtype)

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for site in names:
            handle = hook_site(model, site, partial(record, site))
            stack.callback(handle.remove)
        yield captured


def read_hidden_states(
    model: PreTrainedModel,
    batch: PreferenceBatch,
    *,
    sites: str | Sequence[str],
    positions: Sequence[Position],
    content: Sequence[int | None] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[ReadPoint, HiddenStates]:
    """Hidden states of a batch at every site and position: one backbone pass without gradients, no unembedding.

    The model's training mode is left as it is; switch dropout off before.

    Args:
        sites: ``"all"``, a site or several.
        positions: see :mod:`tiltmeter.states.positions`.
        content: see :func:`tiltmeter.states.positions.readings`.
        dtype: of the result; None: that of the hidden states.

    Raises:
        UserError: as :func:`capture` and :func:`tiltmeter.states.positions.readings`.
    """
    wanted = {position: readings(batch, position, content=content) for position in positions}
    with torch.no_grad(), capture(model, sites, wanted, dtype=dtype) as captured:
        run_backbone(model, batch)
    return {
        point: HiddenStates(rows, wanted[point.position].pair_index, wanted[point.position].sides)
        for point, rows in captured.items()
    }


def join_hidden_states(parts: Iterable[Reading]) -> dict[ReadPoint, HiddenStates]:
    """Readings of several batches as one, ordered by pair, chosen before rejected, then by token.

    The result does not depend on how the pairs were cut into batches or ordered, so that rows of two models match.

    Raises:
        ValueError: no batch at all.
    """
    whole = list(parts)
    if not whole:
        raise ValueError("join_hidden_states: expected at least one batch, got none")
    joined = {}
    for point in whole[0]:
        rows, pair_index, sides = (torch.cat(x) for x in zip(*(part[point] for part in whole), strict=True))
        order = (pair_index * (REJECTED + 1) + sides).argsort(stable=True)
        joined[point] = HiddenStates(rows[order], pair_index[order], sides[order])
    return joined


@contextmanager
def capture_gradients(
    model: PreTrainedModel,
    receive: Callable[[Float[Tensor, "row token d_model"]], None],
    *,
    site: str = FINAL_POST_NORM,
) -> Iterator[None]:
    """Hand over the gradient of whatever is differentiated with respect to a site, as backward passes reach it.

    For use around training steps: no extra forward pass, and nothing is kept. ``receive`` gets the gradient of each
    backward pass, which is zero at tokens that no loss reads; it must not change or keep it. Forward passes without
    gradients (a reference model's, validation) are not seen. Compiled modules: put the hooks on before compiling.

    Args:
        receive: called once per forward and backward pass.
        site: where; the final sites lie outside of checkpointed blocks.

    Raises:
        UserError: as :func:`capture`.
    """
    (name,) = resolve_sites(site, model.config.num_hidden_layers)

    def watch(hidden: Tensor) -> None:
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: receive(gradient.detach()))

    handle = hook_site(model, name, watch)
    try:
        yield
    finally:
        handle.remove()
