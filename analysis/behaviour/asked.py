"""Score what two checkpoints say and know, with any scorers: a finished run again, or any pair of checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from analysis.figures.preferences import kl_of_samples, preference_figures, probe_accuracies
from analysis.open.checkpoints import Checkpoints, prompts_of_file, start_scorers
from analysis.open.models import LoadedModel
from analysis.report.costs import Cost
from datamodules.oracle import PlantedOracle
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.models.generation import Decoding
from tiltmeter.models.layers import FINAL_PRE_NORM
from tiltmeter.scoring.behaviour import Completions, Prompt, complete, one_a_group, pair_up, score_all
from tiltmeter.scoring.scorer import Sample, Scorer, Scores
from tiltmeter.scoring.truthfulqa import TruthfulQA


@dataclass(frozen=True)
class Answers:
    """What both models said, and every figure of it.

    Args:
        beta: that reward margins were scaled by.
        silent: scorers that gave no figure: nothing to score, or a failure that was warned of.
    """

    samples: list[Sample]
    scores: Scores
    decoding: Decoding
    beta: float
    silent: Sequence[str] = ()


class Behaviour:
    """Both checkpoints complete the same prompts; every scorer named here scores them.

    Args:
        scorers: of generated text, by name; null leaves one out.
        decoding: null: greedy, 96 tokens.
        n_prompts: the first so many; null: all.
        prompts: file of prompts to complete instead of the pairs' own, such as RealToxicityPrompts; null: the pairs'.
        truthfulqa: questions to score both models on; null: none.
        beta: scale of implicit rewards (DPO's β); null: that of the run, 0.1 for other checkpoints.
        probe_sites: where a logistic probe looks for the preference: a site, several, or ``all``; empty: nowhere.
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        scorers: Mapping[str, Scorer | None],
        decoding: Decoding | None = None,
        n_prompts: int | None = 128,
        prompts: str | None = None,
        truthfulqa: TruthfulQA | None = None,
        beta: float | None = None,
        probe_sites: str | Sequence[str] = FINAL_PRE_NORM,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        if n_prompts is not None and n_prompts < 1:
            raise UserError(f"behaviour.n_prompts: expected at least 1 or null, got {n_prompts}")
        if beta is not None and beta <= 0:
            raise UserError(f"behaviour.beta: expected above 0 or null, got {beta}")
        if dtype not in DTYPES:
            raise UserError(f"behaviour.dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
        self.scorers = {name: scorer for name, scorer in scorers.items() if scorer is not None}
        self.decoding, self.n_prompts, self.truthfulqa = decoding or Decoding(), n_prompts, truthfulqa
        self.prompts = prompts
        self.beta, self.probe_sites = beta, probe_sites
        self.dtype, self.device = dtype, device

    def start(self, checkpoints: Checkpoints) -> None:
        """Load or reach what scorers need, before anything is generated. Raises UserError."""
        if self.prompts is not None and any(isinstance(scorer, PlantedOracle) for scorer in self.scorers.values()):
            raise UserError(
                "behaviour.prompts: the planted oracle judges prompts of its own world alone; choose another judge"
            )
        start_scorers(self.scorers.values(), checkpoints)
        if self.truthfulqa is not None:
            self.truthfulqa.start()

    def score(self, checkpoints: Checkpoints) -> Answers:
        """Generate and score; slow scorers are waited for."""
        prompts = self._prompts(checkpoints)
        samples = pair_up(
            prompts, *(self._complete(opened, prompts) for opened in (checkpoints.base, checkpoints.aligned))
        )
        scores, silent = Scores(), []
        for name, scorer in self.scorers.items():
            found = score_all({name: scorer}, samples)
            scores.figures.extend(found.figures)
            scores.columns.update(found.columns)
            silent += [name] * (not found.figures)
        if self.truthfulqa is not None:
            for opened, side in ((checkpoints.base, "base"), (checkpoints.aligned, "policy")):
                known = self.truthfulqa.score(opened.model, opened.tokenizer, of=side)  # type: ignore[arg-type]
                scores.figures.extend(known.figures)
        beta = self.beta or checkpoints.beta
        scores.figures.extend(preference_figures(checkpoints, beta=beta))
        scores.figures.extend(kl_of_samples(checkpoints, prompts, samples, self.decoding))
        if self.probe_sites:
            scores.figures.extend(probe_accuracies(checkpoints, self.probe_sites))
        return Answers(samples, scores, self.decoding, beta, silent)

    def costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """Of the two models; what scorers, judges and TruthfulQA take comes on top."""
        prompts, n_samples, n_new = self._prompts(checkpoints), self.decoding.n_samples, self.decoding.max_new_tokens
        said = n_samples * sum(len(prompt.ids) + n_new for prompt in prompts)
        over_pairs = 4 if self.probe_sites else 2  # log-probs and the probe, by either model
        read = over_pairs * sum(pair.n_row_tokens for pair in checkpoints.pairs)
        return [
            Cost("completions, at most", float(2 * n_new), 2 * said),
            Cost("teacher-forced, at most", over_pairs + 4.0, read + 4 * said),  # each completion as two rows of a pair
        ]

    def _prompts(self, checkpoints: Checkpoints) -> list[Prompt]:
        if self.prompts is not None:
            return prompts_of_file(self.prompts, self.n_prompts, checkpoints.base)
        pairs = checkpoints.pairs
        prompts = [Prompt(p.pair_id, p.prompt, p.ids.prompt_ids, p.chosen, p.group, p.attributes) for p in pairs]
        return one_a_group(prompts, self.n_prompts)

    def _complete(self, opened: LoadedModel, prompts: Sequence[Prompt]) -> Completions:
        return complete(opened.model, opened.tokenizer, prompts, self.decoding)
