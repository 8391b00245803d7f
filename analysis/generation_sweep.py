"""What a model says while one vector is added to every new token, at all λ, and what scorers say of it."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.models import LoadedModel
from analysis.probe_pairs import ProbePair
from analysis.sweep_table import Row, Unit
from tiltmeter.branching import generate_branches
from tiltmeter.generation import Decoding
from tiltmeter.scoring.behaviour import Prompt, one_a_group, pair_up, score_all
from tiltmeter.scoring.scorer import Scorer


class GenerationSweep:
    """Completions of the same prompts at every λ; each is scored beside that of λ = 0.

    Args:
        start: that is steered.
        pairs: whose prompts are completed.
        scorers: of text, by name.
        n_prompts: so many at most.
        sign: 1 adds λ v, −1 subtracts it.
        strengths: λ, with 0 among them.
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
    ) -> None:
        self.start, self.scorers, self.decoding = start, scorers, decoding
        self.sign, self.strengths = sign, list(strengths)
        asked = [Prompt(p.pair_id, p.prompt, p.ids.prompt_ids, p.chosen, p.group, p.attributes) for p in pairs]
        self.prompts = one_a_group(asked, n_prompts)

    def rows(self, unit: Unit, values: Float[Tensor, " d_model"]) -> list[Row]:
        """All figures of all scorers at all λ of a vector; of a scorer that compares, the win over λ = 0."""
        keys = [prompt.pair_id for prompt in self.prompts]
        branches = generate_branches(
            self.start.model,
            self.start.tokenizer,
            [prompt.ids for prompt in self.prompts],
            self.decoding,
            site=unit.site,
            shifts=self.sign * torch.outer(torch.tensor(self.strengths), values),
            keys=keys,
        )
        said = [dict(zip(keys, branch, strict=True)) for branch in branches]
        unsteered = said[self.strengths.index(0.0)]
        found = []
        for strength, steered in zip(self.strengths, said, strict=True):
            scores = score_all(self.scorers, pair_up(self.prompts, unsteered, steered))
            where = unit.direction, unit.vector, unit.site, strength
            found += [Row(*where, f.name, f.value, f.low, f.high, f.n) for f in scores.figures if f.of != "base"]
        return found
