from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.figures.training import training_section, training_table
from analysis.open.runs import open_run
from analysis.report.style import save_figure, spread
from tests.analysis.conftest import dpo_rows, sft_rows
from tiltmeter.errors import UserError

Heights = st.lists(st.floats(0, 1), min_size=1, max_size=6)


def test_titles_carry_the_numbers_of_the_run(make_run: Callable[..., Path]) -> None:
    assert training_section(training_table(open_run(make_run()))).sentences == [
        "Held-out loss falls from ln 2 = 0.693 to 0.420 in 10 steps",
        "Held-out accuracy is 0.900 after 10 steps",
        "Held-out reward margin is 1.80: chosen −1.80, rejected −3.60",
    ]


def test_an_accuracy_that_fell_again_is_said(make_run: Callable[..., Path]) -> None:
    rows = dpo_rows()
    rows[5]["val/rewards/accuracies"] = 0.95
    sentence = training_section(training_table(open_run(make_run(rows=rows)))).sentences[1]
    assert sentence == "Held-out accuracy peaks at 0.950 (5 steps) and ends at 0.900"


def test_validation_counts_the_update_before_it_and_training_does_not(make_run: Callable[..., Path]) -> None:
    table, window, *_ = training_table(open_run(make_run()))
    train, val = table[table["split"] == "train"], table[table["split"] == "val"]
    assert train["steps_taken"].tolist() == list(range(10))
    assert val["steps_taken"].tolist() == [5, 10]
    assert window == 5
    assert train["loss_smoothed"].iloc[4] == pytest.approx(train["loss"].iloc[2:7].mean())
    assert train["accuracy"].isna().tolist() == [True] + [False] * 9


@pytest.mark.parametrize("data", [{}, {"label_noise": 0.1}])
def test_the_ceiling_that_planted_label_noise_sets_is_said(
    make_run: Callable[..., Path], data: dict[str, float]
) -> None:
    world = {"_target_": "datamodules.synthetic.SyntheticWorld"}
    noted = training_section(training_table(open_run(make_run("a", config={"data": world | data})))).headlines[0].source
    assert "10% of the training labels are swapped at random, so about 0.90 is the most" in noted
    assert "held-out pairs are scored against their clean labels" in noted
    real = training_section(training_table(open_run(make_run("b", config={"data": {"_target_": "datamodules.hh.HH"}}))))
    assert "swapped" not in real.headlines[0].source


def test_sft_has_a_loss_and_nothing_else(make_run: Callable[..., Path]) -> None:
    section = training_section(training_table(open_run(make_run(rows=sft_rows()))))
    assert section.sentences == ["Held-out loss falls from 2.200 at 5 to 2.000 at 10 steps"]
    assert len(section.figure.axes) == 1
    assert section.figure.axes[0].get_ylabel() == "loss (nats per token)"
    assert [headline.name for headline in section.headlines] == ["held-out loss"]


def test_a_run_without_validation_speaks_of_training(make_run: Callable[..., Path]) -> None:
    rows = [row for row in dpo_rows() if "train/loss" in row]
    sentences = training_section(training_table(open_run(make_run(rows=rows)))).sentences
    assert all(sentence.startswith("Training ") for sentence in sentences)


def test_losses_that_do_not_start_at_ln_2_are_not_compared_with_it(make_run: Callable[..., Path]) -> None:
    section = training_section(training_table(open_run(make_run(config={"module": {"loss": "ipo"}}))))
    assert "ln 2" not in section.sentences[0]
    assert section.figure.axes[0].get_ylabel() == "loss (ipo)"


def test_numbers_that_are_not_finite_are_counted(make_run: Callable[..., Path]) -> None:
    rows = dpo_rows()
    rows[3]["train/loss"] = float("nan")
    rows[4]["train/loss"] = float("inf")
    reading = training_section(training_table(open_run(make_run(rows=rows)))).reading
    assert "2 measurements of the loss are not finite and are not drawn." in reading


def test_a_run_without_any_loss_is_refused(make_run: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"metrics\.csv: no column train/loss with numbers"):
        training_section(training_table(open_run(make_run(rows=[{"step": 0, "epoch": 0, "other": 1.0}]))))


def test_figures_are_saved_whole_as_png_and_pdf(make_run: Callable[..., Path], tmp_path: Path) -> None:
    figure = training_section(training_table(open_run(make_run()))).figure
    paths = save_figure(figure, tmp_path / "figures", "training")
    assert [path.read_bytes()[:4] for path in paths] == [b"\x89PNG", b"%PDF"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["training.pdf", "training.png"]
    assert figure.get_size_inches()[0] * 2.54 == pytest.approx(8.0)


@given(Heights)
def test_labels_keep_their_order_and_distance(heights: list[float]) -> None:
    placed = spread(heights, gap=0.1)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    for below, above in pairwise(order):
        assert placed[above] - placed[below] >= 0.1 - 1e-6
    assert all(-1e-9 <= y <= 1 + 1e-9 for y in placed)
