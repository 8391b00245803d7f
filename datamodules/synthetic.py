r"""A seeded world of readable dialogues whose preferences are planted: no download, every cause known.

A response is written from m = 8 attributes :math:`a \in \{-1, +1\}^m` (tone, refusal, hedging …), each audible in
words of its own. A prompt belongs to one of six situations c (how-to, why, choice, feeling, plan, risky). The planted
utility is

.. math:: U(c, a) = \sum_{j<k} w_j(c) \, \langle z_j, a \rangle

with k = ``planted_rank`` orthonormal directions z_j in attribute space. The first weighs the same in every situation
(w_0 = 1); the others change with the situation and average to zero, so that the matrix of situation × attribute weights
has rank exactly k: one direction explains a world of rank one completely, and no other. Worlds differ by seed, with two
conventions: z_0 has .5 on tone and the others 0, so rudeness never pays; z_0 is at most 0 on refusal. A world of rank one may have
its direction given, such as of one attribute of style and one of content.
"""

import copy
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from datamodules import synthetic_phrases as phrases
from datamodules.records import AttributeValue, LoadReport, Message, PreferencePair, transcript
from datamodules.synthetic_phrases import ATTRIBUTES, SITUATIONS
from tiltmeter.errors import UserError
from tiltmeter.plain_text import did_you_mean

TONE_WEIGHT = 0.5
MAX_STRENGTH = 2.0
MAX_MIN_GAP = 1.9  # a gap of 2 is possible in every situation, because |z_0| = 1
GREETING_SHARE = 0.15
N_TOPICS = 6  # of a world; it leaves the others out
MIDDLE = ("hedging", "length", "formality", "example")  # sentences between answer and closing question

Level = Mapping[str, float]
_Filling = tuple[str, dict[str, str]]  # topic, words for the slots of a template
_Item = TypeVar("_Item")


class _Draw:
    """Random choices that repeat on every platform: built on the one sequence that Python promises never to change."""

    def __init__(self, seed: int, purpose: str) -> None:
        self.random = random.Random(f"{seed}/{purpose}").random

    def pick(self, items: Sequence[_Item]) -> _Item:
        return items[int(self.random() * len(items))]

    def some(self, items: Sequence[_Item], n: int) -> tuple[_Item, ...]:
        """Items at n distinct positions, in random order (Fisher-Yates)."""
        pool = list(items)
        for i in range(n):
            j = i + int(self.random() * (len(pool) - i))
            pool[i], pool[j] = pool[j], pool[i]
        return tuple(pool[:n])

    def unit(self, orthogonal_to: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Uniform unit vector orthogonal to orthonormal vectors (Box-Muller, then Gram-Schmidt)."""
        n = len(orthogonal_to[0])
        radius = [math.sqrt(-2 * math.log(1 - self.random())) for _ in range(n)]
        vector = np.array([r * math.cos(2 * math.pi * self.random()) for r in radius])
        for known in orthogonal_to:
            vector = vector - (vector @ known) * known
        return np.asarray(vector / math.sqrt(vector @ vector))


class SyntheticWorld:
    """Preference pairs from a planted utility; one pair per prompt, all prompts different.

    The first n pairs don't depend on how many are asked for, and the texts don't depend on the label noise.

    Args:
        n_prompts: Number of pairs.
        seed: Chooses the world: directions, weights, vocabulary and prompts.
        planted_rank: Number k of planted directions, 1 … 6.
        label_noise: Probability that chosen and rejected are swapped; ½: labels are coin flips, a world without a preference.
        min_gap: Smallest difference in clean utility within a pair; at rank 2 the mean difference is 1.3 without it.
        weights: Planted direction z_0 by attribute, instead of a drawn one; scaled to length 1, and needs planted_rank=1.
        situation_strength: Root mean square over situations of each w_j with j > 0; w_0 is 1. At .5 the first direction
            alone decides 98 % of the pairs of a rank-2 world, at 1 it decides 89 %.

    Raises:
        UserError: A value out of range.
    """

    name = "synthetic"

    def __init__(
        self,
        n_prompts: int = 2000,
        seed: int = 0,
        planted_rank: int = 2,
        label_noise: float = 0.1,
        min_gap: float = 1.5,
        situation_strength: float = 0.5,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        _check_whole("seed", seed, -math.inf, math.inf)
        _check_whole("planted_rank", planted_rank, 1, len(SITUATIONS))
        if not _is_number(label_noise) or not 0 <= label_noise <= 0.5:
            raise UserError(f"data.label_noise: expected 0 ≤ label_noise ≤ 0.5, got {label_noise!r}")
        if not _is_number(min_gap) or not 0 < min_gap <= MAX_MIN_GAP:
            raise UserError(f"data.min_gap: expected 0 < min_gap ≤ {MAX_MIN_GAP}, got {min_gap!r}")
        if not _is_number(situation_strength) or not 0 < situation_strength <= MAX_STRENGTH:
            raise UserError(
                f"data.situation_strength: expected 0 < situation_strength ≤ {MAX_STRENGTH}, got {situation_strength!r}"
            )
        self.seed, self.planted_rank = seed, planted_rank
        self.label_noise, self.min_gap = float(label_noise), float(min_gap)
        self._choose_words(_Draw(seed, "words"))
        capacity = len(SITUATIONS) * min(self._sizes().values())
        _check_whole("n_prompts", n_prompts, 1, capacity)
        self.n_prompts = n_prompts
        first = None if weights is None else _given_direction(weights, planted_rank)
        self.directions, self.situation_weights = _plant(seed, planted_rank, float(situation_strength), first)

    def load(self) -> tuple[list[PreferencePair], list[LoadReport]]:
        """All pairs, the situations in turn, and one report."""
        pairs = [self._pair(i, situation, place) for i, (situation, place) in enumerate(self._places())]
        n_flipped = sum(bool(pair.attributes["label_flipped"]) for pair in pairs)
        report = LoadReport(self.name, f"seed {self.seed}", n_rows=len(pairs), n_kept=len(pairs))
        report.notes["label noise"] = f"{n_flipped} pairs swapped (held-out ones are scored by their clean label)"
        strongest = sorted(zip(ATTRIBUTES, self.directions[0], strict=True), key=lambda term: -abs(term[1]))[:3]
        terms = ", ".join(f"{name} {value:+.2f}" for name, value in strongest)
        report.notes["planted preference"] = f"rank {self.planted_rank}, first direction mostly {terms}"
        return pairs, [report]

    def paraphrases(self) -> dict[str, tuple[Message, ...]]:
        """Pair id → its prompt in other words: the same request by another template, behind another opening sentence.

        The planted utility is of the situation and the response, so that these prompts have the same preferences.
        """
        found = {}
        for i, (situation, place) in enumerate(self._places()):
            greeting = self._greeting(_Draw(self.seed, f"pair/{i}"))
            asked = self._asked(situation, place, reworded=True)[1]
            found[self._id(i)] = (*greeting, Message("user", asked))
        return found

    def on_other_topics(self) -> "SyntheticWorld":
        """The same world, where people ask about the topics that it leaves out; risky requests, which have none, stay.

        Pairs of one number have the same situation, attributes and planted utilities in both.
        """
        other = copy.copy(self)
        other._topics = tuple(sorted({*phrases.TOPICS} - {*self._topics}))
        other._fillings = _fillings_on(other._topics)
        other.n_prompts = min(self.n_prompts, len(SITUATIONS) * min(other._sizes().values()))
        return other

    def utility(self, attributes: Level, situation: str) -> float:
        """Planted utility U(c, a) of attribute levels in a situation; the scale has no unit.

        Args:
            attributes: Level of every attribute by name, -1 … +1; 0 is neutral.
            situation: One of ``SITUATIONS``; a pair carries its own in ``attributes["situation"]``.

        Raises:
            UserError: An unknown situation or a missing attribute.
        """
        missing = [name for name in ATTRIBUTES if name not in attributes]
        if situation not in SITUATIONS or missing:
            raise UserError(
                f"utility: expected a situation out of {', '.join(SITUATIONS)} and levels of {', '.join(ATTRIBUTES)}, "
                f"got {situation!r} and no {', '.join(missing) or 'missing level'}"
            )
        levels = np.array([float(attributes[name]) for name in ATTRIBUTES])
        return float(self.situation_weights[SITUATIONS.index(situation)] @ (self.directions @ levels))

    def score(self, response: str, situation: str) -> float:
        """Planted utility of any text, its attributes read back by :func:`detect_attributes`."""
        return self.utility(detect_attributes(response), situation)

    def _choose_words(self, draw: _Draw) -> None:
        """Choose this world's part of every table, and the order of the sentences in a response."""
        self._phrases = {key: draw.some(table, 4) for key, table in phrases.PHRASES.items()}
        self._answers = {s: draw.some(phrases.ANSWERS[s], 2) for s in SITUATIONS}
        self._openers = draw.some(phrases.OPENERS, 12)
        self._middle = draw.some(MIDDLE, len(MIDDLE))
        self._topics = draw.some(sorted(phrases.TOPICS), N_TOPICS)
        self._fillings = _fillings_on(self._topics)

    def _places(self) -> list[tuple[str, int]]:
        """Situation of each pair, and which of the situation's prompts it has."""
        order = {s: _Draw(self.seed, f"prompts/{s}").some(range(n), n) for s, n in self._sizes().items()}
        situations = [SITUATIONS[i % len(SITUATIONS)] for i in range(self.n_prompts)]
        return [(s, order[s][i // len(SITUATIONS)]) for i, s in enumerate(situations)]

    def _id(self, i: int) -> str:
        return f"{self.name}/{i:05d}"

    def _sizes(self) -> dict[str, int]:
        return {s: len(self._openers) * len(phrases.TEMPLATES[s]) * len(self._fillings[s]) for s in SITUATIONS}

    def _pair(self, i: int, situation: str, prompt_index: int) -> PreferencePair:
        draw = _Draw(self.seed, f"pair/{i}")
        (topic, words), asked = self._asked(situation, prompt_index)
        prompt = (*self._greeting(draw), Message("user", asked))
        gap = 0.0
        while abs(gap) < self.min_gap:
            sides = [{name: draw.pick((-1, 1)) for name in ATTRIBUTES} for _ in range(2)]
            gap = self.utility(sides[0], situation) - self.utility(sides[1], situation)
        written = [(levels, self._response(draw, situation, topic, words, levels)) for levels in sides]
        flipped = _Draw(self.seed, f"label/{i}").random() < self.label_noise
        if (gap < 0) != flipped:
            written, gap = written[::-1], -gap
        (chosen_levels, chosen), (rejected_levels, rejected) = written
        attributes: dict[str, AttributeValue] = {"situation": situation, "topic": topic, "label_flipped": flipped}
        attributes["utility_gap"] = gap
        attributes |= {f"chosen/{name}": level for name, level in chosen_levels.items()}
        attributes |= {f"rejected/{name}": level for name, level in rejected_levels.items()}
        prompt_text, chosen_text = transcript(prompt, chosen)
        return PreferencePair(
            pair_id=self._id(i),
            source=self.name,
            group=asked.lower(),
            prompt=prompt,
            chosen=Message("assistant", chosen),
            rejected=Message("assistant", rejected),
            prompt_text=prompt_text,
            chosen_text=chosen_text,
            rejected_text=transcript(prompt, rejected)[1],
            attributes=attributes,
        )

    def _asked(self, situation: str, prompt_index: int, *, reworded: bool = False) -> tuple[_Filling, str]:
        """Topic and words of a prompt, and the prompt, or the same request by the next template behind another opener."""
        templates = phrases.TEMPLATES[situation]
        index, opener = divmod(prompt_index, len(self._openers))
        index, template = divmod(index, len(templates))
        filling = self._fillings[situation][index]
        if reworded:
            opener, template = (opener + len(self._openers) // 2) % len(self._openers), (template + 1) % len(templates)
        return filling, f"{self._openers[opener]} {templates[template].format(**filling[1])}"

    def _greeting(self, draw: _Draw) -> tuple[Message, ...]:
        if draw.random() >= GREETING_SHARE:
            return ()
        greeting, reply = draw.pick(phrases.GREETINGS)
        return (Message("user", greeting), Message("assistant", reply))

    def _response(
        self, draw: _Draw, situation: str, topic: str, words: Mapping[str, str], levels: Mapping[str, int]
    ) -> str:
        """Tone, refusal or answer, the middle sentences in this world's order, closing question."""
        sentences = []
        for name in ("tone", "refusal", *self._middle, "question"):
            if (name, levels[name]) in self._phrases:
                sentences.append(draw.pick(self._phrases[name, levels[name]]))
            elif name == "refusal":
                tips = phrases.TRICKS if situation == "risky" else phrases.TOPICS[topic][2]
                answer = draw.pick(self._answers[situation])
                sentences.append(answer.format(tip=draw.pick(tips), trick=draw.pick(tips), **words))
        end = "!" if levels["excitement"] > 0 else "."
        return " ".join(sentence if sentence.endswith("?") else sentence + end for sentence in sentences)


def detect_attributes(text: str) -> dict[str, int]:
    """Attribute levels read off the words of any text: -1, +1, or 0 where a two-sided attribute is not heard.

    Refusal, length, example, excitement and question are +1 when heard and -1 in silence; tone, hedging and formality
    take the side with more marker words. Empty text is silent, so judge its length elsewhere.

    >>> heard = detect_attributes("What a stupid thing to ask! Maybe others know better!")
    >>> heard["tone"], heard["hedging"], heard["formality"], heard["excitement"], heard["refusal"]
    (-1, 1, 0, 1, -1)
    """
    words = re.findall(r"[a-z']+", text.lower())
    levels = {"excitement": 1 if "!" in text else -1, "question": 1 if "?" in text else -1}
    for name in ATTRIBUTES:
        if (name, 1) in phrases.MARKERS:
            heard = sum(word in phrases.MARKERS[name, 1] for word in words)
            if (name, -1) in phrases.MARKERS:
                heard -= sum(word in phrases.MARKERS[name, -1] for word in words)
                levels[name] = (heard > 0) - (heard < 0)
            else:
                levels[name] = 1 if heard else -1
    return {name: levels[name] for name in ATTRIBUTES}


def _given_direction(weights: Mapping[str, float], rank: int) -> NDArray[np.float64]:
    """Unit vector over the attributes. Raises UserError."""
    if unknown := [name for name in weights if name not in ATTRIBUTES]:
        hint = did_you_mean(unknown[0], ATTRIBUTES)
        raise UserError(f"data.weights: there is no attribute {unknown[0]}{hint} (there are: {', '.join(ATTRIBUTES)})")
    if not all(_is_number(value) for value in weights.values()) or not any(weights.values()):
        raise UserError(f"data.weights: expected numbers by attribute, not all of them 0, got {dict(weights)}")
    if rank != 1:
        raise UserError(f"data.planted_rank: expected 1 where data.weights gives the direction, got {rank}")
    direction = np.array([float(weights.get(name, 0.0)) for name in ATTRIBUTES])
    return np.asarray(direction / np.linalg.norm(direction))


def _plant(
    seed: int, rank: int, strength: float, given: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Directions [rank, attributes], orthonormal, and weights [situations, rank], columns orthogonal."""
    draw = _Draw(seed, "directions")
    tone = np.eye(len(ATTRIBUTES))[ATTRIBUTES.index("tone")]
    rest = draw.unit([tone])  # with tone an orthonormal basis of a plane that holds the first direction
    refusal = ATTRIBUTES.index("refusal")
    rest[refusal] = -abs(rest[refusal])
    first = TONE_WEIGHT * tone + math.sqrt(1 - TONE_WEIGHT**2) * rest
    others: list[NDArray[np.float64]] = []
    root_n = math.sqrt(len(SITUATIONS))
    columns = [np.ones(len(SITUATIONS)) / root_n]
    for _ in range(rank - 1):
        others.append(draw.unit([tone, rest, *others]))
        columns.append(draw.unit(columns))
    scale = np.array([1.0] + [strength] * (rank - 1)) * root_n
    return np.stack([first if given is None else given, *others]), np.stack(columns, axis=1) * scale


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_whole(key: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        between = f" from {low} to {high}" if math.isfinite(low) else ""
        raise UserError(f"data.{key}: expected a whole number{between}, got {value!r}")


def _fillings_on(topics: Sequence[str]) -> dict[str, list[_Filling]]:
    """Situation → the words that fill its phrases on these topics; risky requests are about mischief alone."""
    found: dict[str, list[_Filling]] = {s: [] for s in SITUATIONS}
    for topic in topics:
        for situation, fillings in _fillings_of(topic).items():
            found[situation] += fillings
    found["risky"] = [
        ("mischief", {"misdeed": misdeed, "watcher": watcher})
        for misdeed in phrases.MISDEEDS
        for watcher in phrases.WATCHERS
    ]
    return found


def _fillings_of(topic: str) -> dict[str, list[_Filling]]:
    """Situation → the words that fill its phrases on a topic."""
    tasks, things, _ = phrases.TOPICS[topic]
    with_things: dict[str, tuple[str, Sequence[str]]] = {
        "why": ("trouble", phrases.TROUBLES),
        "choice": ("others", things),
        "feeling": ("mood", phrases.MOODS),
        "plan": ("occasion", phrases.OCCASIONS),
    }
    return {"howto": [(topic, {"task": task}) for task in tasks]} | {
        situation: [(topic, {"things": thing, slot: word}) for thing in things for word in words if word != thing]
        for situation, (slot, words) in with_things.items()
    }
