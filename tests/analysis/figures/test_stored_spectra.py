import math

import pandas as pd
import pytest
import torch

from analysis.figures.fig4a_entropy import (
    largest_change,
    long_spectra,
    spectra,
    spectra_of,
    wide_spectra,
)
from analysis.figures.fig4b_singular_values import signal_rank_tables
from analysis.open.observed import Observed, Tables
from analysis.registry import BY_NAME
from tests.analysis import planted_geometry as planted
from tests.analysis.planted_geometry import noise, of_pair, one_site
from tiltmeter.geometry.rows import VARIANTS
from tiltmeter.states.capture import ReadPoint
from tiltmeter.states.state_pair import StatePair


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    return planted.planted_run(tmp_path_factory.mktemp("run"))


def made(seen: Observed) -> pd.DataFrame:
    found = seen.once(spectra)
    assert found is not None
    return found


def rank_tables(rows: StatePair) -> Tables:
    found = signal_rank_tables(of_pair(rows))
    assert found is not None
    return found


def test_spectra_are_those_of_the_stored_rows_under_every_control(seen: Observed) -> None:
    assert seen.states is not None
    table = made(seen)
    assert len(table) == len(seen.states.points) * 3 * len(VARIANTS)
    where = (table["site"] == "layer_01") & (table["matrix"] == "policy") & (table["variant"] == "unit_row")
    (row,) = table[where].to_dict("records")
    sigma = torch.linalg.svdvals(
        torch.nn.functional.normalize(seen.states.policy[ReadPoint("layer_01", "prompt_last")].rows.double(), dim=1)
    )
    assert [row[f"sigma_{k + 1}"] for k in range(5)] == pytest.approx(sigma[:5].tolist(), rel=1e-6)
    assert row["sigma_ratio"] == pytest.approx(float(sigma[1] / sigma[0]), rel=1e-6)
    q = sigma.square() / sigma.square().sum()
    assert row["entropy_energy"] == pytest.approx(float(-(q * q.log()).sum()), rel=1e-6)
    assert (row["n"], row["d_model"]) == (planted.N_PAIRS, planted.WIDTH)
    assert (table["top1_energy"] >= table["shift_share"] - 1e-12).all()


def test_the_file_has_a_row_for_every_figure_with_n_beside(seen: Observed) -> None:
    long = long_spectra(made(seen))
    assert list(long) == ["site", "position", "matrix", "variant", "metric", "value", "n", "d_model", "snapshot"]
    key = ["site", "matrix", "variant", "metric"]
    assert not long.duplicated(key).any()
    combinations = long.groupby("metric").size()
    assert set(combinations) == {4 * 3 * len(VARIANTS)}
    listed = {f"sigma_{k}" for k in range(1, 6)} | {"sigma_ratio", "cos_top_mean", "shift_share", "top1_energy"}
    assert listed | {"entropy_energy", "entropy_singular", "tracy_widom_edge", "signal_rank"} <= set(combinations.index)
    pd.testing.assert_frame_equal(wide_spectra(long), made(seen), check_names=False)
    row = long.set_index(key)["value"]
    wide = made(seen).set_index(key[:3])
    for metric in ("entropy_singular", "signal_rank"):
        at = ("final_post_norm", "base", "centred")
        assert row[(*at, metric)] == wide.loc[at, metric]


def test_figures_tell_what_the_table_has(seen: Observed) -> None:
    entropy, first = (BY_NAME[name].answer(seen) for name in ("entropy_controls", "singular_values"))
    assert entropy is not None
    assert first is not None
    values = spectra_of(made(seen), "update", "raw")["entropy_energy"]
    cap = math.log(min(planted.N_PAIRS, planted.WIDTH))
    assert entropy.sentences[0].startswith(f"ΔH’s entropy is {values.min():.2f}")
    assert f"of at most {cap:.2f} nats (N = {planted.N_PAIRS})" in entropy.sentences[0]
    assert len(first.figure.axes[0].lines) == 4 * 2 + 1, "σ₂ … σ₅, each with its final norm, and the paper's level"
    assert set(entropy.table["matrix"]) == {"update", "base", "policy"}


def test_the_largest_change_of_the_states_is_found_under_any_control() -> None:
    at = [("layer_00", "raw", 1.0, 1.1), ("layer_01", "unit_row", 2.0, 1.5), ("layer_01", "centred", 3.0, math.nan)]
    rows = [
        {"site": site, "matrix": matrix, "variant": variant, "x": value}
        for site, variant, base, policy in at
        for matrix, value in (("base", base), ("policy", policy))
    ]
    assert largest_change(pd.DataFrame(rows), "x", "+.2f", unit="nats") == "−0.50 nats (unit rows, layer 1)"
    assert largest_change(pd.DataFrame(rows[4:]), "x", "+.2f") == "not known"


def test_noise_with_a_shift_is_of_rank_one_raw_and_of_no_rank_centred() -> None:
    base = noise(100, 60)
    rows = one_site(base, base + 0.1 * noise(100, 60, 1) + 1)
    tables = rank_tables(rows)
    assert float(tables["signal_rank"]["raw"][1]) < 0.1
    here = tables["signal_rank_about"].iloc[0]
    assert here["n_above_null"] <= 1
    assert (here["signal_rank_update"], here["signal_rank_white"]) == (0, 0)
    update = spectra(rows)[lambda t: t["matrix"] == "update"].set_index("variant")
    assert (update.loc["centred", ["signal_rank", "signal_rank_white"]] == 0).all()
    assert math.isnan(update.loc["raw", "signal_rank"])
    assert update.loc["centred", "sigma_ratio"] > 0.9
    assert update.loc["raw", "cos_top_mean"] > 0.999
    assert math.isnan(update.loc["centred", "cos_top_mean"])


def test_two_more_directions_are_found_above_both_nulls() -> None:
    base, spikes = noise(120, 60), 4 * noise(120, 2, 3) @ torch.linalg.qr(noise(60, 2, 4)).Q.T
    here = rank_tables(one_site(base, base + noise(120, 60, 1) + spikes + 3))["signal_rank_about"].iloc[0]
    assert here["n_above_null"] == 2
    assert (here["signal_rank_update"], here["signal_rank_white"]) == (2, 2)
