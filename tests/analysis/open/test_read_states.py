"""Hidden states of two models read now: the same rows and figures as anybody would compute, in bounded memory."""

import gc
from dataclasses import replace

import pytest
import torch

from analysis.figures.fig1a_projection import parting
from analysis.open.checkpoints import Checkpoints
from analysis.open.observed import Observed
from analysis.open.read_states import AFTER, StateReading
from analysis.registry import BY_NAME
from tests.analysis import asked
from tests.analysis.asked import READ_NOW
from tiltmeter.errors import UserError
from tiltmeter.models.layers import unembedding
from tiltmeter.states.capture import ReadPoint

N_PAIRS = 10


@pytest.fixture(scope="module")
def models() -> Checkpoints:
    return asked.checkpoints(N_PAIRS)


@pytest.fixture(scope="module")
def now(models: Checkpoints) -> Observed:
    return StateReading(pairs_per_batch=3).read(models)


def test_rows_are_what_each_model_computes_pair_by_pair(models: Checkpoints, now: Observed) -> None:
    rows = now.at()
    assert rows is not None
    assert rows.pair_ids == [pair.pair_id for pair in models.pairs]
    assert rows.clusters == [pair.group for pair in models.pairs]
    for opened, found in ((models.base, rows.base), (models.aligned, rows.policy)):
        for i, pair in enumerate(models.pairs):
            with torch.no_grad():
                states = opened.model(torch.tensor([list(pair.ids.prompt_ids)]), output_hidden_states=True)
            for site, depth in (("layer_00", 1), ("final_post_norm", -1)):
                row = found[ReadPoint(site, "prompt_last")].rows[i]
                torch.testing.assert_close(row, states.hidden_states[depth][0, -1], rtol=1e-4, atol=1e-5)


def test_v_is_the_difference_of_the_tokens_that_the_row_predicts(models: Checkpoints, now: Observed) -> None:
    found = parting(now)
    assert found is not None
    rows, vectors, _ = found
    weight = unembedding(models.base.model).weight
    by_id = {pair.pair_id: pair.ids for pair in models.pairs}
    for name, v in zip(rows.ids_of(rows.points[0]), vectors, strict=True):
        chosen, rejected = by_id[name].chosen_ids, by_id[name].rejected_ids
        at = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        torch.testing.assert_close(v, weight[chosen[at]] - weight[rejected[at]])


def test_one_reading_draws_every_figure_that_needs_no_course(now: Observed) -> None:
    sections = {name: BY_NAME[name].answer(now) for name in READ_NOW}
    assert [name for name, section in sections.items() if section is None] == []
    geometry = sections["geometry"]
    assert geometry is not None
    assert geometry.table["steps_taken"].isna().all()
    assert any("in the aligned model" in line for line in geometry.reading)
    rows = now.at()
    assert rows is not None
    assert rows.name == AFTER
    update = rows.update(rows.points[-1])
    share = len(update) * update.mean(0).square().sum() / update.square().sum()
    last = geometry.table.set_index("site").loc["final_post_norm"]
    assert last["shift_share"] == pytest.approx(float(share))


def test_steps_are_told_where_they_are_known(models: Checkpoints) -> None:
    section = BY_NAME["geometry"].answer(StateReading().read(models, n_steps=7))
    assert section is not None
    assert any("after 7 steps" in line for line in section.reading)


def test_two_equal_models_have_nothing_to_show(models: Checkpoints) -> None:
    now = StateReading().read(replace(models, aligned=models.base))
    assert [BY_NAME[name].answer(now) for name in READ_NOW] == [None] * len(READ_NOW)


def test_a_pair_without_finite_states_is_left_out_and_counted() -> None:
    models = asked.checkpoints(N_PAIRS)
    seen: dict[int, set[str]] = {}
    for pair in models.pairs:
        for token in pair.ids.prompt_ids:
            seen.setdefault(token, set()).add(pair.pair_id)
    token, (bad,) = next((token, ids) for token, ids in seen.items() if len(ids) == 1)
    embedding = models.aligned.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[token] = torch.nan  # type: ignore[index,operator]
    rows = StateReading().read(models).at()
    assert rows is not None
    assert bad not in (rows.pair_ids or ())
    assert rows.n_rows == N_PAIRS - 1
    assert rows.n_left_out == 1
    with torch.no_grad():
        embedding.fill_(torch.nan)  # type: ignore[operator]
    with pytest.raises(UserError, match=r"hidden_states: expected finite states of at least 4 pairs, got 0 of 10"):
        StateReading().read(models)


def most_bytes_while_reading(models: Checkpoints) -> int:
    """Of tensors made and alive while models run, of which the base's rows are part in the end; eight pairs are kept."""
    most = 0
    gc.collect()
    gc.freeze()  # what is there before is neither looked through nor counted

    def count(*_: object) -> None:
        nonlocal most
        gc.collect()
        alive = {x.data_ptr(): x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor}
        most = max(most, sum(alive.values()))

    handle = models.aligned.model.get_input_embeddings().register_forward_hook(count)
    rows = StateReading(n_pairs=8, pairs_per_batch=4).read(models).at()
    handle.remove()
    gc.unfreeze()
    assert rows is not None
    assert rows.n_rows == 8
    return most


def test_memory_does_not_grow_with_the_number_of_pairs() -> None:
    few, many = (most_bytes_while_reading(asked.checkpoints(n)) for n in (8, 24))
    assert few == many > 0


def test_costs_are_one_pass_a_model_of_what_is_read(models: Checkpoints) -> None:
    cost, random = StateReading(n_pairs=4, n_random_updates=5).costs(models)
    assert random.forwards == 1 + 2 * 5, "the base, and both forms"
    whole = sum(len(pair.ids.prompt_ids) for pair in models.pairs[:4])
    assert cost.forwards == 2
    assert 2 * whole < cost.tokens <= 2 * sum(len(part) for pair in models.pairs[:4] for part in pair.ids)


@pytest.mark.parametrize("options", [{"n_pairs": 3}, {"pairs_per_batch": 0}, {"dtype": "int4"}])
def test_wrong_options(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="hidden_states"):
        StateReading(**options)  # type: ignore[arg-type]
