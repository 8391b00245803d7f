"""Readouts of two tiny models: states by straight passes, labels of files and of planted attributes, and files that are refused."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis.belief.labelled_texts import PREFERRED, of_file, of_responses, of_truthfulqa
from analysis.belief.readout import Readouts, _states, readout_section
from analysis.open.probe_pairs import ProbePair
from datamodules.synthetic import SyntheticWorld
from datamodules.synthetic_phrases import ATTRIBUTES
from tests.analysis import asked
from tests.analysis.legible import assert_legible
from tiltmeter.errors import Unsupported, UserError
from tiltmeter.models.layers import FINAL_POST_NORM
from tiltmeter.pairs.batch import TokenizedPair

OPENED = asked.opened(0)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def labelled(path: Path, n: int = 40) -> str:
    rows = [f'"{"kind" if i % 2 else "rain"} map {i}",{i % 2}' for i in range(n)]
    return write(path, "\n".join(["text,label", *rows]))


def planted_pairs(n: int) -> list[ProbePair]:
    """Pairs of memory with the attributes of a synthetic world."""
    attributes = [pair.attributes for pair in SyntheticWorld(n_prompts=n).load()[0]]
    return [replace(pair, attributes=of) for pair, of in zip(asked.probe_pairs(n), attributes, strict=True)]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    path = labelled(tmp_path_factory.mktemp("readout") / "tone.csv")
    options = Readouts(labelled=path, n_permutations=1, sites=["layer_00", FINAL_POST_NORM])
    return options.table(asked.checkpoints(20))


@torch.no_grad()
def test_state_of_a_text_is_the_mean_over_its_own_tokens() -> None:
    pairs = [TokenizedPair([1, 5, 9], [7, 8], [7]), TokenizedPair([1], [6, 3, 10, 12], [6])]
    found = _states(OPENED, pairs, [FINAL_POST_NORM])[FINAL_POST_NORM]
    for row, pair in zip(found, pairs, strict=True):
        ids = torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]])
        hidden = OPENED.model.model(input_ids=ids, use_cache=False).last_hidden_state[0, len(pair.prompt_ids) :]
        assert row.tolist() == pytest.approx(hidden.mean(0).tolist(), abs=1e-5)


def test_table_has_a_row_for_each_label_and_site(table: pd.DataFrame) -> None:
    assert table[["label", "site"]].to_numpy().tolist() == [
        [label, site] for label in (PREFERRED, "tone") for site in ("layer_00", FINAL_POST_NORM)
    ]
    assert table["n"].tolist() == [40] * 4
    assert (table.loc[table["label"] == "tone", "auc_base"] > 0.95).all(), "the first word says the label"
    assert table["auc_base"].between(table["auc_base_low"], table["auc_base_high"]).all()


def test_readout_section_is_legible_and_counts_labels(table: pd.DataFrame) -> None:
    section = readout_section(table)
    assert_legible(section)
    assert section.sentences[0].startswith("Of 2 labels ")
    assert section.headlines[0].value.endswith(" of 4")


def test_same_model_keeps_and_moves_nothing(tmp_path: Path) -> None:
    about = asked.checkpoints(4, aligned=0)
    found = Readouts(labelled=labelled(tmp_path / "x.csv"), n_permutations=1, sites=FINAL_POST_NORM).table(about)
    assert found["label"].tolist() == ["x"], "eight responses are too few to read anything off"
    assert found["verdict_policy"].tolist() == found["verdict_retrained"].tolist() == ["unchanged"]
    assert found["cosine"].tolist() == pytest.approx([1])


def test_planted_attributes_are_labels_of_both_responses() -> None:
    pairs = planted_pairs(20)
    found = {of.name: of for of in of_responses(pairs)}
    assert list(found) == [PREFERRED, *ATTRIBUTES]
    tone = [pair.attributes[f"{side}/tone"] == 1 for pair in pairs for side in ("chosen", "rejected")]
    assert found["tone"].labels == tone
    assert found["tone"].texts[1] == (list(pairs[0].ids.prompt_ids), list(pairs[0].ids.rejected_ids))
    assert found["tone"].groups[:2] == [pairs[0].group] * 2


def test_true_and_false_answers_of_truthfulqa_are_told_apart(tmp_path: Path) -> None:
    rows = "Question,Best Answer,Correct Answers,Incorrect Answers\n" + "".join(
        f"Is it {i}?,yes,yes; kind,no\n" for i in range(9)
    )
    found = of_truthfulqa(write(tmp_path / "TruthfulQA.csv", rows), OPENED)
    assert sorted(found.labels[:3]) == [False, True, True]
    assert found.groups[:3] == ["Is it 0?"] * 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", r"not a CSV file with a header"),
        ('{"text": "a",\n "label": 1}\n', r"expected the columns text and label, got"),
        ("text,toxic\na,1\n", r"expected the columns text and label, got text, toxic \(no label\)"),
        ("text,label\n" + "a,1\n" * 40, r"label: expected two different labels, got 1: 1"),
        ("text,label\n" + "a,0\nb,1\nc,2\n" * 20, r"label: expected two different labels, got 3: 0, 1, 2"),
        ("text,label\n" + "a,0\nb,1\n" * 9, r"at least 30 texts with 5 or more of either label, got 18 with 9 and 9"),
        ("text,label\n" + "a,0\n" * 40 + "b,1\n", r"got 41 with 1 and 40"),
    ],
)
def test_file_of_labels_that_is_none_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    path = write(tmp_path / "labels.csv", content)
    with pytest.raises(UserError, match=rf"readout\.labelled: .*{said}") as error:
        of_file(path, text_column="text", label_column="label", opened=OPENED)
    assert "\n" not in str(error.value)


def test_missing_file_bad_option_and_too_few_responses_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"readout\.labelled: no such file: .*none\.csv"):
        Readouts(labelled=str(tmp_path / "none.csv")).costs(asked.checkpoints(20))
    for options, said in (
        ({"n_texts": 20}, r"readout\.n_texts: expected at least 30, got 20"),
        ({"n_permutations": 0}, r"readout\.n_permutations: expected at least 1"),
        ({"dtype": "int8"}, r"readout\.dtype: expected one of"),
    ):
        with pytest.raises(UserError, match=said):
            Readouts(**options)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match=r"readout: expected at least 30 responses to read labels off, got 16"):
        Readouts().table(asked.checkpoints(8))
