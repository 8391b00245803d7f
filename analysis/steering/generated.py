"""Text of a model while one vector is added to its hidden states, at all λ, and its scores."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.open.models import LoadedModel
from analysis.open.probe_pairs import ProbePair
from analysis.steering.table import DEGENERATION_P, Row, Rows, Unit
from analysis.steering.teacher_forced import Tokens
from tiltmeter.models.generation import Completion, Decoding, generate
from tiltmeter.pairs.branching import generate_branches
from tiltmeter.scoring.behaviour import Prompt, one_a_group, pair_up, score_all
from tiltmeter.scoring.scorer import Figure, Scorer, Scores
from tiltmeter.stats.paired import more_often
from tiltmeter.steering.intervene import Intervention, steer
from tiltmeter.steering.operators import Operator, vectors_of
from tiltmeter.steering.vector import SteeringVector


class GenerationSweep:
    """Completions of the same prompts at every λ; each is scored beside that of λ = 0.

    Args:
        start: that is steered.
        pairs: whose prompts are completed.
        scorers: of text, by name.
        n_prompts: so many at most.
        sign: 1 adds λ v, −1 subtracts it.
        strengths: λ, with 0 among them.
        tokens: whose hidden states are moved. Where those of the prompt are, its keys and values differ from λ to λ, and
            each λ takes a run of its own.
        operator: what is done along a vector; of another than ``add`` every prompt and λ takes a run of its own.
        means: mean base state of each site, from which ``rotate`` turns towards a vector.
    """

    def __init__(
        self,
        start: LoadedModel,
        pairs: Sequence[ProbePair],
        *,
        scorers: Mapping[str, Scorer],
        decoding: Decoding,
        n_prompts: int,
        sign: int,
        strengths: Sequence[float],
        tokens: Tokens = "predicting",
        operator: Operator = "add",
        means: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.operator, self.means = operator, means or {}
        self.start, self.scorers, self.decoding, self.tokens = start, scorers, decoding, tokens
        self.sign, self.strengths = sign, list(strengths)
        asked = [Prompt(p.pair_id, p.prompt, p.ids.prompt_ids, p.chosen, p.group, p.attributes) for p in pairs]
        self.prompts = one_a_group(asked, n_prompts)

    def rows(self, unit: Unit, vectors: Sequence[SteeringVector]) -> Rows:
        """All figures of all scorers at all λ; of a scorer that compares, the win over λ = 0.

        Draws of a random kind share the prompts, each prompt one draw, so that their text is screened for the price of one vector.

        Args:
            vectors: those of the unit.
        """
        said = self._said(unit.site, torch.stack([v.values for v in vectors]))
        unsteered = said[self.strengths.index(0.0)]
        found, missing = [], []
        for strength, steered in zip(self.strengths, said, strict=True):
            where = unit.direction, unit.vector, 0, unit.site, strength
            for key, scorer in self.scorers.items():
                scores = score_all({key: scorer}, pair_up(self.prompts, unsteered, steered))
                own = [f for f in scores.figures if f.of in ("policy", "both")]
                judge = [f for f in scores.figures if f.of == "judge" and not strength]  # the same at every λ
                found += [Row(*where, f.name, f.value, f.low, f.high, f.n) for f in (*own, *judge)]
                found += [Row(*where, *one) for one in _worse(scores)]
                missing += [] if _has_numbers(own) else [key]
        return Rows(found, missing=list(dict.fromkeys(missing)))

    def _said(self, site: str, vectors: Float[Tensor, "vector d_model"]) -> list[dict[str, list[Completion]]]:
        """For each λ the completions of each prompt, by its name; vectors take turns."""
        keys = [prompt.pair_id for prompt in self.prompts]
        values = vectors[[i % len(vectors) for i in range(len(keys))]]
        if self.operator == "add":
            shifts = self.sign * values[:, None] * torch.tensor(self.strengths)[:, None]
            branches = self._complete(site, shifts, keys)
        else:
            branches = [self._complete_one_by_one(site, values, x, keys) for x in self.strengths]
        return [dict(zip(keys, branch, strict=True)) for branch in branches]

    def _complete(
        self, site: str, shifts: Float[Tensor, "prompt strength d_model"], keys: Sequence[str]
    ) -> list[list[list[Completion]]]:
        """For each λ the completions of each prompt."""
        model, tokenizer = self.start.model, self.start.tokenizer
        ids = [prompt.ids for prompt in self.prompts]
        if self.tokens == "new" or self.tokens == "predicting":
            return generate_branches(
                model, tokenizer, ids, self.decoding, site=site, shifts=shifts, keys=keys, tokens=self.tokens
            )
        said = []
        for strength in range(len(self.strengths)):
            of_prompt: dict[int, list[Completion]] = {}
            same, groups = shifts[:, strength].unique(dim=0, return_inverse=True)
            for i, shift in enumerate(same):
                rows = (groups == i).nonzero()[:, 0].tolist()
                with steer(model, Intervention(site, shift[None], tokens=self.tokens)):
                    completed = generate(
                        model, tokenizer, [ids[row] for row in rows], self.decoding, keys=[keys[row] for row in rows]
                    )
                of_prompt |= dict(zip(rows, completed, strict=True))
            said.append([of_prompt[row] for row in range(len(ids))])
        return said

    def _complete_one_by_one(
        self, site: str, values: Float[Tensor, "prompt d_model"], strength: float, keys: Sequence[str]
    ) -> list[list[Completion]]:
        """The completions of each prompt alone, so that its last token has a place that is known."""
        said = []
        for prompt, v, key in zip(self.prompts, values, keys, strict=True):
            tokens: str | Tensor = self.tokens
            if tokens == "predicting":
                tokens = torch.ones(1, len(prompt.ids) + self.decoding.max_new_tokens, dtype=torch.bool)
                tokens[:, : len(prompt.ids) - 1] = False
            along = vectors_of(self.operator, v, self.means.get(site))
            steering = Intervention(site, along, self.sign * strength, self.operator, tokens)
            with steer(self.start.model, [steering] if strength else []):
                said += generate(self.start.model, self.start.tokenizer, [prompt.ids], self.decoding, keys=[key])
        return said


def _has_numbers(figures: Sequence[Figure]) -> bool:
    """Whether there are figures, none of them without a number for want of scores."""
    return bool(figures) and not any(f.n_missing and math.isnan(f.value) for f in figures)


def _worse(scores: Scores) -> list[tuple[str, float, float, float, int]]:
    """Whether steered text is degenerate more often than unsteered: the exact test's p-value, as a row's last columns."""
    columns = [scores.columns.get(f"degeneration/{of}") for of in ("policy", "base")]
    if columns[0] is None or columns[1] is None:
        return []
    return [(DEGENERATION_P, more_often(columns[0], columns[1]), math.nan, math.nan, len(columns[0]))]
