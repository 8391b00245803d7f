"""Random weight changes: as large as training's, the same in any process, gone afterwards; and what they do to the figures."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny_models import make_model, random_pairs
from tiltmeter.errors import UserError
from tiltmeter.states.probe_set import Probe
from tiltmeter.weights.random_update import (
    FILE,
    FORMS,
    Form,
    RandomUpdates,
    check_draws,
    random_change,
    random_update,
    read_random_updates,
)

FROZEN = ("embed_tokens", "lm_head")


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def base() -> PreTrainedModel:
    return make_model("llama", torch.float64)


@pytest.fixture
def policy(base: PreTrainedModel) -> dict[str, Tensor]:
    """As trained with frozen embeddings: every other parameter moved, each by another amount."""
    generator = torch.Generator().manual_seed(1)
    state = dict(base.state_dict())
    for i, (name, x) in enumerate(state.items()):
        step = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        state[name] = x.clone() if any(word in name for word in FROZEN) else x + 1e-3 * (i + 1) * step
    return state


@pytest.mark.parametrize("form", FORMS)
def test_every_matrix_changes_by_the_norm_of_its_update_and_frozen_ones_not_at_all(
    base: PreTrainedModel, policy: dict[str, Tensor], form: Form
) -> None:
    before = weights(base)
    with random_update(base, policy, draw=0, form=form):
        inside = weights(base)
    for name, own in before.items():
        change, update = inside[name] - own, policy[name] - own
        assert float(change.norm()) == pytest.approx(float(update.norm()), rel=1e-6), name
        assert bool(change.any()) is not any(word in name for word in FROZEN)
        if change.any():
            assert abs(float((change * update).sum() / update.norm() ** 2)) < 0.7, "another direction"


def test_rotated_changes_keep_the_singular_values_and_gaussian_ones_do_not(
    base: PreTrainedModel, policy: dict[str, Tensor]
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    own = dict(base.named_parameters())[name].detach()
    low_rank = torch.outer(torch.arange(1.0, 65), torch.ones(32)).double() + torch.eye(64, 32).double()
    for update in (policy[name] - own, low_rank):
        kept = random_change(update, name=name, draw=0, form="rotated")
        torch.testing.assert_close(torch.linalg.svdvals(kept), torch.linalg.svdvals(update), rtol=1e-9, atol=1e-9)
    spread = torch.linalg.svdvals(random_change(low_rank, name=name, draw=0))
    assert spread[0] < 0.5 * torch.linalg.svdvals(low_rank)[0]


def test_the_entries_of_a_gaussian_change_are_independent_normal_numbers() -> None:
    change = random_change(torch.eye(200), name="w", draw=0) / (200**0.5) * 200
    assert float(change.mean()) == pytest.approx(0, abs=0.02)
    assert float((change**4).mean()) == pytest.approx(3, abs=0.15)


def test_a_draw_depends_on_seed_number_form_and_name_alone_in_any_process() -> None:
    ones = torch.ones(3, 40)
    drawn = random_change(ones, name="a.weight", draw=2, seed=3, form="rotated")
    of_another_process = [-0.712718423598543, 0.5166144710753396, -0.20943006638374148]  # written down
    assert drawn[0, :3].tolist() == pytest.approx(of_another_process, rel=1e-6)
    others = [
        random_change(ones, name="b.weight", draw=2, seed=3, form="rotated"),
        random_change(ones, name="a.weight", draw=1, seed=3, form="rotated"),
        random_change(ones, name="a.weight", draw=2, seed=4, form="rotated"),
        random_change(ones, name="a.weight", draw=2, seed=3),
    ]
    assert not any(torch.allclose(drawn, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_comes_back_bit_for_bit_also_after_an_exception(dtype: torch.dtype) -> None:
    model, state = make_model("gpt2", dtype), make_model("gpt2", dtype, seed=1).state_dict()
    before, places = weights(model), {name: x.data_ptr() for name, x in model.named_parameters()}

    def break_inside() -> None:
        with random_update(model, state, draw=0):
            assert any(not torch.equal(x, before[name]) for name, x in model.named_parameters())
            raise KeyError

    with pytest.raises(KeyError):
        break_inside()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.data_ptr() == places[name]
        assert parameter.requires_grad


def test_another_models_weights_and_ones_that_are_not_finite_are_refused_and_leave_the_base(
    base: PreTrainedModel, policy: dict[str, Tensor]
) -> None:
    before, last = weights(base), "model.norm.weight"
    for state, message in (
        ({name: x for name, x in policy.items() if name != last}, f"the policy has no {last}"),
        (policy | {last: policy[last] * torch.nan}, f"the update of {last} is not finite"),
    ):
        with pytest.raises(ValueError, match=message), random_update(base, state, draw=0):
            pass
        assert all(torch.equal(x, before[name]) for name, x in base.named_parameters())


def test_figures_are_those_of_states_read_under_each_draw_and_come_back_from_their_file(
    base: PreTrainedModel, policy: dict[str, Tensor], tmp_path: Path
) -> None:
    pairs = random_pairs(10)
    probe = Probe.of_pairs(pairs, sites=["layer_00", "final_post_norm"], positions=("prompt_last", "content"))
    found = read_random_updates(base, policy, pairs, probe, n_draws=2, seed=4, steps_taken=9)
    assert {(d.form, d.draw, d.position, d.site) for d in found.draws} == {
        (form, draw, position, site)
        for form in FORMS
        for draw in range(2)
        for position in ("prompt_last", "content")
        for site in ("layer_00", "final_post_norm")
    }
    shares = []
    own = probe.read(base)
    for draw in range(2):
        with random_update(base, policy, draw=draw, seed=4):
            changed = probe.read(base)
        for point, states in changed.items():
            update = states.rows.double() - own[point].rows.double()
            share = float(len(update) * update.mean(0).square().sum() / update.square().sum())
            (figures,) = [d.figures for d in found.draws if d[:4] == ("gaussian", draw, point.position, point.site)]
            assert figures["shift_share/random_update"] == pytest.approx(share, rel=1e-9)
            cosines = torch.cosine_similarity(update, len(update) * update.mean(0) - update)
            assert figures["mean_cosine/leave_one_out/random_update"] == pytest.approx(float(cosines.mean()), rel=1e-9)
            shares += [share] if point == ("layer_00", "content") else []
    assert found.means()["shift_share/random_update/content/layer_00"] == pytest.approx(sum(shares) / 2)
    found.write(tmp_path)
    assert RandomUpdates.read(tmp_path) == found
    assert RandomUpdates.read(tmp_path / "nowhere") is None
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(UserError, match=rf"{FILE}: damaged .*delete it"):
        RandomUpdates.read(tmp_path)


def test_wrong_options_are_one_line() -> None:
    with pytest.raises(UserError, match="n_draws: expected at least 2"):
        check_draws(1, FORMS)
    with pytest.raises(UserError, match="forms: expected gaussian, rotated, got kind"):
        check_draws(5, ["kind"])
