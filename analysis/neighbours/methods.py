"""One table of methods: the preference, behaviour and utility that each gains or loses, how far from the base, and its cost.

Of test prompts: v*, the bias and the prompt are chosen on the others. Given responses first, by one pass of each model; then what
each method says by itself, for judges.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from analysis.belief.judged import judges_of
from analysis.belief.shifted_prompts import Writer, writer_of
from analysis.contract import Cost
from analysis.controls.c15_random_vectors import interpolate
from analysis.neighbours.lines import BASE, Line, Source, Sums, mean_change, measure
from analysis.neighbours.trained import n_changed, n_in_adapter, name_of
from analysis.open.checkpoints import Checkpoints, check_same_base, checkpoints_of_run, start_scorers
from analysis.open.models import LoadedModel
from analysis.open.pair_log_probs import losses_of, tokens_of_pairs
from analysis.open.probe_pairs import ProbePair
from analysis.open.runs import ADAPTER_FOLDER, Run, is_finished, minutes_of, open_run
from analysis.steering.directions import States, split_by_prompt, v_star
from analysis.steering.sweep import check_options
from analysis.steering.unrelated_prompts import unrelated_ids
from tiltmeter.errors import Unsupported, UserError
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.models.generation import Completion, Decoding, generate
from tiltmeter.models.guidance import Guide
from tiltmeter.models.layers import FINAL_POST_NORM
from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.scoring.behaviour import Completions, Prompt, pair_up, score_all
from tiltmeter.scoring.depth import ratio_of_sums
from tiltmeter.scoring.scorer import Scorer
from tiltmeter.stats.jackknife import NO_INTERVAL, Interval
from tiltmeter.stats.proportions import share_interval
from tiltmeter.steering.intervene import Intervention, steer

NAME = "neighbours"
DPO, CFGRL, LINEAR, PROMPT = "dpo", "cfgrl", "linear_alignment", "prompt"
VECTOR, BIAS, BEST_OF = "v_star", "logit_bias", "best_of_n"
PRINCIPLES = (
    "Be kind, honest and helpful.",
    "Answer politely, and never help with anything harmful.",
    "Answer as a thoughtful person would who wants the best for everybody.",
    "Give the better one of two possible answers.",
)
NOT_GIVEN = {
    "lora": "adapter=lora",
    "constant_vector": "experiment=constant_vector, or arm=constant_vector",
    "bipo": "experiment=tiny_bipo, or arm=bipo",
    "fsrl": "experiment=tiny_fsrl",
}
"""Methods that are trained → how; they are rows where their runs are given."""
GUIDED_AT = 2.0
"""Weight with which guided models speak; at 1 they are the aligned model, or the prompt alone."""


class Neighbours:
    """Options of the table of methods.

    Args:
        runs: folders of further runs of the same base (LoRA, one vector, another loss …), a row each.
        principles: system prompts; the best one on the estimation half is the row ``prompt``.
        weights: of guidance by the aligned model and by the prompt.
        lambdas: of v* and of the bias.
        best_of: completions of which the one with the highest implicit reward is taken; 0: not asked.
        n_prompts: of each half, at most; null: all.
        scorers: judges of what each method says; without one the oracle of a synthetic world; with neither nothing is said.
        decoding: of what they say; null: greedy, 96 tokens.
        neutral: file of neutral texts; null: plain sentences of ours.
        chat_date: the day that a chat template prints.
        seed: of the halves, and of the completions of best-of-n.
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        runs: Sequence[str] = (),
        principles: Sequence[str] = PRINCIPLES,
        weights: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
        lambdas: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0),
        best_of: int = 8,
        n_prompts: int | None = 64,
        scorers: Mapping[str, Scorer | None] | None = None,
        decoding: Decoding | None = None,
        neutral: str | None = None,
        chat_date: str | None = None,
        seed: int = 0,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        least = {
            "best_of": (best_of, 0),
            "n_prompts": (n_prompts, 4),
            "seed": (seed, 0),
            "principles": (len(principles), 1),
        }
        check_options(NAME, least, {"dtype": (dtype, DTYPES)})
        for name, values in (("weights", weights), ("lambdas", lambdas)):
            if not values or min(values) <= 0:
                raise UserError(f"{NAME}.{name}: expected numbers above 0, got {list(values)}")
        self.runs, self.principles = [open_run(Path(folder)) for folder in runs], list(principles)
        self.weights, self.lambdas = sorted({1.0, *weights}), sorted({1.0, *lambdas})
        self.best_of, self.n_prompts, self.seed = best_of, n_prompts, seed
        self.scorers = {name: scorer for name, scorer in (scorers or {}).items() if scorer is not None}
        self.decoding, self.neutral, self.chat_date = decoding or Decoding(), neutral, chat_date
        self.dtype, self.device = dtype, device

    def start(self, checkpoints: Checkpoints) -> None:
        """Load or reach the judges. Raises UserError."""
        start_scorers(judges_of(self.scorers, checkpoints).values(), checkpoints)

    def costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """Passes over pairs, and tokens that methods say."""
        test = split_by_prompt(checkpoints.pairs, seed=self.seed).test[: self.n_prompts]
        n_models = 2 + len(self.principles) + len(self.runs)
        costs = [
            Cost("teacher-forced, at most", 2.0 * n_models, 2 * n_models * sum(pair.n_row_tokens for pair in test))
        ]
        if judges_of(self.scorers, checkpoints):
            said = (7 + len(self.runs) + self.best_of) * len(test) * self.decoding.max_new_tokens
            costs.append(Cost("completions, at most", 2.0 * self.decoding.max_new_tokens, said))
        return costs

    @torch.no_grad()
    def table(self, checkpoints: Checkpoints) -> tuple[pd.DataFrame, pd.DataFrame]:
        """``methods``: a row for each method and strength; ``methods_prompts``: every principle on the estimation half.

        Raises:
            UserError: a run of another base, too few prompts, or models that don't differ.
        """
        asked = _Asked(self, checkpoints)
        lines = asked.lines()
        sums, neutral = measure(lines, asked.sources), measure(lines, asked.neutral_sources)
        judged = _Judged(asked, judges_of(self.scorers, checkpoints)).figures()
        rows = [_row(i, lines, sums, neutral, asked, judged) for i in range(len(lines)) if lines[i].method != BASE]
        if BEST_OF in judged:
            rows.append({"method": BEST_OF, "strength": float(self.best_of), **judged[BEST_OF], **asked.cost(BEST_OF)})
        rows += [{"method": name, "missing": why} for name, why in asked.missing.items()]
        table = pd.DataFrame(rows)
        return table.assign(**_at_equal_kl(table, lines, sums)), asked.prompts


class _Asked:
    """Pairs of both halves, and every method, made on the estimation half."""

    def __init__(self, options: Neighbours, checkpoints: Checkpoints) -> None:
        self.options, self.checkpoints = options, checkpoints
        halves = split_by_prompt(checkpoints.pairs, seed=options.seed)
        self.estimation, self.test = halves.estimation[: options.n_prompts], halves.test[: options.n_prompts]
        self.missing = {
            name: f"no run of it was given ({NAME}.runs=[FOLDER]; train it with {how})"
            for name, how in NOT_GIVEN.items()
        }
        self.others: dict[str, LoadedModel] = {}
        self.n_trained: dict[str, int] = {}
        self.minutes: dict[str, float] = {}
        if checkpoints.sources is not None and is_finished(own := Path(checkpoints.sources[1]).parent):
            self.minutes[DPO] = minutes_of(own)
        for run in options.runs:
            self._add(run)
        self.writer = self._writer()

    def _add(self, run: Run) -> None:
        """Open another run of the same base. Raises UserError: it is of another."""
        opened = checkpoints_of_run(run, dtype=self.options.dtype, device=self.options.device)
        check_same_base(f"{NAME}.runs", run, self.checkpoints, opened)
        name = name_of(run)
        name = name if name not in self.others else f"{name} ({run.folder.name})"
        self.others[name] = opened.aligned
        self.n_trained[name] = n_in_adapter(run.folder / ADAPTER_FOLDER) or n_changed(opened.base, opened.aligned)
        self.minutes[name] = minutes_of(run.folder)
        self.missing.pop(name, None)

    def _writer(self) -> Writer | None:
        """Prompts behind principles; None where they can't be written as they were trained."""
        try:
            pairs = [*self.estimation, *self.test]
            return writer_of(self.checkpoints.base, pairs, chat_date=self.options.chat_date)
        except Unsupported as error:
            self.missing |= {name: str(error) for name in (PROMPT, LINEAR)}
            return None

    def _behind(self, principle: str, pairs: Sequence[ProbePair]) -> list[ProbePair]:
        """Pairs behind a principle, those of which it can be asked."""
        if self.writer is None:
            return []
        wanted = {pair.pair_id for pair in pairs}
        prompts = {p.pair_id: f"\n\nSystem: {principle}{p.prompt}" for p in self.writer.pairs if p.pair_id in wanted}
        return self.writer.with_prompts(prompts)

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """Change of the preference odds by each principle, of the estimation half."""
        rows = []
        for principle in self.options.principles if self.writer is not None else ():
            pairs = self._behind(principle, self.estimation)
            own = {pair.pair_id: pair for pair in self.estimation}
            sources = {BASE: self._source([own[p.pair_id] for p in pairs]), PROMPT: self._source(pairs)}
            odds = measure([Line(BASE, 0.0), Line(PROMPT, 1.0, PROMPT)], sources).odds
            gained = _mean(odds[1] - odds[0], [pair.group for pair in pairs])
            rows.append({"principle": principle, **gained.named("preference_gained"), "n": len(pairs)})
        return pd.DataFrame(rows)

    @cached_property
    def behind_best(self) -> list[ProbePair]:
        """The test pairs behind the principle that did most on the others; none where principles can't be asked."""
        if not len(self.prompts):
            return []
        return self._behind(str(self.prompts.loc[self.prompts["preference_gained"].idxmax(), "principle"]), self.test)

    @cached_property
    def pairs(self) -> list[ProbePair]:
        """The test pairs, those of which every method can be asked."""
        ids = {pair.pair_id for pair in self.behind_best}
        return [pair for pair in self.test if pair.pair_id in ids] if ids else list(self.test)

    @property
    def groups(self) -> list[str]:
        """Prompt of each pair."""
        return [pair.group for pair in self.pairs]

    def _source(self, pairs: Sequence[ProbePair], opened: LoadedModel | None = None) -> Source:
        return Source(opened or self.checkpoints.base, [pair.ids for pair in pairs])

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Every model behind its prompts."""
        found = {BASE: self._source(self.pairs), DPO: self._source(self.pairs, self.checkpoints.aligned)}
        found |= {name: self._source(self.pairs, opened) for name, opened in self.others.items()}
        return found | ({PROMPT: self._source(self.behind_best)} if self.behind_best else {})

    @cached_property
    def neutral_sources(self) -> dict[str, Source]:
        """The same models on neutral text, which answers no prompt: of methods by a prompt nothing is told there."""
        texts = [
            ids
            for ids in unrelated_ids(self.checkpoints.base, self.options.neutral, key=f"{NAME}.neutral")
            if len(ids) > 1
        ]
        pairs = [TokenizedPair(ids[:1], ids[1:], ids[:1]) for ids in texts]
        return {name: source._replace(pairs=pairs) for name, source in self.sources.items()}

    def lines(self) -> list[Line]:
        """Every method at every strength, the base first."""
        estimation = self._source(self.estimation), self._source(self.estimation, self.checkpoints.aligned)
        states = States(self.checkpoints, self.estimation, [FINAL_POST_NORM], position="prompt_last")
        self.vector = v_star(states, FINAL_POST_NORM).float()
        self.bias = mean_change(dict(zip((BASE, DPO), estimation, strict=True)), DPO)
        found = [Line(BASE, 0.0, BASE), Line(DPO, 1.0, DPO), *(Line(name, 1.0, name) for name in self.others)]
        found += [Line(VECTOR, x, state=self.vector) for x in self.options.lambdas]
        found += [Line(BIAS, x, logits=self.bias) for x in self.options.lambdas]
        found += [Line(CFGRL, w, DPO) for w in self.options.weights if w != 1]
        if self.behind_best:
            found += [Line(PROMPT if w == 1 else LINEAR, w, PROMPT) for w in self.options.weights]
        return found

    def cost(self, method: str) -> dict[str, float]:
        """Numbers that were fitted, minutes that a run of it took, and passes that a token takes."""
        trained = self.n_trained.get(DPO) or self.n_trained.setdefault(
            DPO, n_changed(self.checkpoints.base, self.checkpoints.aligned)
        )
        fitted = {
            VECTOR: len(self.vector),
            BIAS: len(self.bias),
            PROMPT: 0,
            LINEAR: 0,
            CFGRL: trained,
            BEST_OF: trained,
        }
        passes = {CFGRL: 2, LINEAR: 2, BEST_OF: self.options.best_of + 2}
        return {
            "parameters": fitted.get(method, self.n_trained.get(method, 0)),
            "minutes": self.minutes.get(method, math.nan),
            "passes": passes.get(method, 1),
        }


class _Judged:
    """Completions of every method, and judges' figures of them against the base's."""

    def __init__(self, asked: _Asked, judges: Mapping[str, Scorer]) -> None:
        self.asked, self.judges, self.options = asked, judges, asked.options
        self.prompts = [
            Prompt(p.pair_id, p.prompt, p.ids.prompt_ids, p.chosen, p.group, p.attributes) for p in asked.pairs
        ]
        self.base, self.aligned = asked.checkpoints.base, asked.checkpoints.aligned

    def figures(self) -> dict[str, dict[str, float]]:
        """Method → its win rate over the base; none without a judge."""
        if not self.judges:
            return {}
        base, found = self._say(), {}
        for method, say in self._speakers().items():
            said = score_all(self.judges, pair_up(self.prompts, base, say())).figures
            rate = next((f for f in said if f.of == "both" and f.name.endswith(("preference_rate", "win_rate"))), None)
            if rate is not None:
                found[method] = Interval(rate.value, rate.low, rate.high).named("behaviour")
        return found

    def _speakers(self) -> dict[str, Callable[[], Completions]]:
        found: dict[str, Callable[[], Completions]] = {DPO: partial(self._say, self.aligned)}
        found |= {name: partial(self._say, opened) for name, opened in self.asked.others.items()}
        found |= {VECTOR: self._steered, CFGRL: partial(self._say, guide=Guide(self.aligned.model, GUIDED_AT))}
        if behind := [pair.ids.prompt_ids for pair in self.asked.behind_best]:
            found[PROMPT] = partial(self._say, prompts=behind)
            found[LINEAR] = partial(self._say, guide=Guide(self.base.model, GUIDED_AT, behind))
        if self.options.best_of > 1:
            found[BEST_OF] = self._best_of
        return found

    def _say(
        self,
        opened: LoadedModel | None = None,
        *,
        prompts: Sequence[Sequence[int]] | None = None,
        guide: Guide | None = None,
        decoding: Decoding | None = None,
    ) -> Completions:
        """Completions with the same random numbers for every method."""
        of, keys = opened or self.base, [prompt.pair_id for prompt in self.prompts]
        ids = [prompt.ids for prompt in self.prompts] if prompts is None else prompts
        said = generate(of.model, of.tokenizer, ids, decoding or self.options.decoding, keys=keys, guide=guide)
        return dict(zip(keys, said, strict=True))

    def _steered(self) -> Completions:
        vector = self.asked.vector.to(self.base.model.device)[None]
        with steer(self.base.model, [Intervention(FINAL_POST_NORM, vector)]):
            return self._say()

    def _best_of(self) -> Completions:
        """The completion of the base, out of n, with the highest implicit reward log π / π₀."""
        how = Decoding(
            max_new_tokens=self.options.decoding.max_new_tokens,
            temperature=1.0,
            n_samples=self.options.best_of,
            seed=self.options.seed,
            stop=self.options.decoding.stop,
        )
        said = self._say(decoding=how)
        drawn = [(prompt, one) for prompt in self.prompts for one in said[prompt.pair_id] if one.ids]
        pairs = [TokenizedPair(prompt.ids, one.ids, one.ids[:1]) for prompt, one in drawn]
        base, aligned = (
            [float(of.chosen.sum()) for of in tokens_of_pairs(opened, pairs)] for opened in (self.base, self.aligned)
        )
        best: dict[str, tuple[float, Completion]] = {}
        for (prompt, one), before, after in zip(drawn, base, aligned, strict=True):
            best[prompt.pair_id] = max(
                best.get(prompt.pair_id, (-math.inf, one)), (after - before, one), key=lambda x: x[0]
            )
        return {name: [best[name][1]] if name in best else ones[:1] for name, ones in said.items()}


def _row(
    i: int, lines: Sequence[Line], sums: Sums, neutral: Sums, asked: _Asked, judged: Mapping[str, Mapping[str, float]]
) -> dict[str, object]:
    """A method at a strength, in the report's table."""
    line, groups = lines[i], asked.groups
    gained, of_dpo = sums.odds[i] - sums.odds[0], sums.odds[1] - sums.odds[0]
    n_tokens = torch.tensor([float(len(pair.ids.chosen_ids)) for pair in asked.pairs], dtype=torch.float64)
    texts = asked.neutral_sources[BASE].pairs
    n_neutral = [float(len(pair.chosen_ids)) for pair in texts]
    names = [str(k) for k in range(len(texts))]
    has_changed = _mean(of_dpo, groups)
    share = (
        ratio_of_sums(gained.tolist(), of_dpo.tolist(), groups)
        if has_changed.low > 0 or has_changed.high < 0
        else NO_INTERVAL
    )
    lost = -(sums.log_probs[i, :, 0] - sums.log_probs[0, :, 0])
    lost_neutral = -(neutral.log_probs[i, :, 0] - neutral.log_probs[0, :, 0])
    on_neutral = NO_INTERVAL if line.source == PROMPT else ratio_of_sums(lost_neutral.tolist(), n_neutral, names)
    ids = [pair.ids for pair in asked.pairs]
    losses = losses_of(asked.checkpoints.loss, sums.log_probs[i][None], sums.log_probs[0], ids)[0]
    speaks_at = {CFGRL: GUIDED_AT, LINEAR: GUIDED_AT}.get(line.method, 1.0)
    return {
        "method": line.method,
        "strength": line.strength,
        **_mean(gained, groups).named("preference_gained"),
        **share.named("share_of_dpo"),
        **_mean(losses, groups).named("preference_loss"),
        **share_interval([float(x > 0) for x in gained.tolist()], groups).named("accuracy"),
        **ratio_of_sums(sums.kl[i].tolist(), n_tokens.tolist(), groups).named("kl"),
        **ratio_of_sums(lost.tolist(), n_tokens.tolist(), groups).named("loss_chosen"),
        **on_neutral.named("loss_neutral"),
        **(judged.get(line.method, {}) if line.strength == speaks_at else {}),
        **asked.cost(line.method),
        "n": len(groups),
    }


def _at_equal_kl(table: pd.DataFrame, lines: Sequence[Line], sums: Sums) -> dict[str, list[float]]:
    """Preference that each method gains where it is as far from the base as dpo, straight between strengths over √KL."""
    gained, kl = (sums.odds - sums.odds[0]).mean(1), sums.kl.sum(1).clamp(min=0).sqrt()
    found: dict[str, float] = {}
    for family in ((CFGRL, DPO), (LINEAR, PROMPT), (VECTOR,), (BIAS,)):
        at = sorted((i for i, line in enumerate(lines) if line.method in family), key=lambda i: lines[i].strength)
        if at:
            x, y = (torch.cat([values.new_zeros(1), values[at]])[None] for values in (kl, gained))
            found |= dict.fromkeys(family, float(interpolate(x, y, kl[1:2])[0]))
    found[DPO] = float(gained[1])
    return {"gained_at_equal_kl": [found.get(method, math.nan) for method in table["method"]]}


def _mean(values: Tensor, groups: Sequence[str]) -> Interval:
    return ratio_of_sums(values.tolist(), [1.0] * len(groups), groups)
