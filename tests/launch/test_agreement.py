"""``python -m launch.agreement``: a judge held against labels, without a model in between."""

import json
from pathlib import Path

import pytest

from launch.agreement import agreement_of, agreement_table
from tests.analysis.asked import save_model
from tests.launch.analyze_command import composed
from tiltmeter.errors import UserError
from tiltmeter.scoring.scorer import Figure


def asked(*arguments: str) -> dict[str, Figure]:
    return {figure.name: figure for figure in agreement_of(composed(*arguments))}


def test_the_oracle_of_a_world_agrees_with_it() -> None:
    found = asked("data=synthetic", "data.n_prompts=30", "judge=oracle", "judge.agreement_pairs=20")
    assert found["judge/agreement"][2:7:2] == (1.0, 1.0, 0)
    assert found["judge/agreement"].n == 20


def test_a_local_model_is_held_against_a_file(tmp_path: Path) -> None:
    model = save_model(tmp_path / "judge", seed=3, max_position_embeddings=2048)
    rows = [{"prompt": f"Q {i}?", "chosen": f"Yes {i}.", "rejected": f"No {i}."} for i in range(5)]
    (file := tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = asked("data=preferences", f"data.path={file}", "judge=local", f"judge.judge.model={model}")
    assert (found["judge/agreement"].n, found["judge/agreement"].n_missing) == (5, 0)
    assert 0 <= found["judge/agreement"].low <= found["judge/agreement"].value <= found["judge/agreement"].high <= 1
    assert found["judge/position_consistency"].n == 5
    assert f"local:{model}" in found["judge/agreement"].scorer
    assert agreement_table(list(found.values())).row_count == len(found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("judge=oracle",), "data: expected pairs that people ranked, got none"),
        (("data=synthetic", "judge=none"), "judge: expected whom to ask, got none"),
        (("data=synthetic", "judge=oracle", "judge.agreement_pairs=0"), "expected at least 1 pair to ask about"),
        (("data=synthetic", "judge=oracle", "dtype=bfloat16"), "dtype: has no effect here"),
        (("data=synthetic", "judge=oracle", "pairs.n_pairs=5"), "pairs.n_pairs: has no effect here"),
    ],
)
def test_what_can_not_be_asked_is_refused(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        asked(*arguments)
