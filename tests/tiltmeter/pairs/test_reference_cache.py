import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import make_model
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.pairs.reference_cache import ReferenceCache, forward_identity, hash_pairs, hash_weights

PAIRS = [TokenizedPair([1, i], [i, 2], [i + 1, 3, 2]) for i in range(5)]
TABLE = torch.arange(10, dtype=torch.float64).reshape(5, 2) / 3
BATCHES = [(4, 0), (2, 1, 3)]


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    cache = ReferenceCache(tmp_path, {"weights": "a", "precision": "32-true"})
    cache.store(hash_pairs(PAIRS), TABLE, BATCHES)
    return cache


def test_rows_are_found_by_their_token_ids_in_any_order(cache: ReferenceCache) -> None:
    kept = cache.lookup(hash_pairs([PAIRS[3], TokenizedPair([9], [9], [8]), PAIRS[0]]))
    assert kept.complaint == ""
    assert torch.equal(kept.log_probs[[0, 2]], TABLE[[3, 0]])
    assert kept.log_probs[1].isnan().all()


def test_rows_know_the_micro_batch_that_they_were_computed_in_and_in_which_order(cache: ReferenceCache) -> None:
    assert cache.lookup(hash_pairs(PAIRS)).micro_batches == [[4, 0], [2, 1, 3]]
    assert cache.lookup(hash_pairs([PAIRS[3], PAIRS[4], PAIRS[0]])).micro_batches == [[1, 2]], "only whole ones"
    cache.store(hash_pairs(PAIRS), TABLE, [(1, 4)])
    assert cache.lookup(hash_pairs(PAIRS)).micro_batches == [[1, 4]], "those that lost a row to another are none"


def test_a_pair_with_swapped_responses_is_another_pair(cache: ReferenceCache) -> None:
    pair = PAIRS[0]
    assert (
        cache.lookup(hash_pairs([TokenizedPair(pair.prompt_ids, pair.rejected_ids, pair.chosen_ids)]))
        .log_probs.isnan()
        .all()
    )


def test_moving_a_token_across_the_boundary_is_another_pair() -> None:
    a, b = TokenizedPair([1, 2], [3], [4]), TokenizedPair([1], [2, 3], [4])
    assert not torch.equal(hash_pairs([a]), hash_pairs([b]))


def test_new_rows_are_kept_beside_old_ones_and_missing_ones_are_not_kept(cache: ReferenceCache) -> None:
    more = [TokenizedPair([7], [8], [9]), TokenizedPair([7], [8], [10])]
    table = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]], dtype=torch.float64)
    cache.store(hash_pairs(more), table, [(0,), (1,)])
    found = cache.lookup(hash_pairs([*PAIRS, *more])).log_probs
    assert torch.equal(found[:5], TABLE)
    assert found[5].tolist() == [1.0, 2.0]
    assert found[6].isnan().all()


@pytest.mark.parametrize("change", [{"weights": "b"}, {"precision": "bf16-mixed"}, {"attention": "eager"}])
def test_another_model_or_precision_has_a_cache_of_its_own(cache: ReferenceCache, change: dict[str, str]) -> None:
    other = ReferenceCache(cache.root, {**cache.depends_on, **change})
    assert other.lookup(hash_pairs(PAIRS)).log_probs.isnan().all()


def test_a_truncated_or_altered_table_is_not_used_and_said(cache: ReferenceCache) -> None:
    table = cache.folder / "log_probs.safetensors"
    whole = table.read_bytes()
    for damaged in (whole[:-8], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        table.write_bytes(damaged)
        kept = cache.lookup(hash_pairs(PAIRS))
        assert kept.log_probs.isnan().all()
        assert "does not match its manifest" in kept.complaint


def test_a_table_without_manifest_or_a_foreign_manifest_is_not_used(cache: ReferenceCache) -> None:
    manifest = cache.folder / "manifest.json"
    said = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps({**said, "depends_on": {"weights": "other"}}), encoding="utf-8")
    assert "made for another model" in cache.lookup(hash_pairs(PAIRS)).complaint
    manifest.write_text("[]", encoding="utf-8")
    assert "damaged" in cache.lookup(hash_pairs(PAIRS)).complaint
    manifest.unlink()
    kept = cache.lookup(hash_pairs(PAIRS))
    assert kept.log_probs.isnan().all()
    assert "damaged" in kept.complaint


def test_a_damaged_cache_is_replaced_by_the_next_store(cache: ReferenceCache) -> None:
    (cache.folder / "log_probs.safetensors").write_bytes(b"x")
    cache.store(hash_pairs(PAIRS[:2]), TABLE[:2], [(0, 1)])
    kept = cache.lookup(hash_pairs(PAIRS))
    assert kept.complaint == ""
    assert torch.equal(kept.log_probs[:2], TABLE[:2])
    assert kept.log_probs[2:].isnan().all()


def test_the_hash_of_weights_sees_one_changed_number_and_nothing_else() -> None:
    model = make_model("llama", torch.float32, "sdpa")
    before = hash_weights(model.state_dict())
    assert hash_weights(model.eval().state_dict()) == before
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert hash_weights(model.state_dict()) != before


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"hidden_act": "gelu"},
        {"attn": "eager"},
        {"dtype": torch.bfloat16},
    ],
    ids=lambda change: next(iter(change)),
)
def test_equal_weights_under_another_configuration_are_another_model(change: dict[str, Any]) -> None:
    usual, other = make_model("llama"), make_model("llama", **change)
    assert forward_identity(usual, usual.device) != forward_identity(other, other.device)


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_another_version_of_a_library_is_another_model(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    before = forward_identity(model, model.device)
    now = {"torch": version("torch"), "transformers": version("transformers")} | {library: "99.1"}
    monkeypatch.setattr("tiltmeter.pairs.reference_cache.version", now.get)
    assert forward_identity(model, model.device) != before


def test_cache_does_not_depend_on_where_a_model_was_loaded_from() -> None:
    model = make_model("llama")
    before = forward_identity(model, model.device)
    model.config._name_or_path = "elsewhere"
    assert forward_identity(model, model.device) == before
