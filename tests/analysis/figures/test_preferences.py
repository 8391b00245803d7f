"""What two checkpoints prefer, against log-probs, logistic regression and forward passes written straight down."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from analysis.figures.preferences import kl_of_samples, preference_figures, probe_accuracies
from analysis.open.checkpoints import Checkpoints
from analysis.open.models import LoadedModel
from analysis.open.pair_log_probs import sums_of_pairs, tokens_of_pairs
from tests.analysis import asked
from tests.tiny_models import reference_log_probs
from tiltmeter.models.generation import Decoding
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.scoring.behaviour import Prompt, complete, pair_up
from tiltmeter.scoring.scorer import Figure, Sample

TWO = asked.checkpoints(8)
SAME = Checkpoints(TWO.base, TWO.base, TWO.pairs)
DECODING = Decoding(max_new_tokens=12)


def named(figures: list[Figure]) -> dict[str, Figure]:
    assert len({(f.name, f.of) for f in figures}) == len(figures)
    return {f.name if f.of != "base" else f"{f.name} of base": f for f in figures}


def test_figures_are_those_of_a_plain_computation() -> None:
    ids = [pair.ids for pair in TWO.pairs]
    with torch.no_grad():
        drift = reference_log_probs(TWO.aligned.model, ids) - reference_log_probs(TWO.base.model, ids)
    chosen, rejected = drift[:8].numpy(), drift[8:].numpy()
    found = named(preference_figures(TWO, beta=0.5))
    assert found["preference_accuracy"].value == np.mean(chosen > rejected)
    assert found["preference_ties"].value == 0
    assert found["reward_margin"].value == pytest.approx(0.5 * np.mean(chosen - rejected), rel=1e-4)
    assert found["logp_drift_chosen"].value == pytest.approx(chosen.mean(), rel=1e-4)
    assert found["logp_drift_rejected"].value == pytest.approx(rejected.mean(), rel=1e-4)
    assert found["preference_accuracy/memory/1"].value == np.mean(chosen[1::2] > rejected[1::2])
    assert found["preference_accuracy/memory/1"].n == 4


def test_a_model_against_itself_has_only_ties() -> None:
    found = named(preference_figures(SAME, beta=0.1))
    assert found["preference_accuracy"].value == 0
    assert found["preference_ties"].value == 1
    assert found["reward_margin"][2:5] == (0, 0, 0)
    assert found["logp_drift_chosen"].value == 0
    prompts, samples = answers(SAME, DECODING)
    assert [f.value for f in kl_of_samples(SAME, prompts, samples, DECODING)] == [0, 0]


def pair_log_probs(opened: LoadedModel, ids: list[TokenizedPair]) -> torch.Tensor:
    return sums_of_pairs(tokens_of_pairs(opened, ids))


def test_log_probs_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [pair.ids for pair in TWO.pairs]
    whole = pair_log_probs(TWO.base, ids)
    monkeypatch.setattr("analysis.open.pair_log_probs._TOKENS_PER_BATCH", 1)
    assert torch.allclose(pair_log_probs(TWO.base, ids), whole, atol=1e-4)
    assert torch.allclose(pair_log_probs(TWO.base, ids[::-1]), whole.flip(0), atol=1e-4)
    assert pair_log_probs(TWO.base, []).shape == (0, 2)


def answers(checkpoints: Checkpoints, decoding: Decoding) -> tuple[list[Prompt], list[Sample]]:
    prompts = [
        Prompt(p.pair_id, p.prompt, p.ids.prompt_ids, p.chosen, p.group, p.attributes) for p in checkpoints.pairs
    ]
    said = [
        complete(opened.model, opened.tokenizer, prompts, decoding)
        for opened in (checkpoints.base, checkpoints.aligned)
    ]
    return prompts, pair_up(prompts, *said)


@pytest.mark.parametrize("decoding", [DECODING, Decoding(max_new_tokens=12, temperature=1.0, n_samples=3)])
def test_kl_is_a_straight_recomputation(decoding: Decoding) -> None:
    prompts, samples = answers(TWO, decoding)
    of = {prompt.pair_id: list(prompt.ids) for prompt in prompts}
    pairs = [TokenizedPair(of[s.pair_id], list(s.policy.ids), list(s.policy.ids)) for s in samples]
    with torch.no_grad():
        policy, base = (reference_log_probs(o.model, pairs)[: len(pairs)] for o in (TWO.aligned, TWO.base))
    differences, n_tokens = (policy - base).numpy(), np.array([len(s.policy.ids) for s in samples])
    found = named(kl_of_samples(TWO, prompts, samples, decoding))
    assert found["kl"].value == pytest.approx(differences.mean(), rel=1e-4)
    assert found["kl_per_token"].value == pytest.approx(differences.sum() / n_tokens.sum(), rel=1e-4)
    assert found["kl"].n == len(samples) == 8 * decoding.n_samples


def test_kl_is_of_the_tokens_that_were_continued() -> None:
    """Positions that a model learned one by one end; what no longer fits was cut before the model answered."""
    two = Checkpoints(*(asked.opened(seed, "gpt2", n_positions=24) for seed in (0, 1)), TWO.pairs)
    prompts, samples = answers(two, DECODING)
    assert max(len(prompt.ids) for prompt in prompts) > 12
    bos = asked.TOKENIZER.bos_token_id
    cut = {p.pair_id: [bos, *p.ids[-11:]] if len(p.ids) > 12 else list(p.ids) for p in prompts}
    pairs = [TokenizedPair(cut[s.pair_id], list(s.policy.ids), list(s.policy.ids)) for s in samples]
    with torch.no_grad():
        policy, base = (reference_log_probs(o.model, pairs)[: len(pairs)] for o in (two.aligned, two.base))
    found = named(kl_of_samples(two, prompts, samples, DECODING))
    assert found["kl"].value == pytest.approx((policy - base).mean().item(), rel=1e-4)


def test_nothing_said_has_no_kl() -> None:
    assert kl_of_samples(TWO, [], [], DECODING) == []


def test_the_probe_is_out_of_fold_on_states_of_the_last_response_token() -> None:
    found = named(probe_accuracies(TWO, "layer_00"))
    names = [f"preference_probe_{what}/layer_00" for what in ("accuracy", "null")]
    assert set(found) == {*names, *(f"{name} of base" for name in names)}
    assert "layer_00 response_last" in found[names[0]].scorer
    assert {figure.n for figure in found.values()} == {8}
    groups = [pair.group for pair in TWO.pairs]
    for opened, name in ((TWO.aligned, names[0]), (TWO.base, f"{names[0]} of base")):
        d = np.stack([difference_at_the_end(opened.model, pair.ids) for pair in TWO.pairs])
        hits = []
        for train, test in GroupKFold(5, shuffle=True, random_state=0).split(d, groups=groups):
            scale = np.sqrt(np.square(d[train]).mean(0) * d.shape[1])
            both = np.concatenate([d[train], -d[train]]) / scale  # every pair twice, so half the weight
            labels = np.repeat([1, 0], len(train))
            fitted = LogisticRegression(C=0.5, fit_intercept=False, max_iter=1000).fit(both, labels)
            hits += ((d[test] / scale) @ fitted.coef_[0] > 0).tolist()
        assert found[name].value == pytest.approx(np.mean(hits))


@torch.no_grad()
def difference_at_the_end(model: torch.nn.Module, pair: TokenizedPair) -> np.ndarray:
    ends = []
    for response in (pair.chosen_ids, pair.rejected_ids):
        out = model(input_ids=torch.tensor([[*pair.prompt_ids, *response]]), output_hidden_states=True, use_cache=False)
        ends.append(out.hidden_states[1][0, -1].double().numpy())
    return ends[0] - ends[1]


def test_too_few_prompts_for_a_probe_is_a_missing_number() -> None:
    found = named(probe_accuracies(asked.checkpoints(4), "layer_00"))
    assert all(math.isnan(figure.value) for figure in found.values())
