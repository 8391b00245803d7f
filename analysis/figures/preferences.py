"""Preferences of two checkpoints, by log-probs and by hidden states, on pairs that people have ranked."""

from collections.abc import Sequence

from analysis.open.checkpoints import Checkpoints
from analysis.open.pair_log_probs import sums_of_pairs, tokens_of_pairs
from datamodules.records import score_margins
from tiltmeter.models.generation import Decoding, fit_prompt
from tiltmeter.models.layers import resolve_sites
from tiltmeter.pairs.batch import CHOSEN, TokenizedPair
from tiltmeter.pairs.verification import best_layout
from tiltmeter.scoring.behaviour import Prompt
from tiltmeter.scoring.preference import kl_figures, preference_scores
from tiltmeter.scoring.preference_classifier import classifier_figures
from tiltmeter.scoring.scorer import Figure, Sample, Side
from tiltmeter.states.capture import Reading, ReadPoint
from tiltmeter.states.positions import Position
from tiltmeter.states.probe_set import Probe

_POSITION: Position = "response_last"


def preference_figures(checkpoints: Checkpoints, *, beta: float) -> list[Figure]:
    """Preference accuracy by implicit reward, margins and drifts of the pairs, over all and by source.

    Args:
        beta: scale of rewards; accuracy does not depend on it.
    """
    pairs = checkpoints.pairs
    base, aligned = map(sums_of_pairs, checkpoints.token_log_probs)
    chosen, rejected = (aligned - base).T.tolist()
    groups, sources = [pair.group for pair in pairs], [pair.source for pair in pairs]
    weights = score_margins(pair.attributes for pair in pairs)
    return preference_scores(chosen, rejected, beta=beta, groups=groups, sources=sources, weights=weights).figures


def kl_of_samples(
    checkpoints: Checkpoints, asked: Sequence[Prompt], samples: Sequence[Sample], decoding: Decoding
) -> list[Figure]:
    """log π − log π₀ of the aligned model's own completions, a completion and a token.

    Both are of the tokens that the aligned model continued: a prompt that left no room was cut.
    """
    aligned_model = checkpoints.aligned.model, checkpoints.aligned.tokenizer
    prompts = {prompt.pair_id: fit_prompt(prompt.ids, *aligned_model, decoding) for prompt in asked}
    said = [sample for sample in samples if sample.policy.ids]
    if not said:
        return []
    ids = [TokenizedPair(prompts[s.pair_id], s.policy.ids, s.policy.ids) for s in said]
    base, aligned = (
        sums_of_pairs(tokens_of_pairs(opened, ids))[:, 0].tolist() for opened in (checkpoints.base, checkpoints.aligned)
    )
    return kl_figures(aligned, base, [len(s.policy.ids) for s in said], groups=[s.group for s in said])


def probe_accuracies(checkpoints: Checkpoints, sites: str | Sequence[str]) -> list[Figure]:
    """Held-out accuracy of a logistic probe for the preference at sites of both models, a null beside each."""
    ids, groups = [pair.ids for pair in checkpoints.pairs], [pair.group for pair in checkpoints.pairs]
    layout = best_layout(checkpoints.base.model, ids)
    probe = Probe.of_pairs(ids, layout=layout, sites=sites, positions=[_POSITION])
    states = probe.read_pair(checkpoints.base.model, checkpoints.aligned.model)
    readings: tuple[tuple[Side, Reading], ...] = (("base", states.base), ("policy", states.policy))
    figures = []
    for of, reading in readings:
        for site in resolve_sites(sites, checkpoints.base.model.config.num_hidden_layers):
            rows, _, side = reading[ReadPoint(site, _POSITION)]
            where = f"{site} {_POSITION}"
            found = classifier_figures(rows[side == CHOSEN], rows[side != CHOSEN], groups, of=of, where=where)
            figures += [figure._replace(name=f"{figure.name}/{site}") for figure in found]
    return figures
