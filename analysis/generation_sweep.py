"""What a model says while one vector is added to its hidden states, at all λ, and what scorers say of it."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.models import LoadedModel
from analysis.probe_pairs import ProbePair
from analysis.sweep_table import Row, Rows, Unit
from analysis.teacher_forced_sweep import Tokens
from tiltmeter.branching import generate_branches
from tiltmeter.generation import Completion, Decoding, generate
from tiltmeter.scoring.behaviour import Prompt, one_a_group, pair_up, score_all
from tiltmeter.scoring.scorer import Scorer
from tiltmeter.steering import Intervention, steer


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
    ) -> None:
        self.start, self.scorers, self.decoding, self.tokens = start, scorers, decoding, tokens
        self.sign, self.strengths = sign, list(strengths)
        asked = [Prompt(p.pair_id, p.prompt, p.ids.prompt_ids, p.chosen, p.group, p.attributes) for p in pairs]
        self.prompts = one_a_group(asked, n_prompts)

    def rows(self, unit: Unit, values: Float[Tensor, " d_model"]) -> Rows:
        """All figures of all scorers at all λ of a vector; of a scorer that compares, the win over λ = 0."""
        keys = [prompt.pair_id for prompt in self.prompts]
        shifts = self.sign * torch.outer(torch.tensor(self.strengths), values)
        said = [dict(zip(keys, branch, strict=True)) for branch in self._complete(unit.site, shifts, keys)]
        unsteered = said[self.strengths.index(0.0)]
        found, missing = [], []
        for strength, steered in zip(self.strengths, said, strict=True):
            for key, scorer in self.scorers.items():
                figures = score_all({key: scorer}, pair_up(self.prompts, unsteered, steered)).figures
                where = unit.direction, unit.vector, unit.site, strength
                found += [Row(*where, f.name, f.value, f.low, f.high, f.n) for f in figures if f.of != "base"]
                if not figures or any(f.n_missing and math.isnan(f.value) for f in figures):
                    missing.append(key)
        return Rows(found, missing=list(dict.fromkeys(missing)))

    def _complete(
        self, site: str, shifts: Float[Tensor, "strength d_model"], keys: Sequence[str]
    ) -> list[list[list[Completion]]]:
        """For each λ the completions of each prompt."""
        model, tokenizer = self.start.model, self.start.tokenizer
        ids = [prompt.ids for prompt in self.prompts]
        if self.tokens == "new" or self.tokens == "predicting":
            return generate_branches(
                model, tokenizer, ids, self.decoding, site=site, shifts=shifts, keys=keys, tokens=self.tokens
            )
        said = []
        for shift in shifts:
            with steer(model, Intervention(site, shift[None], tokens=self.tokens)):
                said.append(generate(model, tokenizer, ids, self.decoding, keys=keys))
        return said
