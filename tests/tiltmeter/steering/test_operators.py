"""Each operator against what its name says, and against a second way to compute it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tiltmeter.errors import UserError
from tiltmeter.steering.operators import (
    OPERATORS,
    TABLE,
    add,
    add_keeping_norm,
    check_vectors,
    clamp,
    orthonormal_rows,
    project_out,
    rotate,
    subtract,
    unit_rows,
)

D = 7
seeds = st.integers(0, 2**31)
numbers = st.floats(-5, 5)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states_and_vectors(seed: int, n_vectors: int) -> tuple[Tensor, Tensor]:
    return noise(3, 4, D, seed=seed), noise(n_vectors, D, seed=seed + 1)


@given(seeds)
def test_adding_is_a_sum_over_vectors_with_the_coefficients_of_each_place(seed: int) -> None:
    hidden, vectors = states_and_vectors(seed, 2)
    strengths = noise(3, 4, 2, seed=seed + 2)
    moved = add(hidden, vectors, strengths)
    for row in range(3):
        for token in range(4):
            by_hand = hidden[row, token].clone()
            for k in range(2):
                by_hand += strengths[row, token, k] * vectors[k]
            assert_close(moved[row, token], by_hand)
    assert_close(subtract(moved, vectors, strengths), hidden)


@given(seeds, st.integers(1, 3))
def test_projecting_out_removes_the_span_and_once_is_enough(seed: int, n: int) -> None:
    hidden, vectors = states_and_vectors(seed, n)
    basis, one = orthonormal_rows(vectors), torch.ones(1, dtype=torch.float64)
    out = project_out(hidden, basis, one)
    assert_close(out @ vectors.T, torch.zeros(3, 4, n, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(project_out(out, basis, one), out, rtol=0, atol=1e-12)
    inside = hidden @ torch.linalg.pinv(vectors) @ vectors  # least squares: a second way to the projection
    assert_close(out, hidden - inside)


@given(seeds, numbers)
def test_a_share_of_the_projection_scales_the_component_and_a_negative_one_gives_more_of_it(
    seed: int, share: float
) -> None:
    hidden, vectors = states_and_vectors(seed, 1)
    q = orthonormal_rows(vectors)
    out = project_out(hidden, q, torch.tensor([share], dtype=torch.float64))
    assert_close(out @ q.T, (1 - share) * (hidden @ q.T))
    doubled = project_out(hidden, q, torch.tensor([-1.0], dtype=torch.float64))
    assert_close(doubled @ q.T, 2 * (hidden @ q.T))


def test_projecting_out_is_another_thing_than_subtracting() -> None:
    v, one = torch.tensor([[1.0, 0.0]]), torch.ones(1)
    along, across = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0])
    assert project_out(along, v, one).tolist() == [0.0, 1.0]
    assert subtract(along, v, one).tolist() == [2.0, 1.0]
    assert project_out(across, v, one).tolist() == [0.0, 1.0], "nothing there, nothing removed"
    assert subtract(across, v, one).tolist() == [-1.0, 1.0]


@given(seeds, st.integers(1, 3))
def test_clamping_sets_every_component_and_moves_no_further_than_needed(seed: int, n: int) -> None:
    hidden, vectors = states_and_vectors(seed, n)
    units, values = unit_rows(vectors), noise(3, 4, n, seed=seed + 3)
    out = clamp(hidden, units, values)
    assert_close(out @ units.T, values, rtol=1e-6, atol=1e-6)
    off_span = project_out(out - hidden, orthonormal_rows(vectors), torch.ones(1, dtype=torch.float64))
    assert_close(off_span, torch.zeros_like(hidden), rtol=0, atol=1e-6)


def test_clamping_one_direction_to_zero_is_projecting_it_out() -> None:
    hidden, vectors = states_and_vectors(5, 1)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert_close(clamp(hidden, unit_rows(vectors), zero), project_out(hidden, orthonormal_rows(vectors), one))


@given(seeds, numbers, numbers)
def test_rotations_keep_the_norm_and_their_angles_add(seed: int, a: float, b: float) -> None:
    hidden, vectors = states_and_vectors(seed, 2)
    plane = orthonormal_rows(vectors)

    def turned(x: Tensor, angle: float) -> Tensor:
        return rotate(x, plane, torch.tensor([angle], dtype=torch.float64))

    assert_close(turned(hidden, a).norm(dim=-1), hidden.norm(dim=-1))
    assert_close(turned(turned(hidden, a), b), turned(hidden, a + b), rtol=1e-9, atol=1e-9)
    assert_close(turned(hidden, 2 * math.pi), hidden, rtol=1e-9, atol=1e-9)


@given(seeds, numbers)
def test_a_rotation_is_the_exponential_of_its_generator(seed: int, angle: float) -> None:
    hidden, vectors = states_and_vectors(seed, 2)
    a, b = orthonormal_rows(vectors)
    turn = torch.linalg.matrix_exp(angle * (torch.outer(b, a) - torch.outer(a, b)))
    turned = rotate(hidden, torch.stack([a, b]), torch.tensor([angle], dtype=torch.float64))
    assert_close(turned, hidden @ turn.T, rtol=1e-8, atol=1e-8)


def test_a_rotation_goes_from_the_first_vector_towards_the_second() -> None:
    first, second = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])
    plane = orthonormal_rows(torch.stack([first, second]))
    assert_close(rotate(first, plane, torch.tensor([math.pi / 4])), second / math.sqrt(2))


@given(seeds)
def test_adding_while_keeping_the_norm_keeps_it_and_points_where_the_sum_does(seed: int) -> None:
    hidden, vectors = states_and_vectors(seed, 2)
    strengths = noise(3, 1, 2, seed=seed + 4)
    out, moved = add_keeping_norm(hidden, vectors, strengths), add(hidden, vectors, strengths)
    assert_close(out.norm(dim=-1), hidden.norm(dim=-1))
    assert_close(torch.cosine_similarity(out, moved, dim=-1), torch.ones(3, 4, dtype=torch.float64))


def test_a_sum_of_zero_has_no_direction_and_no_bad_gradient() -> None:
    hidden = torch.tensor([[2.0, 0.0], [3.0, 4.0]], requires_grad=True)
    out = add_keeping_norm(hidden, torch.tensor([[-1.0, 0.0]]), torch.tensor([2.0]))
    assert out[0].tolist() == [2.0, 0.0]
    out.sum().backward()
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all())


@given(seeds, st.integers(1, 4))
def test_orthonormal_rows_span_the_same_and_keep_their_sides(seed: int, n: int) -> None:
    vectors = noise(n, D, seed=seed)
    q = orthonormal_rows(vectors)
    assert_close(q @ q.T, torch.eye(n, dtype=torch.float64))
    assert_close(q[0], vectors[0] / vectors[0].norm())
    coordinates = vectors @ q.T
    assert_close(coordinates.triu(1), torch.zeros_like(coordinates), rtol=0, atol=1e-12)
    assert bool((coordinates.diagonal() > 0).all())
    assert_close(coordinates @ q, vectors)


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_operator_writes_in_place(operator: str) -> None:
    hidden, vectors = states_and_vectors(8, 2)
    kept, row = hidden.clone(), TABLE[operator]
    strengths = noise(3, 4, 1 if row.one_strength else 2, seed=9)
    out = row.apply(hidden, row.prepare(vectors), strengths)
    assert torch.equal(hidden, kept)
    assert not torch.equal(out, hidden)
    assert out.shape == hidden.shape


@pytest.mark.parametrize("operator", OPERATORS)
def test_at_strength_zero_all_but_clamping_leave_the_states(operator: str) -> None:
    hidden, vectors = states_and_vectors(8, 2)
    row = TABLE[operator]
    out = row.apply(hidden, row.prepare(vectors), torch.zeros(1 if row.one_strength else 2, dtype=torch.float64))
    assert torch.allclose(out, hidden) is not row.changes_at_zero


@pytest.mark.parametrize(
    ("operator", "vectors", "message"),
    [
        ("push", [[1.0, 0.0]], "operator: expected one of add, subtract, .* got 'push'"),
        ("add", [[math.nan, 0.0]], "expected finite vectors"),
        ("rotate", [[1.0, 0.0]], "the two vectors that span its plane, got 1"),
        ("rotate", [[1.0, 0.0], [-2.0, 0.0]], "rotate: expected vectors with independent directions"),
        ("project_out", [[0.0, 0.0]], "project_out: expected vectors with independent directions"),
        ("clamp", [[1.0, 1.0], [1e-9, 1e-9]], "clamp: expected vectors with independent directions"),
    ],
)
def test_vectors_without_meaning_are_refused(operator: str, vectors: list[list[float]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_vectors(operator, torch.tensor(vectors))


def test_small_vectors_are_vectors() -> None:
    check_vectors("project_out", torch.tensor([[1e-20, 0.0], [0.0, 1e-3]]))
    check_vectors("add", torch.zeros(1, 2))
