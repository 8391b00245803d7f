"""Vectors to steer with, estimated on one half of the held-out prompts so that the other half can test them."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from analysis.checkpoints import Checkpoints
from analysis.probe_pairs import ProbePair
from tiltmeter.capture import ReadPoint
from tiltmeter.controls import norm_matched, random_vectors
from tiltmeter.directions import steering_vector
from tiltmeter.errors import UserError
from tiltmeter.layers import FINAL_POST_NORM, unembedding
from tiltmeter.positions import Position
from tiltmeter.probe import PreferenceDirections, Probe, matching_rows
from tiltmeter.steering_vector import SteeringVector

V_STAR, V_BAR, RANDOM = "v*", "v_bar", "random_"
"""Names of vectors; random controls are counted from 1."""
POSITION: Position = "prompt_last"
"""Where v* is read."""


class Halves(NamedTuple):
    """Pairs that share no prompt: vectors come from the first half, all numbers from the second."""

    estimation: list[ProbePair]
    test: list[ProbePair]


def split_by_prompt(pairs: Sequence[ProbePair], *, seed: int) -> Halves:
    """Draw half of the prompts, rounded down, for estimating vectors; the others test them.

    Raises:
        UserError: fewer than four prompts.
    """
    prompts = sorted({pair.group for pair in pairs})
    if len(prompts) < 4:
        raise UserError(
            f"steering: expected held-out pairs of at least 4 prompts, half to estimate vectors and half to test them, got "
            f"{len(prompts)}; train with a larger datamodule.probe_pairs, or ask about more pairs with pairs.n_pairs"
        )
    order = np.random.default_rng(seed).permutation(len(prompts))
    drawn = {prompts[i] for i in order[: len(prompts) // 2]}
    return Halves([p for p in pairs if p.group in drawn], [p for p in pairs if p.group not in drawn])


def estimate_vectors(
    checkpoints: Checkpoints, pairs: Sequence[ProbePair], sites: Sequence[str], *, n_random: int, seed: int
) -> dict[tuple[str, str], SteeringVector]:
    """v* at every site, v̄ at ``final_post_norm``, and random controls, all at a site with the norm of its v*.

    Args:
        pairs: that vectors are estimated from.
        sites: resolved names.
        n_random: controls of each site.
        seed: of the controls.

    Returns:
        By vector's name and site.

    Raises:
        UserError: the two models do not differ at a site, so that there is no v*.
    """
    ids = [pair.ids for pair in pairs]
    probe = Probe.of_pairs(ids, sites=sites, positions=[POSITION])
    base, aligned = (probe.read(opened.model) for opened in (checkpoints.base, checkpoints.aligned))
    known: dict[str, str | int] = {"pairs": len(pairs), "seed": seed}
    found: dict[tuple[str, str], SteeringVector] = {}
    for site in sites:
        like = steering_vector(*matching_rows(base, aligned, ReadPoint(site, POSITION)))
        if not float(like.norm()) > 0:
            raise UserError(
                f"steering: base and aligned model have the same hidden states at {site}, so there is no v* to steer with; "
                "give two checkpoints that differ"
            )
        made = f"mean of h_policy - h_base over {len(pairs)} pairs"
        found[V_STAR, site] = SteeringVector(site, like.float(), made=made, position=POSITION, provenance=known)
        if site == FINAL_POST_NORM:
            mean = PreferenceDirections(unembedding(checkpoints.base.model), ids).sequence.mean(0)
            found |= _norm_matched(V_BAR, site, mean, like, known)
        controls = random_vectors(like, n_random, seed=seed)
        for i, values in enumerate(controls.vectors):
            made = f"{controls.provenance}, number {i + 1}"
            found[f"{RANDOM}{i + 1}", site] = SteeringVector(site, values.float(), made=made, provenance=known)
    return found


def fingerprint(vectors: dict[tuple[str, str], SteeringVector]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of names and values: the same vectors have the same one."""
    digest = hashlib.sha256()
    for (name, site), vector in vectors.items():
        digest.update(f"{name} {site} ".encode() + vector.values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _norm_matched(
    name: str, site: str, values: Tensor, like: Tensor, known: dict[str, str | int]
) -> dict[tuple[str, str], SteeringVector]:
    """The vector; none where it is zero, as v̄ is where chosen and rejected have the same words."""
    if not float(values.norm()) > 0:
        return {}
    control = norm_matched(values[None], like, provenance="mean of unembedding rows, chosen less rejected")
    vector = SteeringVector(site, control.vectors[0].float(), made=control.provenance, provenance=known)
    return {(name, site): vector}
