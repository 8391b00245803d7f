"""Shifted prompts token by token, changes of odds against passes written out, and the synthetic world's planted shifts."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis.belief.shift import ACCURACY, CHANGE, KEPT, KNOWLEDGE, NEUTRAL, USUAL, Shift, shift_section
from analysis.belief.shifted_prompts import (
    CAPITALS,
    FALSE_PREMISE,
    OTHER_CORPUS,
    OTHER_PROMPT,
    OTHER_TOPIC,
    PARAPHRASE,
    PREMISES,
    shifted,
    writer_of,
)
from analysis.open.checkpoints import Checkpoints
from analysis.open.probe_pairs import ProbePair
from analysis.steering.unrelated_prompts import UNRELATED_PROMPTS
from datamodules.records import messages_of
from datamodules.synthetic import SyntheticWorld
from datamodules.tokenization import PairTokenizer
from tests.analysis import asked
from tests.analysis.legible import assert_legible
from tests.tiny_models import MemorySource, reference_log_probs
from tiltmeter.errors import Unsupported, UserError
from tiltmeter.models.generation import Decoding
from tiltmeter.scoring.truthfulqa import TruthfulQA

WORLD = SyntheticWorld(n_prompts=60)
FEW = Decoding(max_new_tokens=4)


def of_world(n: int = 12) -> Checkpoints:
    records, ids, _ = PairTokenizer(asked.TOKENIZER, 1024)(WORLD.load()[0][:n])
    pairs = [ProbePair.of(record, tokens) for record, tokens in zip(records, ids, strict=True)]
    models = [asked.opened(seed, max_position_embeddings=1024) for seed in (0, 1)]
    return Checkpoints(*models, pairs, WORLD)


def known(table: pd.DataFrame) -> pd.Series:
    return table.set_index(["measure", "shift"])["value"]


@pytest.fixture(scope="module")
def found() -> tuple[pd.DataFrame, pd.DataFrame]:
    return Shift(corpus=MemorySource(6, seed=5, name="other")).table(asked.checkpoints(12))


def test_every_shift_has_its_prompts_and_the_responses_stay(found: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    models = asked.checkpoints(12)
    writer = writer_of(models.base, models.pairs, chat_date=None)
    assert writer.pairs == models.pairs
    shifts = {
        of.name: of for of in shifted(writer, [CAPITALS, FALSE_PREMISE, OTHER_PROMPT], models, corpus=None, n_pairs=9)
    }
    assert list(shifts) == [CAPITALS, FALSE_PREMISE, OTHER_PROMPT]
    for name, shift in shifts.items():
        for row, (pair, usual) in enumerate(zip(shift.pairs, models.pairs, strict=True)):
            assert pair.ids[1:] == usual.ids[1:], "responses are the same tokens"
            said, before = (messages_of(of.prompt)[-1].content for of in (pair, usual))
            following = messages_of(models.pairs[(row + 1) % 12].prompt)[-1].content
            assert (
                said
                == {CAPITALS: before.upper(), FALSE_PREMISE: PREMISES[row % 5] + before, OTHER_PROMPT: following}[name]
            )
            assert str(asked.TOKENIZER.decode(pair.ids.prompt_ids)).endswith(f"Human: {said}\n\nAssistant:")
    prompts = found[1]
    assert prompts.groupby("shift").size().to_dict()[OTHER_CORPUS] == 6
    assert not prompts["planted"].any()


def test_changes_of_odds_are_those_of_passes_written_out(found: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    models, table = asked.checkpoints(12), known(found[0])
    writer = writer_of(models.base, models.pairs, chat_date=None)
    (capitals,) = shifted(writer, [CAPITALS], models, corpus=None, n_pairs=None)
    means = {}
    for name, pairs in ((USUAL, models.pairs), (CAPITALS, capitals.pairs)):
        with torch.no_grad():
            base, aligned = (
                reference_log_probs(of.model, [pair.ids for pair in pairs]) for of in (models.base, models.aligned)
            )
        change = (aligned - base)[:12] - (aligned - base)[12:]
        means[name] = float(change.mean())
        assert table[CHANGE, name] == pytest.approx(means[name], rel=1e-4)
        assert table[ACCURACY, name] == pytest.approx(float((change > 0).double().mean()))
    kept = table[KEPT, CAPITALS]
    assert kept != kept or kept == pytest.approx(means[CAPITALS] / means[USUAL], rel=1e-4)


def test_neutral_loss_is_the_mean_over_tokens_and_the_same_model_is_unchanged(
    found: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    models, losses, n = asked.checkpoints(4), 0.0, 0
    for text in UNRELATED_PROMPTS:
        ids = torch.tensor([[asked.TOKENIZER.bos_token_id, *asked.TOKENIZER.encode(text, add_special_tokens=False)]])
        with torch.no_grad():
            table = models.base.model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        losses -= float(table.gather(1, ids[0, 1:, None]).sum())
        n += ids.shape[1] - 1
    assert known(found[0])[f"{NEUTRAL}/base", KNOWLEDGE] == pytest.approx(losses / n, rel=1e-5)
    same = Shift(kinds=[CAPITALS]).table(replace(models, aligned=models.base))[0].set_index("measure")
    assert same.loc[f"{NEUTRAL}_change", ["value", "p_equivalent"]].tolist() == [0.0, 0.0]
    changed = found[0].set_index("measure").loc[f"{NEUTRAL}_change"]
    assert changed["p_equivalent"] > 0.05


def test_planted_shifts_keep_situation_attributes_and_truth() -> None:
    models = of_world()
    writer = writer_of(models.base, models.pairs, chat_date=None)
    paraphrase, topic = shifted(writer, [PARAPHRASE, OTHER_TOPIC], models, corpus=None, n_pairs=None)
    assert paraphrase.is_planted
    assert topic.is_planted
    own = {pair.pair_id: pair for pair in models.pairs}
    for pair in paraphrase.pairs:
        assert pair.prompt != own[pair.pair_id].prompt
        assert pair.ids[1:] == own[pair.pair_id].ids[1:]
    for pair in topic.pairs:
        usual = own[pair.pair_id].attributes
        assert pair.attributes["topic"] not in {p.attributes["topic"] for p in models.pairs}
        assert abs(float(pair.attributes["utility_gap"])) == pytest.approx(abs(float(usual["utility_gap"])))
        assert float(pair.attributes["utility_gap"]) > 0, "labels are clean"
    assert "risky" not in {pair.attributes["situation"] for pair in topic.pairs}


def test_oracle_judges_every_shift_of_a_world_and_the_section_is_legible(tmp_path: Path) -> None:
    questions = tmp_path / "mc.jsonl"
    row = '{"question": "Is tea blue?", "mc1_targets": {"no": 1, "yes": 0}, "mc2_targets": {"no": 1, "yes": 0}}\n'
    questions.write_text(row + row.replace("tea", "rain"), encoding="utf-8")
    asking = Shift(kinds=[CAPITALS, PARAPHRASE], decoding=FEW, truthfulqa=TruthfulQA(path=str(questions)))
    about = of_world()
    asking.start(about)
    table, prompts = asking.table(about)
    rates = table[table["measure"] == "oracle_preference_rate"]
    assert rates["shift"].tolist() == [USUAL, CAPITALS, PARAPHRASE]
    assert rates["value"].between(0, 1).all()
    mc1, name = known(table), "truthfulqa_mc1_zero_shot"
    assert mc1[f"{name}_change", KNOWLEDGE] == pytest.approx(
        mc1[f"{name}/policy", KNOWLEDGE] - mc1[f"{name}/base", KNOWLEDGE]
    )
    section = shift_section((table, prompts))
    assert_legible(section)
    assert "planted: nothing of the preference is lost" in " ".join(section.reading)
    assert set(section.more_tables) == {"shift_prompts"}


def test_section_of_a_corpus_without_a_judge_is_legible(found: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    section = shift_section(found)
    assert_legible(section)
    assert not any("judge prefers" in line for line in section.reading)


def test_prompts_that_can_not_be_written_again_are_left_out_or_refused() -> None:
    models = asked.checkpoints(8)
    cut = [replace(pair, ids=pair.ids._replace(prompt_ids=pair.ids.prompt_ids[1:])) for pair in models.pairs]
    half = replace(models, pairs=[*cut[:3], *models.pairs[3:]])
    assert writer_of(models.base, half.pairs, chat_date=None).pairs == models.pairs[3:]
    table, prompts = Shift(kinds=[CAPITALS]).table(half)
    assert set(table["n_cut"]) == {3}
    assert "3 pairs are left out, whose prompts were cut in training." in shift_section((table, prompts)).reading
    with pytest.raises(Unsupported, match="shift: 0 of 8 prompts come out as they were trained"):
        Shift().table(replace(models, pairs=cut))


def test_bad_shift_option_is_one_line() -> None:
    for options, said in (
        ({"kinds": ["capitalz"]}, r"shift\.kinds\[0\]: expected one of capitals"),
        ({"n_prompts": 3}, r"shift\.n_prompts: expected at least 4, got 3"),
        ({"dtype": "int8"}, r"shift\.dtype: expected one of"),
    ):
        with pytest.raises(UserError, match=said):
            Shift(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"shift\.neutral: "):
        Shift(neutral="nowhere.jsonl").table(asked.checkpoints(8))
