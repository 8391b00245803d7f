"""Gradients of the preference loss at a model's own states: where a pair's responses part, and along both of them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analysis.open.checkpoints import Checkpoints
from analysis.open.probe_pairs import ProbePair
from tiltmeter.errors import UserError
from tiltmeter.geometry.gradient_field import Context, FieldGrid, field_grid, layer_field, post_norm_field
from tiltmeter.geometry.gradients import log_prob_gradients, sequence_gradients
from tiltmeter.models.cpu_linear import linear
from tiltmeter.models.layers import FINAL_POST_NORM, unembedding
from tiltmeter.pairs.batch import collate_pairs
from tiltmeter.pairs.log_probs import scale_and_cap, sequence_log_probs, target_hidden_states
from tiltmeter.pairs.verification import best_layout
from tiltmeter.states.capture import ReadPoint
from tiltmeter.states.probe_set import Probe, cut_pair

LEAST_PLACES = 4
Kind = Literal["preference", "random"]
Words = tuple[int, int]
"""w and l: the loss asks for more of the first."""


class Place(NamedTuple):
    """The place where the responses of a pair part: the state at the context's last token predicts both words."""

    pair: ProbePair
    context: Sequence[int]
    words: dict[Kind, Words]
    """``preference``: the first two that differ; ``random``: two different ones, drawn from those of all responses."""


def parting_places(pairs: Sequence[ProbePair], *, seed: int) -> list[Place]:
    """Places of all pairs whose responses part behind at least two tokens.

    Args:
        seed: of the random words.

    Raises:
        UserError: fewer than four.
    """
    said = sorted({token for pair in pairs for side in (pair.ids.chosen_ids, pair.ids.rejected_ids) for token in side})
    rng = np.random.default_rng(seed)
    found = []
    for pair in pairs:
        prompt, chosen, rejected = cut_pair(pair.ids, ["diverge"])
        context = [*prompt, *chosen[:-1]]
        if chosen[-1] != rejected[-1] and len(context) > 1:
            w, other = rng.choice(said, 2, replace=False).tolist()
            found.append(Place(pair, context, {"preference": (chosen[-1], rejected[-1]), "random": (w, other)}))
    if len(found) < LEAST_PLACES:
        raise UserError(
            f"gradient_field: expected at least {LEAST_PLACES} pairs whose responses part behind two tokens or more, got "
            f"{len(found)} of {len(pairs)}; ask about more pairs"
        )
    return found


class StateGradients:
    """∇_h L around and at the states of places, and along whole responses.

    Args:
        checkpoints: base is the loss's reference.
        of: whose states and whose layers above them.
        places: with their states they give the axes of grids.
        sites: resolved.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        places: Sequence[Place],
        *,
        of: Literal["base", "aligned"],
        sites: Sequence[str],
    ) -> None:
        self.places, self.beta = list(places), checkpoints.beta
        self.base = checkpoints.base.model
        self.model = self.base if of == "base" else checkpoints.aligned.model
        asked = tuple(dict.fromkeys([*sites, FINAL_POST_NORM]))
        pairs = [place.pair.ids for place in places]
        probe = Probe.of_pairs(pairs, layout=best_layout(self.base, pairs), sites=asked, positions=["diverge"])
        states = probe.read_pair(checkpoints.base.model, checkpoints.aligned.model)
        both = {site: states.rows(ReadPoint(site, "diverge")) for site in asked}
        self.states = {site: policy if of == "aligned" else base for site, (base, policy) in both.items()}
        """[place, d_model] by site."""
        self.updates = {site: policy.double() - base.double() for site, (base, policy) in both.items()}
        """h_π − h_0, [place, d_model] by site."""
        self._base_final = both[FINAL_POST_NORM][0]

    def grid(self, at: int, site: str, kind: Kind, *, n: int, step: float) -> FieldGrid:
        """Points around the state of place ``at``.

        Raises:
            UserError: the states hardly vary, or the words' unembeddings are equal.
        """
        states = self.states[site]
        try:
            return field_grid(states[at], self.v(at, kind), states, n=n, step=step)
        except ValueError as error:
            raise UserError(f"gradient_field: {site}: {error}; ask about other pairs or sites") from error

    def v(self, at: int, kind: Kind) -> Float[Tensor, " d_model"]:
        """e_w − e_l, times the constant scale of the logits."""
        head, (w, other) = unembedding(self.model), self.places[at].words[kind]
        return (head.scale * (head.weight[w].double() - head.weight[other].double())).detach().cpu()

    def at_points(
        self, context: Context, at: int, site: str, kind: Kind, points: Float[Tensor, "point d_model"]
    ) -> Float[Tensor, "point d_model"]:
        """∇_h L with the state of place ``at`` replaced; in closed form, and its R = 1 asserted, where that is a tautology.

        Args:
            context: that of the place.
        """
        gap, (w, other) = self._reference_gap(at, kind), self.places[at].words[kind]
        if self.is_tautology(site):
            bias = unembedding(self.model).bias
            shift = 0.0 if bias is None else unembedding(self.model).scale * float(bias[w] - bias[other])
            return post_norm_field(points, self.v(at, kind), reference_gap=gap - shift, beta=self.beta).gradients
        margin = context.margin(site, chosen_id=w, rejected_id=other, reference_gap=gap)
        return layer_field(points, margin, beta=self.beta).gradients.cpu()

    def is_tautology(self, site: str) -> bool:
        """Whether all gradients for one pair of words are parallel whatever the model; a soft cap on the logits bends them."""
        return site == FINAL_POST_NORM and unembedding(self.model).soft_cap is None

    @torch.no_grad()
    def along_responses(self, at: int) -> Float[Tensor, "state d_model"]:
        """Gradients of the whole responses' loss at ``final_post_norm``, one for each state that predicts a word of theirs."""
        ids = self.places[at].pair.ids
        batch = collate_pairs([ids], pair_index=[0], layout="concatenated").to(self.model.device)
        ratio = torch.zeros(2, device=self.model.device)
        if self.model is not self.base:
            ratio = sequence_log_probs(self.model, batch) - sequence_log_probs(self.base, batch)
        hidden = target_hidden_states(self.model, batch)
        by_target = log_prob_gradients(hidden, unembedding(self.model), batch.target_ids).float()
        found = sequence_gradients(
            (ratio[:1] - ratio[1:]).float(), by_target, batch.target_sequences, beta=self.beta
        ).cpu()
        n = len(ids.chosen_ids)
        shared = found[:1] + found[n : n + 1]  # one state predicts both first words
        return torch.cat([shared, found[1:n], found[n + 1 :]])

    @torch.no_grad()
    def _reference_gap(self, at: int, kind: Kind) -> float:
        """Δ_ref = log π₀(w) − log π₀(l) in nats."""
        head, chosen = unembedding(self.base), list(self.places[at].words[kind])
        state = self._base_final[at][None].to(head.weight)
        bias = None if head.bias is None else head.bias[chosen]
        logits = scale_and_cap(linear(state, head.weight[chosen], bias), head)[0]
        return float(logits[0] - logits[1])
