"""Operators on hidden states along vectors: pure functions that return new tensors.

All take hidden states [*place d_model], vectors [vector d_model] and strengths [*place vector] or [*place 1], where a
place (row, token) of the strengths may be 1 to serve all. They are different interventions: adding moves every state by
the same amount, wherever it is; projecting out removes what *that* state has along a direction, which may be nothing,
and with a negative strength gives more of it instead of removing more.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from tiltmeter.errors import UserError

Operator = Literal["add", "subtract", "project_out", "clamp", "rotate", "add_keeping_norm"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)


def add(
    hidden: Float[Tensor, "*place d_model"],
    vectors: Float[Tensor, "vector d_model"],
    strengths: Float[Tensor, "*#place vector"],
) -> Float[Tensor, "*place d_model"]:
    """h + Σ_k s_k v_k: interpolation ĥ(λ) = h_0 + λ v.

    >>> add(torch.tensor([1.0, 1.0]), torch.tensor([[0.0, 2.0]]), torch.tensor([3.0])).tolist()
    [1.0, 7.0]
    """
    return hidden + strengths @ vectors


def subtract(
    hidden: Float[Tensor, "*place d_model"],
    vectors: Float[Tensor, "vector d_model"],
    strengths: Float[Tensor, "*#place vector"],
) -> Float[Tensor, "*place d_model"]:
    """h − Σ_k s_k v_k: inversion h̃(λ) = h_π − λ v*.

    >>> subtract(torch.tensor([1.0, 1.0]), torch.tensor([[0.0, 2.0]]), torch.tensor([3.0])).tolist()
    [1.0, -5.0]
    """
    return hidden - strengths @ vectors


def project_out(
    hidden: Float[Tensor, "*place d_model"],
    basis: Float[Tensor, "vector d_model"],
    strength: Float[Tensor, "*#place 1"],
) -> Float[Tensor, "*place d_model"]:
    """h − α (h Qᵀ) Q with Q orthonormal rows: α = 1 removes the component in their span, α < 0 makes it 1 − α times as large.

    >>> project_out(torch.tensor([3.0, 4.0]), torch.tensor([[0.0, 1.0]]), torch.tensor([0.5])).tolist()
    [3.0, 2.0]
    """
    return hidden - strength * (hidden @ basis.T @ basis)


def clamp(
    hidden: Float[Tensor, "*place d_model"],
    units: Float[Tensor, "vector d_model"],
    values: Float[Tensor, "*#place vector"],
) -> Float[Tensor, "*place d_model"]:
    """The h' nearest to h with ⟨h', q_k⟩ = s_k for every unit vector: h + (s − h Qᵀ)(Q Qᵀ)⁻¹ Q, in activation units.

    >>> clamp(torch.tensor([3.0, 4.0]), torch.tensor([[0.0, 1.0]]), torch.tensor([-1.0])).tolist()
    [3.0, -1.0]
    """
    dual = torch.linalg.solve(units @ units.T, units)
    return hidden + (values - hidden @ units.T) @ dual


def rotate(
    hidden: Float[Tensor, "*place d_model"],
    plane: Float[Tensor, "2 d_model"],
    radians: Float[Tensor, "*#place 1"],
) -> Float[Tensor, "*place d_model"]:
    """Turn the part of h in the plane of two orthonormal vectors by an angle, from the first towards the second.

    With x = ⟨h, a⟩ and y = ⟨h, b⟩: h + ((cos θ − 1) x − sin θ y) a + (sin θ x + (cos θ − 1) y) b. Keeps the norm; angles add.

    >>> rotate(torch.tensor([2.0, 0.0]), torch.eye(2), torch.tensor([torch.pi / 2])).round(decimals=4).tolist()
    [0.0, 2.0]
    """
    x, y = (hidden @ plane.T).split(1, dim=-1)
    less, sine = radians.cos() - 1, radians.sin()
    return hidden + torch.cat([less * x - sine * y, sine * x + less * y], dim=-1) @ plane


def add_keeping_norm(
    hidden: Float[Tensor, "*place d_model"],
    vectors: Float[Tensor, "vector d_model"],
    strengths: Float[Tensor, "*#place vector"],
) -> Float[Tensor, "*place d_model"]:
    """(h + Σ_k s_k v_k) scaled to ‖h‖; where the sum is zero, and so has no direction, h stays.

    >>> add_keeping_norm(torch.tensor([5.0, 0.0]), torch.tensor([[-2.0, 4.0]]), torch.tensor([1.0])).round(decimals=4).tolist()
    [3.0, 4.0]
    """
    moved = add(hidden, vectors, strengths)
    norm = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
    has_direction = norm > 0
    scale = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True) / torch.where(has_direction, norm, 1.0)
    return torch.where(has_direction, moved * scale, hidden)


def unit_rows(vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "vector d_model"]:
    """Each vector divided by its norm."""
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)


def orthonormal_rows(vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "vector d_model"]:
    """Orthonormal vectors of the same span; the first keeps its direction, each later one its side (Gram–Schmidt).

    >>> (orthonormal_rows(torch.tensor([[2.0, 0.0], [5.0, -3.0]])) + 0.0).tolist()
    [[1.0, 0.0], [0.0, -1.0]]
    """
    q, r = torch.linalg.qr(vectors.T)
    return torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)[:, None] * q.T


class Prepared(NamedTuple):
    """An operator as the hook uses it."""

    apply: Callable[[Tensor, Tensor, Tensor], Tensor]
    prepare: Callable[[Tensor], Tensor]
    """From the vectors to what ``apply`` wants, once."""
    one_strength: bool
    """One strength for all vectors together instead of one each."""
    changes_at_zero: bool
    """Whether strength 0 changes anything."""


def _as_they_are(vectors: Tensor) -> Tensor:
    return vectors


SIGNED: tuple[Operator, ...] = ("add", "subtract", "rotate", "add_keeping_norm")
"""Operators that a strength of the other sign undoes."""
SCALED: tuple[Operator, ...] = ("add", "subtract", "add_keeping_norm")
"""Operators that a longer vector does more by."""

TABLE: dict[Operator, Prepared] = {
    "add": Prepared(add, _as_they_are, False, False),
    "subtract": Prepared(subtract, _as_they_are, False, False),
    "project_out": Prepared(project_out, orthonormal_rows, True, False),
    "clamp": Prepared(clamp, unit_rows, False, True),
    "rotate": Prepared(rotate, orthonormal_rows, True, False),
    "add_keeping_norm": Prepared(add_keeping_norm, _as_they_are, False, False),
}


def vectors_of(
    operator: Operator, v: Float[Tensor, " d_model"], mean: Float[Tensor, " d_model"] | None
) -> Float[Tensor, "vector d_model"]:
    """The vectors that an operator takes for one steering vector: itself; of ``rotate`` the plane of the mean state and itself."""
    return torch.stack([mean.to(v), v]) if operator == "rotate" and mean is not None else v[None]


def check_vectors(operator: str, vectors: Float[Tensor, "vector d_model"]) -> None:
    """Check that an operator exists and that vectors are such that it has a meaning.

    Raises:
        UserError: an unknown operator, vectors that are not finite, a plane not of two vectors, or vectors without
            a direction or independent directions where the operator needs them.
    """
    if operator not in OPERATORS:
        raise UserError(f"steering: operator: expected one of {', '.join(OPERATORS)}, got {operator!r}")
    if not bool(vectors.isfinite().all()):
        raise UserError("steering: expected finite vectors, got NaN or infinity")
    if operator == "rotate" and len(vectors) != 2:
        raise UserError(f"steering: rotate: expected the two vectors that span its plane, got {len(vectors)}")
    needs_directions = operator in ("project_out", "clamp", "rotate")
    if needs_directions and int(torch.linalg.matrix_rank(normalize(vectors.detach().double()))) < len(vectors):
        raise UserError(
            f"steering: {operator}: expected vectors with independent directions, got {len(vectors)} of which one is zero or "
            "a combination of the others; leave it out"
        )
