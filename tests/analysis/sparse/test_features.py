"""Sparse features of a steered model: ablations against the model itself, classes, random sets, and DPO's update in features."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.open.checkpoints import Checkpoints
from analysis.open.models import LoadedModel
from analysis.open.pair_log_probs import losses_of, sums_of_pairs, tokens_of_pairs
from analysis.sparse.ablation import sums_under
from analysis.sparse.bridge import Change, explained_by_features, moved_by
from analysis.sparse.classes import (
    ALIGNMENT,
    OTHER,
    STYLE,
    classes_of_attributes,
    classes_of_file,
    classes_of_judge,
    has_planted,
)
from analysis.sparse.features import SparseFeatures, _Asked
from analysis.sparse.section import sparse_features_section
from datamodules.synthetic_phrases import ATTRIBUTES
from tests.analysis import asked
from tests.tiltmeter.sparse.dictionaries import noise
from tiltmeter.errors import Unsupported, UserError
from tiltmeter.judges.judge import Question, Reply
from tiltmeter.pairs.preference_losses import make_preference_loss
from tiltmeter.sparse.autoencoder import JumpReLU, SaeId
from tiltmeter.sparse.files import write_sae
from tiltmeter.sparse.steering import SparseOptions, SparseSteering, insert_steering, sparse_steering

WIDTH = 24
SIMPO = make_preference_loss("simpo")


def random_sae(d_model: int, site: str) -> JumpReLU:
    sae = JumpReLU(SaeId(site), d_model, WIDTH)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sae.named_parameters()):
            values = noise(*parameter.shape, seed=i) / 2
            parameter.copy_(values.abs() if name == "threshold" else values)
    return sae


def steered(opened: LoadedModel, *, site: str = "layer_00", size: float = 0.3) -> LoadedModel:
    """A model with a steering that changes much."""
    sae = random_sae(opened.model.config.hidden_size, site)
    steering = insert_steering(opened.model, sae, SparseOptions("none"))
    with torch.no_grad():
        steering.weight.copy_(size * noise(*steering.weight.shape, seed=7))
        steering.bias.copy_(noise(WIDTH, seed=8))
        steering.threshold.copy_(noise(WIDTH, seed=9).abs())
    return opened


def planted(n: int) -> list[Any]:
    """Pairs with levels of every attribute, balanced and at random."""
    levels = np.random.default_rng(0).choice([-1, 1], (n, 2, len(ATTRIBUTES)))
    return [
        replace(
            pair,
            attributes={
                f"{side}/{name}": int(levels[i, j, k])
                for j, side in enumerate(("chosen", "rejected"))
                for k, name in enumerate(ATTRIBUTES)
            },
        )
        for i, pair in enumerate(asked.probe_pairs(n))
    ]  # fmt: skip


def checkpoints(n: int = 12, *, site: str = "layer_00") -> Checkpoints:
    return Checkpoints(asked.opened(0), steered(asked.opened(0), site=site), planted(n), loss=SIMPO)


def steering_of(of: Checkpoints) -> SparseSteering:
    found = sparse_steering(of.aligned.model)
    assert found is not None
    return found


@pytest.mark.parametrize("site", ["layer_00", "layer_01", "final_pre_norm", "final_post_norm"])
def test_log_probs_under_sets_are_those_of_the_model_whose_features_are_ablated(site: str) -> None:
    of = checkpoints(5, site=site)
    steering, ids = steering_of(of), [pair.ids for pair in of.pairs]
    left = noise(40, WIDTH, seed=3) > 0
    left[0], left[1] = True, False
    found = sums_under(of.base, steering, ids, list(left))
    for k in (0, 1, 2, 35):
        steering.ablated = ~left[k]
        expected = sums_of_pairs(tokens_of_pairs(of.aligned, ids))
        torch.testing.assert_close(found[k], expected, rtol=1e-4, atol=1e-3)
    base = sums_of_pairs(tokens_of_pairs(of.base, ids))
    torch.testing.assert_close(found[1], base, rtol=1e-5, atol=1e-4)
    assert float((found[0] - base).abs().max()) > 0.1, "the steering changes something"


def test_losses_are_the_runs_own_with_its_reference_and_its_lengths() -> None:
    of = checkpoints(4)
    ids, reference = [pair.ids for pair in of.pairs], noise(4, 2, seed=1).double()
    sums = noise(3, 4, 2, seed=2).double()
    found = losses_of(make_preference_loss("sigmoid", beta=0.5), sums, reference, ids)
    margin = (sums[..., 0] - reference[:, 0]) - (sums[..., 1] - reference[:, 1])
    torch.testing.assert_close(found, -torch.nn.functional.logsigmoid(0.5 * margin))
    lengths = torch.tensor([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in ids])
    means = sums / lengths
    simpo = -torch.nn.functional.logsigmoid(10 * (means[..., 0] - means[..., 1]) - 5)
    torch.testing.assert_close(losses_of(SIMPO, sums, reference, ids), simpo)


def test_ablating_everything_gives_back_the_base_and_nothing_costs_nothing() -> None:
    of = checkpoints()
    table = SparseFeatures(n_random=3, n_relabelled=2).table(of).ablations.set_index("ablated")
    ids = [pair.ids for pair in of.pairs]
    sums = sums_of_pairs(of.token_log_probs[0])[None]
    base = float(losses_of(SIMPO, sums, sums[0], ids).mean())
    assert table["loss"]["all"] == pytest.approx(base, rel=1e-4)
    assert table["rise"]["none"] == 0
    assert table["rise"]["all"] == pytest.approx(base - table["loss"]["none"], rel=1e-6)
    assert table["n_features"]["all"] == WIDTH
    assert table["usage_share"][["none", "all"]].tolist() == pytest.approx([0, 1])


def test_the_most_used_features_alone_and_left_out_are_ablations_of_the_model() -> None:
    of = checkpoints()
    found = SparseFeatures(n_random=3, n_relabelled=2).table(of)
    top = found.top.set_index("share")
    assert top["kept"][1.0] == pytest.approx(1)
    assert top["without"][1.0] == pytest.approx(0, abs=1e-6)
    assert top["kept"][0.0] == pytest.approx(0, abs=1e-6)
    steering, ids = steering_of(of), [pair.ids for pair in of.pairs]
    usage = torch.tensor(found.features["effective_steering"])
    kept = torch.zeros(WIDTH, dtype=torch.bool)
    kept[usage.argsort(descending=True)[: int(top["n_features"][0.2])]] = True
    steering.ablated = ~kept
    sums = sums_of_pairs(tokens_of_pairs(of.aligned, ids))[None]
    loss = float(losses_of(SIMPO, sums, sums[0], ids).mean())
    losses = found.ablations.set_index("ablated")["loss"]
    assert top["kept"][0.2] == pytest.approx((losses["all"] - loss) / (losses["all"] - losses["none"]), rel=1e-3)


def test_usage_counts_what_features_are_changed_by_and_not_what_is_asked_of_them() -> None:
    of = checkpoints(4)
    features = SparseFeatures(n_random=2, n_relabelled=2).table(of).features
    assert (features["effective_steering"] <= features["steering"] * (1 + 1e-5)).all()
    assert features["effective_steering"].sum() < 0.9 * features["steering"].sum(), (
        "a negative s on a feature that is off"
    )


def test_classes_follow_the_planted_attribute_that_a_feature_is_active_with() -> None:
    pairs = planted(60)
    levels = torch.tensor(
        [
            [pair.attributes[f"{side}/{name}"] for name in ATTRIBUTES]
            for pair in pairs
            for side in ("chosen", "rejected")
        ]
    )
    means = noise(120, 4, seed=0)
    means[:, 0] += 3 * levels[:, ATTRIBUTES.index("tone")]
    means[:, 1] -= 3 * levels[:, ATTRIBUTES.index("excitement")]
    found = classes_of_attributes(means, pairs, [i % 2 == 0 for i in range(60)])
    assert found.labels == [ALIGNMENT, STYLE, OTHER, OTHER]
    assert found.explanations[0].startswith("tone (r = +0.9")
    assert found.explanations[1].startswith("excitement (r = −0.9")
    assert found.error == 0
    assert has_planted(pairs)
    assert not has_planted(asked.probe_pairs(2))


def write(
    path: Path, rows: Sequence[Sequence[object]], header: Sequence[str] = ("index", "label", "explanation")
) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def test_classes_are_read_from_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", [(1, " Style ", "dashes"), (0, "alignment", "refusals"), (2, "other", "")])
    found = classes_of_file(path, 3, error=0.1)
    assert (found.labels, found.explanations) == ([ALIGNMENT, STYLE, OTHER], ["refusals", "dashes", ""])
    assert found.error == 0.1
    assert classes_of_file(path, 3, error=None).error != found.error


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        ([(0, "style", "")], ("index", "label", "explanation"), "a row for each of 3 features, got none for 1 and 1 others"),
        ([(0, "stile", "")], ("index", "label", "explanation"), "expected a label out of style, alignment, other, got 'stile'"),
        ([(7, "style", "")], ("index", "label", "explanation"), "line 2: expected an index from 0 to 2, got '7'"),
        ([(0, "style", ""), (0, "other", "")], ("index", "label", "explanation"), "line 3: feature 0 comes twice"),
        ([(0, "style")], ("feature", "label"), "got no index"),
    ],
)  # fmt: skip
def test_a_file_of_classes_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, rows: list[tuple[object, ...]], header: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UserError, match=words.replace("'", ".")):
        classes_of_file(write(tmp_path / "f.csv", rows, header), 3, error=None)
    with pytest.raises(UserError, match="cannot be read"):
        classes_of_file(str(tmp_path / "none.csv"), 3, error=None)


class Reader:
    """A judge who calls everything with an exclamation mark style, and says of the rest what comes first."""

    name = "reader"

    def __init__(self) -> None:
        self.heard: list[str] = []

    def start(self, *, want_probabilities: bool) -> None:
        assert not want_probabilities

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        said = [question.messages[-1].content for question in questions]
        self.heard += said
        return [Reply((self._answer(text),)) for text in said]

    def _answer(self, text: str) -> str:
        if "Say in one line" in text:
            return "loud words!" if "«!»" in text else "quiet words"
        if "loud words!" in text:
            return "S"
        return text.split("belong to?\n")[1][0]


def test_a_judge_sees_active_tokens_and_only_its_steady_answers_count() -> None:
    judge = Reader()
    found = classes_of_judge(judge, [["oh«!»"], ["so «it» goes"]], [3, 1], 5)
    assert found.labels == [OTHER, OTHER, OTHER, STYLE, OTHER]
    assert found.explanations[1] == "quiet words"
    assert found.error == 0.5, "its second answer was whatever came first"
    assert "oh«!»" in judge.heard[0]


def test_a_judge_tells_classes_where_nothing_is_planted() -> None:
    class Scorer:
        judge = Reader()

    of = replace(checkpoints(6), pairs=asked.probe_pairs(6))
    options = SparseFeatures(scorers={"judge": Scorer()}, n_random=2, n_relabelled=2, n_judged=5)  # type: ignore[dict-item]
    options.start(of)
    found = options.table(of)
    assert "the judge reader" in found.about["classes"]
    without = SparseFeatures(n_random=2, n_relabelled=2).table(of)
    assert without.about["classes"].startswith("nothing: give sparse_features.labels")
    assert set(without.features["label"]) == {OTHER}


def test_update_within_the_dictionary_is_explained_by_its_features() -> None:
    d_model = 16
    sae = JumpReLU(SaeId("layer_00"), d_model, WIDTH)
    directions = torch.linalg.qr(noise(d_model, d_model, seed=1))[0]
    with torch.no_grad():
        sae.encoder_weight[:d_model] = directions
        sae.decoder_weight[:d_model] = directions
    base = noise(30, d_model, seed=2).abs() @ directions
    change = torch.zeros(30, d_model)
    change[:, 3], change[:, 5] = 2.0, noise(30, seed=3).abs()
    aligned = base + change @ directions
    order = torch.tensor([3, 5, *(i for i in range(WIDTH) if i not in (3, 5))])
    groups = [str(i) for i in range(10)]
    found = explained_by_features(sae, Change(base, aligned, torch.arange(30) // 3), {"dpo": order}, [1, 2], groups)
    energy = float(4 * 30 / (change**2).sum())
    assert found["explained_update"].tolist() == pytest.approx([energy, 1], abs=1e-5)
    mean = change.mean(0)
    assert found["explained_v_star"].tolist() == pytest.approx([4 / float(mean @ mean), 1], abs=1e-5)
    assert found["explained_update_low"][0] < energy < found["explained_update_high"][0]
    torch.testing.assert_close(moved_by(sae, base, aligned), (aligned - base).double(), rtol=1e-4, atol=1e-5)


def test_dpo_of_the_same_base_is_told_in_the_features_of_a_steering(tmp_path: Path) -> None:
    own = checkpoints(12)
    options = SparseFeatures(n_random=2, n_relabelled=2, n_shown=2)
    about = _Asked(options, own)
    about.dpo = Checkpoints(own.base, asked.opened(1), own.pairs)
    found = about.tables()
    assert found.bridge is not None
    assert found.bridge.overlap is not None
    assert -1 <= found.bridge.overlap.value <= 1
    assert set(found.bridge.explained["order"]) == {"dpo", "fsrl"}
    last = found.bridge.explained.groupby("order")["explained_update"].last()
    assert last["dpo"] == pytest.approx(last["fsrl"]), "all features are all features"
    assert found.bridge.steered["step"].tolist() == ["v_star", "decoded", "decoded_16", "fsrl", "own"]
    section = sparse_features_section(found)
    assert len(section.sentences) == 5
    assert {
        "sparse_features_by_feature",
        "sparse_features_overlap",
        "sparse_features_explained",
    } <= section.more_tables.keys()
    assert section.coloured is not None
    assert len(section.coloured.pairs) == 2


def test_two_models_without_a_steering_are_told_in_the_features_of_an_autoencoder(tmp_path: Path) -> None:
    of = replace(asked.checkpoints(12), pairs=planted(12))
    with pytest.raises(Unsupported, match=r"expected a run that is steered by sparse features"):
        SparseFeatures().table(of)
    (tmp_path / "sae").mkdir()
    write_sae(random_sae(of.base.model.config.hidden_size, "layer_00"), tmp_path / "sae", about={})
    found = SparseFeatures(sae=str(tmp_path / "sae"), n_shown=1).table(of)
    assert found.ablations.empty
    assert found.bridge is not None
    assert found.bridge.overlap is None
    section = sparse_features_section(found)
    assert len(section.sentences) == 2
    assert "dpo_change" in section.table
    with pytest.raises(UserError, match="has no effect beside a steering"):
        SparseFeatures(sae=str(tmp_path / "sae")).table(checkpoints(6))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_random": 1}, "n_random"),
        ({"least_correlation": 1.5}, "sparse_features.least_correlation: expected 0 … 1, got 1.5"),
        ({"label_error": 0.1}, "has no effect without sparse_features.labels"),
        ({"alignment_attributes": ["kindness"]}, "expected some of tone"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SparseFeatures(**options)


def test_costs_count_every_set() -> None:
    of = checkpoints(6)
    costs = SparseFeatures(n_random=3, n_relabelled=2).costs(of)
    assert [cost.name for cost in costs] == ["states", "ablations, above the site"]
    sets = 5 + 3 * (2 * 3 + 8) + 2 * 2 + 8 * 2 + 6 * 3
    assert costs[1].forwards == sets, (
        "sets, random ones of either kind, wrong labels, shares with and without, random shares"
    )


def test_tables_are_plain_and_complete() -> None:
    table = SparseFeatures(n_random=3, n_relabelled=2).table(checkpoints()).ablations
    assert isinstance(table, pd.DataFrame)
    assert {"rise_low", "above_usage_matched", "random_size_high", "label_error", "n"} <= set(table.columns)


def test_a_class_without_features_has_no_number_beside_random_ones() -> None:
    of = replace(checkpoints(8), pairs=asked.probe_pairs(8))
    table = SparseFeatures(n_random=3, n_relabelled=2).table(of).ablations.set_index("ablated")
    assert table["rise"]["style"] == 0
    assert table["verdict_usage"]["style"] == "no value"
    assert sparse_features_section(SparseFeatures(n_random=3, n_relabelled=2).table(of)).headlines


def test_other_runs_that_have_no_effect_are_refused() -> None:
    for options, of, words in (
        ({"fsrl": "a"}, checkpoints(6), "fsrl: has no effect where the aligned model is steered by features"),
        ({"dpo": "a"}, asked.checkpoints(6), "dpo: has no effect where the aligned model is no steering"),
    ):
        with pytest.raises(UserError, match=words):
            SparseFeatures(**options).table(of)  # type: ignore[arg-type]
