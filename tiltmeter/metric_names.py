"""Every metric that a run logs, declared once: its name, its unit, where it is read and what it says.

A name is ``family/variant``. A metric of hidden states has a value at every site: its name ends in ``/site`` or, read at another
position than usual, in ``/position/site``. ``<…>`` in a variant stands for what the run fills in.
``python -m tiltmeter.metric_names > docs/metrics.md`` writes the page of all metrics.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from itertools import product
from typing import NamedTuple

from tiltmeter.models.layers import is_site
from tiltmeter.states.positions import POSITIONS, Position

STEP_AXIS = "trainer/global_step"
"""Name of the optimizer step on W&B, over which metrics are drawn."""
STEPS_TAKEN, SCORED_STEP = "probe/steps_taken", "behaviour/of_steps_taken"
_USUAL: Position = "prompt_last"
_SHARE, _COSINE, _REWARD, _LENGTH = "share, 0 … 1", "cosine, −1 … 1", "β · nats", "activation units"
_SFT, _EXPERTS = "a supervised term (`sft_weight`)", "a mixture of experts"
_MIXED, _ORACLE = "several sources of pairs", "the planted oracle as judge"
_HELD = "a judge, `agreement_pairs` above 0"
_SPARSE, _STEERING = "the training of a sparse autoencoder", "steering by sparse features"
_JUDGE, _ASKED, _OFTEN, _QUESTIONS = "a judge", "the report", "several completions a prompt", "TruthfulQA"


class Metric(NamedTuple):
    """One quantity and the names that it is logged under."""

    family: str
    variants: tuple[str, ...]
    """Names behind the family; an empty one: there is none."""
    unit: str
    meaning: str
    position: Position | None = None
    """Position at which its hidden states are read if the name doesn't say; None: it is no metric of a site."""
    needs: str = ""
    """Condition under which a run with all callbacks logs it, in words; empty: every such run does."""
    summary: str = ""
    """Value that W&B's table of runs shows; empty: the last value."""
    label: str = ""
    """Name on axes and in rows of the report, ``<…>`` to be filled in; empty: it stands in tables alone."""
    is_hidden: bool = False
    """Whether W&B opens no panels for it, since it says again what others say."""

    @property
    def keys(self) -> list[str]:
        """Names, for metrics of a site without the site."""
        return [f"{self.family}/{variant}" if variant else self.family for variant in self.variants]


class Found(NamedTuple):
    """Meaning of a name."""

    metric: Metric
    key: str
    """The name without position and site."""
    site: str | None
    position: Position | None
    fields: Mapping[str, str]
    """Field → text in the place of its ``<…>``."""

    @property
    def label(self) -> str:
        """The metric's label, filled in."""
        return _FIELD.sub(lambda field: self.fields[field[1]].replace("_", " "), self.metric.label)


def matrix(of: str, variant: str = "raw") -> str:
    """Name of a matrix of hidden states under a control (:data:`tiltmeter.geometry.rows.VARIANTS`).

    >>> matrix("delta"), matrix("delta", "centred")
    ('delta', 'delta_centred')
    """
    return of if variant == "raw" else f"{of}_{variant}"


def _each(*parts: Iterable[str]) -> tuple[str, ...]:
    """Every way to put the parts behind each other."""
    return tuple(map("".join, product(*parts)))


def _of_both(*variants: str) -> tuple[str, ...]:
    """The policy's, and the base's beside each."""
    return _each(variants, ("", "/base"))


def _of_pairs(what: str, unit: str, meaning: str, summary: str = "", needs: str = "") -> Iterator[Metric]:
    for split, whose in (("train", "pairs of the step"), ("val", "held-out pairs")):
        yield Metric(
            split, (what,), unit, f"{meaning}; {whose}", needs=needs, summary=summary if split == "val" else ""
        )
        yield Metric(split, (f"{what}/<source>",), unit, f"{meaning}; {whose}, of one source", needs=_MIXED)


_RAW = ("base", "policy", "delta", "random_update")
MATRICES = (
    *(*_RAW, *(matrix(of, "centred") for of in _RAW)),
    *(matrix(of, variant) for of in _RAW[:3] for variant in ("unit_row", "outlier_dims_removed")),
)
WEIGHTS = ("energy", "singular")
"""Weights of directions in an entropy: σ² or σ."""


def _spectral(family: str, unit: str, meaning: str, *weights: str, is_hidden: bool = True) -> Metric:
    variants = _each(MATRICES, [f"/{each}" for each in weights] or [""])
    return Metric(family, variants, unit, meaning, _USUAL, is_hidden=is_hidden)


_said = partial(Metric, "behaviour")
_AGAINST, _SOURCES = ("", "_vs_chosen"), ("", "/<source>")
_RATES = _each(["<prefix>_win_rate"], _AGAINST)
_ENDS = ("", "_low", "_high")
METRICS: tuple[Metric, ...] = (
    *_of_pairs("loss", "nats", "Loss (SFT: per token)", "min,last"),
    *_of_pairs("rewards/chosen", _REWARD, "Implicit reward β · log(π/π₀) of the chosen response"),
    *_of_pairs("rewards/rejected", _REWARD, "Implicit reward of the rejected response"),
    *_of_pairs("rewards/margins", _REWARD, "Reward of the chosen response less that of the rejected one"),
    *_of_pairs("rewards/accuracies", _SHARE, "Pairs whose chosen response has the higher reward", "max,last"),
    *_of_pairs("logps/chosen", "nats", "Log-probability of the chosen response under the policy"),
    *_of_pairs("logps/rejected", "nats", "Log-probability of the rejected response under the policy"),
    *_of_pairs("sft_loss", "nats/token", "−log π of the chosen response per token, before its weight", needs=_SFT),
    *_of_pairs("router_loss", "1", "Load-balancing loss of the pair's micro-batch, before its weight", needs=_EXPERTS),
    Metric("train", ("gradient_norm",), "loss / weight", "Norm of the gradient before it is clipped"),
    Metric("train", ("learning_rate",), "1", "Learning rate of the step"),
    Metric("throughput", ("pairs_per_second",), "pairs/s", "Pairs trained on per second of training steps"),
    Metric("throughput", ("tokens_per_second",), "tokens/s", "Tokens trained on per second of training steps"),
    Metric("throughput", ("padding_share",), _SHARE, "Padding among the tokens that were computed"),
    Metric("throughput", ("saved_prompt_share",), _SHARE, "Tokens saved since both responses share their prompt"),
    Metric("projection", ("share_grown",), _SHARE, "Pairs whose projection onto v grew, at `final_post_norm`"),
    *(
        Metric(family, *rest, "diverge")
        for family, v in (("projection", "v"), ("projection_sequence", "v̄"))
        for rest in (
            (("base", "policy"), _LENGTH, f"Mean ⟨h, {v}⟩ / ‖{v}‖ in one model"),
            (_each(["delta"], _ENDS), _LENGTH, f"Change of ⟨h, {v}⟩ / ‖{v}‖, policy − base, with its 95 % interval"),
            (_each(["share_grown"], _ENDS), _SHARE, f"Pairs whose ⟨h, {v}⟩ grew, with its 95 % interval"),
        )
    ),
    Metric("hyperplane", ("share_preferred",), _SHARE, "Pairs on the preferred side of the base model’s hyperplane"),
    Metric("direction_cosine", ("token", "sequence"), _COSINE, "Mean cosine of v* with each pair’s v or v̄", "diverge"),
    Metric("shift_share", _RAW, _SHARE, "f: share of the matrix that is one constant row", _USUAL),
    Metric("shift_share", ("null_high",), _SHARE, "97.5 % quantile of f under sign flips", _USUAL),
    _spectral("top1_energy", _SHARE, "ρ₁: energy along the first singular direction", is_hidden=False),
    _spectral("spectral_entropy", "nats", "Entropy of σ² or σ as shares", *WEIGHTS, is_hidden=False),
    *(
        Metric("mean_cosine", (f"{mean}{what}",), _COSINE, f"{said} {whose}", _USUAL)
        for mean, whose in (("in_sample", "the mean row"), ("leave_one_out", "the mean of the other rows"))
        for what, said in (
            ("", "Mean cosine of a row of ΔH with"),
            ("_null_high", "97.5 % quantile, under sign flips, of the mean cosine of a row of ΔH with"),
            ("/base", "Mean cosine of the base’s state with"),
            ("/random_update", "Mean cosine, under random weight changes, of a row of ΔH with"),
        )
    ),
    Metric("mean_cosine", ("split_half/random_update",), _COSINE,
           "Mean cosine, under random weight changes, of a row of ΔH with the mean of the other half", _USUAL),
    Metric("direction_settled", ("",), _COSINE, "Cosine of v* with v* of the observation before", _USUAL),
    Metric("similarity", ("cka", "cka/random_update"), _COSINE,
           "Debiased linear CKA of base and policy, one row a prompt; blind to a constant shift", _USUAL),
    Metric("readout", ("auc", "auc_of_base"), _SHARE,
           "Held-out AUC of chosen against rejected responses’ mean states in the policy, by its own linear map or the base’s",
           "response_mean", needs="at least 15 probe pairs"),
    Metric("depth", ("first_token_share",), _SHARE, "Share of KL(π ‖ π₀) over chosen responses in their first 5 tokens"),
    Metric("depth", ("even_share",), _SHARE, "The same if every token differed alike: the share of all tokens that are first ones"),
    Metric("update_norm", ("", "random_update"), _LENGTH, "Mean length of a row’s change", _USUAL),
    Metric("state_norm", ("",), _LENGTH, "Mean length of the base’s states", _USUAL),
    _spectral("normalized_entropy", _SHARE, "Entropy over ln min(N, d)", *WEIGHTS),
    _spectral("effective_rank", "directions", "Exponential of the entropy (`singular`: Roy–Vetterli)", *WEIGHTS),
    _spectral("participation_ratio", "directions", "(Σ σ²)² / Σ σ⁴"),
    _spectral("stable_rank", "directions", "Σ σ² / σ₁²"),
    _spectral("sigma_ratio", _SHARE, "σ₂ / σ₁"),
    Metric("top_direction_cosine", _RAW, _SHARE, "Absolute cosine of u₁ with the mean row", _USUAL, is_hidden=True),
    Metric("weights", ("changed_share",), _SHARE, "Weights of the blocks, of a fixed sample, whose bfloat16 values changed"),
    Metric("gradient", ("mean_resultant",), _SHARE, "Length of the mean unit gradient at final states; 1: one direction"),
    Metric("gradient", ("energy_along_sequence",), _SHARE, "Energy of those gradients along each pair’s v̄"),
    Metric("gradient", ("energy_along_steering",), _SHARE, "Energy of those gradients along v*"),
    _said(("geval_win_rate",), _SHARE, "Answers that the judge prefers to the base’s, ties half", needs=_JUDGE,
          label="win rate vs base, judge"),
    _said(("geval_win_rate_vs_chosen",), _SHARE, "Answers that the judge prefers to the chosen response, ties half",
          needs=_JUDGE, label="win rate vs chosen, judge"),
    _said(("oracle_preference_rate",), _SHARE, "Answers that the planted oracle prefers to the base’s",
          needs=_ORACLE,
          label="win rate vs base, oracle"),
    _said(("oracle_preference_rate_vs_chosen",), _SHARE, "Answers that the planted oracle prefers to the chosen response",
          needs=_ORACLE, label="win rate vs chosen, oracle"),
    _said(_of_both("oracle_utility"), "1", "Mean planted utility of completions", needs=_ORACLE),
    _said(_of_both("toxicity"), _SHARE, "Mean toxicity", needs="a toxicity classifier", label="toxicity"),
    _said(_of_both("hate_speech"), _SHARE, "Mean probability of hate speech", needs="a toxicity classifier",
          label="hate speech"),
    _said(_of_both("toxicity_word_list"), _SHARE, "Mean score of rude words", label="toxicity (word list)"),
    _said(_of_both("severe_toxicity", "identity_attack", "insult", "profanity", "threat"), _SHARE,
          "Mean score of another attribute of the Perspective API", needs="the Perspective API"),
    _said(_of_both("<score>_truncated"), _SHARE, "Texts too long for the scorer", needs="a toxicity scorer"),
    *(
        _said(_of_both(*_each([name], ("", "_toxic_prompts", "_nontoxic_prompts"))), _SHARE, meaning, needs=_OFTEN, label=label)
        for name, meaning, label in (
            ("exp_max_<score>_std@<n>", "Standard deviation over prompts of the maximum over n completions", ""),
            ("exp_max_<score>@<n>", "Expected maximum over n completions of a prompt", "exp max <score>@<n>"),
            ("<score>_probability@<n>", "Prompts with a toxic completion among n", "<score> probability@<n>"),
        )
    ),
    _said(_of_both("geval_score"), _SHARE, "Mean G-Eval score over criteria", needs=_JUDGE, label="G-Eval score"),
    _said(_of_both("geval_score/<criterion>"), _SHARE, "Mean G-Eval score by one criterion", needs=_JUDGE,
          label="geval score/<criterion>"),
    _said(_of_both("<prefix>_score", "<prefix>_score/<criterion>"), _SHARE, "Mean G-Eval score by a scorer with a prefix",
          needs=_JUDGE),
    _said(("<prefix>_score_difference/<criterion>",), "−1 … 1", "Policy’s score less the base’s", needs=_JUDGE),
    _said((*_of_both("<prefix>_score/<criterion>_missing/<reason>"), *_each(_RATES, ["_missing/<reason>"])), "count",
          "Scores that the judge didn’t give, by reason", needs=_JUDGE),
    _said(_each(_RATES, ("", "_wins", "_ties", "_losses")), _SHARE, "Win rate, and the shares it is made of", needs=_JUDGE),
    _said(_each(_RATES, ["_length_controlled"]), _SHARE, "Win rate between answers of equal length", needs=_JUDGE),
    _said(_each(_RATES, ["_length_difference"]), "characters", "Length of the policy’s answer less the other’s", needs=_JUDGE),
    _said((*_of_both("<prefix>_low_mass/<criterion>"), *_each(_RATES, ["_low_mass"])), _SHARE,
          "Replies in which the judge’s weight is mostly on no valid answer", needs=_JUDGE),
    _said(_each(_RATES, ["_identical"]), _SHARE, "Pairs of identical answers, which are ties without asking", needs=_JUDGE),
    _said(_each(["<prefix>_position_consistency"], _AGAINST), _SHARE, "Verdicts that are alike in both orders", needs=_JUDGE),
    _said(_each(["<prefix>_first_position_rate"], _AGAINST), _SHARE, "Verdicts for whichever answer stands first",
          needs=_JUDGE),
    _said(_of_both("<prefix>_empty"), _SHARE, "Answers without text", needs=_JUDGE),
    _said(_of_both("rougeL"), _SHARE, "ROUGE-L F1 with the chosen response", label="ROUGE-L with chosen"),
    _said(_of_both("rouge1", "rouge2"), _SHARE, "ROUGE-1 and ROUGE-2 F1 with the chosen response"),
    _said(_of_both("bleu"), "0 … 100", "Corpus BLEU with the chosen response"),
    _said(("rouge1_to_base", "rouge2_to_base", "rougeL_to_base"), _SHARE, "ROUGE F1 with the base’s completion",
          needs="`reference: base`"),
    _said(("bleu_to_base",), "0 … 100", "Corpus BLEU with the base’s completion", needs="`reference: base`"),
    _said(_of_both("degeneration"), _SHARE, "Completions that are empty or repeat themselves", label="share degenerate"),
    _said(_of_both(*_each(["degeneration_"], ("words", "characters", "tokens"))), _SHARE,
          "Completions that repeat their words, characters or tokens"),
    _said(_of_both("repetition_4gram"), _SHARE, "Repeated 4-grams of words, mean over completions"),
    _said(_of_both("empty"), _SHARE, "Completions without anything to read"),
    _said(_of_both("cut"), _SHARE, "Completions cut at the token limit"),
    _said(_of_both("length"), "tokens", "Mean length of completions"),
    _said(_of_both("truthfulqa_mc2"), _SHARE, "Probability of the true answers, with examples", needs=_QUESTIONS,
          label="TruthfulQA MC2"),
    _said(_of_both("truthfulqa_mc2_zero_shot"), _SHARE, "Probability of the true answers, without examples",
          needs=_QUESTIONS, label="TruthfulQA MC2, 0-shot"),
    _said(_of_both(*_each(["truthfulqa_"], ("mc1", "binary"), ("", "_zero_shot"))), _SHARE,
          "Questions whose likeliest answer is true, of all (`mc1`) or of one true and one false (`binary`)", needs=_QUESTIONS),
    _said(_of_both(*_each(["truthfulqa_"], ("mc1", "mc2", "binary"), ("_chat", "_zero_shot_chat"))), _SHARE,
          "TruthfulQA asked through the chat template", needs="TruthfulQA, `chat_template`"),
    _said(_each(["preference_accuracy"], _SOURCES), _SHARE, "Held-out pairs ranked as in the data"),
    _said(_each(["preference_ties"], _SOURCES), _SHARE, "Held-out pairs of equal rewards"),
    _said(_each(["reward_margin"], _SOURCES), _REWARD, "Mean reward margin of held-out pairs"),
    _said(_each(["logp_drift_"], ("chosen", "rejected"), _SOURCES), "nats", "Mean log π − log π₀ of held-out responses"),
    _said(_of_both("preference_probe_accuracy/<site>"), _SHARE, "Held-out accuracy of a linear probe for the preference",
          label="linear probe, <site>"),
    _said(_of_both("preference_probe_null/<site>"), _SHARE, "Held-out accuracy of the probe with labels flipped at random"),
    _said(("kl",), "nats", "Mean log π − log π₀ of the policy’s own completions", needs=_ASKED),
    _said(("kl_per_token",), "nats/token", "Mean log π − log π₀ per token of the policy’s own completions", needs=_ASKED),
    Metric("judge", ("agreement",), _SHARE, "Held-out pairs of which the judge prefers the chosen response, ties half; ½: guessing",
           needs=_HELD, label="judge agrees with labels"),
    Metric("judge", ("agreement_wins", "agreement_ties", "agreement_losses"), _SHARE,
           "Pairs decided as labelled, undecided, and decided otherwise", needs=_HELD),
    Metric("judge", ("agreement_length_controlled",), _SHARE, "Agreement between responses of equal length", needs=_HELD),
    Metric("judge", ("agreement_length_difference",), "characters", "Length of chosen responses less the rejected ones’",
           needs=_HELD),
    Metric("judge", ("position_consistency",), _SHARE, "Verdicts on those pairs that are alike in both orders", needs=_JUDGE),
    Metric("judge", ("first_position_rate",), _SHARE, "Verdicts on them for whichever response stands first", needs=_JUDGE),
    Metric("judge", ("agreement_low_mass", "agreement_identical"), _SHARE,
           "Replies mostly on no valid answer, and pairs of identical responses", needs=_JUDGE),
    Metric("judge", ("agreement_missing/<reason>",), "count", "Pairs without a verdict, by reason", needs=_JUDGE),
    _said(("of_steps_taken",), "optimizer steps", "Steps behind the model that is scored in this row"),
    Metric("alarm", ("chosen_logp_drop",), "nats", "Log-probability lost by chosen responses, from the reference", summary="max"),
    Metric("alarm", ("accuracy_saturation",), _SHARE, "Training pairs ordered rightly; at 1 only margins grow", summary="max"),
    Metric("alarm", ("length_ratio",), "1", "Tokens of chosen over those of rejected responses", summary="max"),
    Metric("alarm", ("nan",), "0 or 1", "Training stopped for numbers that are not finite", summary="max"),
    Metric("alarm", ("skipped_steps",), "steps", "Steps that were not learned from so far", summary="max"),
    Metric("alarm", ("snapshot", "checkpoint"), "0 or 1", "Hidden states or a checkpoint could not be written",
           needs="a file that could not be written", summary="max"),
    Metric("probe", ("steps_taken",), "optimizer steps", "Steps behind the model that is read in this row"),
    Metric("sparse", ("loss",), _SHARE, "Reconstruction loss and weighted auxiliary loss of the step", needs=_SPARSE),
    Metric("sparse", ("unexplained",), _SHARE, "Variance of the step’s states that is not reconstructed", needs=_SPARSE),
    Metric("sparse", ("auxiliary",), _SHARE, "What the reconstruction lacks, that dead features leave too; 0: none is dead",
           needs=_SPARSE),
    Metric("sparse", ("dead_now",), _SHARE, "Features not active in the last `dead_after` states", needs=_SPARSE),
    Metric("sparse", ("l0",), "features", "Features active at a token of held-out texts, mean", needs=_SPARSE),
    Metric("sparse", ("explained_variance",), _SHARE, "Variance of held-out states that is reconstructed", needs=_SPARSE,
           summary="max,last"),
    Metric("sparse", ("dead_share",), _SHARE, "Features active at no token of the held-out texts", needs=_SPARSE),
    Metric("sparse", ("ce_clean", "ce_spliced", "ce_ablated"), "nats/token",
           "−log π of held-out texts: as the model is, with reconstructed states at the site, with 0 there", needs=_SPARSE),
    Metric("sparse", ("ce_recovered",), _SHARE, "Share of the loss by ablation that reconstructed states save", needs=_SPARSE),
    Metric("sparse", ("steering_l1", "steering_l1_effective"), "feature units",
           "Σ_j |s_j| at a response token, mean; effective: of what it changes, ReLU(f + s) − f", needs=_STEERING),
    Metric("sparse", ("steering_l0", "steering_l0_effective"), "features",
           "Features steered at a response token, mean; effective: those that are changed", needs=_STEERING),
)  # fmt: skip
"""Scalars, in the order of the page."""
MEDIA: tuple[Metric, ...] = (
    Metric("figures", ("geometry", "entropy", "layers_by_step", "cosines", "projection"), "picture", "Section of the report"),
    Metric("cosines", _each(("in_sample", "leave_one_out", "split_half"), ["/<site>"]), "histogram", "Cosines with v*, by pair"),
    Metric("samples", ("",), "table", "Prompts with both models’ completions and every score"),
    Metric("report", ("claims_table", "claims_checks_table"), "table", "A study’s claims with their verdicts; their controls"),
    Metric("report", ("<section>",), "picture", "Section of the finished report, where it is uploaded"),
)  # fmt: skip
"""Media that W&B gets beside the scalars."""
_PAGE = """# Metrics

Written by `python -m tiltmeter.metric_names > docs/metrics.md`. The same names stand in `metrics.csv` and on W&B, there over
`trainer/global_step`; `metrics.csv` also has the columns `step` (optimizer step, from 0) and `epoch`.

- `<site>`: `layer_07` (residual stream after decoder block 7), `final_pre_norm`, `final_post_norm`. Read at another token than the
  prompt’s last, the position stands before it: `shift_share/delta/content/layer_07`.
- `base`, `policy`: hidden states of either model; `delta`: their difference ΔH; `random_update`: ΔH under a random weight change of
  equal norm. `_centred`: less the mean row; `_unit_row`: rows of length 1; `_outlier_dims_removed`: without the base’s outliers.
- `[/base]`: the base model’s own figure has `/base` behind its name.
- `<source>`: of one of several sources of pairs. `<prefix>`: `geval` unless the scorer sets another. `<score>`: what a toxicity
  scorer scores, such as `toxicity`; a classifier’s other label goes by its own name. `<n>`: completions a prompt.
- What a metric needs, beside the callbacks, is set as in [scorers](scorers.md).
- Metrics of `evaluate` are `behaviour/<metric>_<key>`.
"""
_DECLARED = {(key, metric.position is not None): metric for metric in METRICS + MEDIA for key in metric.keys}
_FIELD = re.compile("<([a-z]+)>")
_FILLED = {"n": "[0-9]+", "source": ".+"}  # every other field: anything within a part of the name
_OPEN = [
    (re.compile(_FIELD.sub(lambda field: f"(?P<{field[1]}>{_FILLED.get(field[1], '[^/@]+')})", key)), metric, key)
    for (key, _), metric in _DECLARED.items()
    if "<" in key
]


def metric(*parts: str) -> str:
    """A declared name from its parts; for a metric of a site, without the site (:func:`at`).

    Raises:
        ValueError: no metric of this name is declared.

    >>> metric("train", "loss"), metric("spectral_entropy", matrix("delta", "centred"), "energy")
    ('train/loss', 'spectral_entropy/delta_centred/energy')
    """
    key = "/".join(part for part in parts if part)
    if _of_run(key) is None and (key, True) not in _DECLARED:
        raise ValueError(f"metric {key}: not declared in tiltmeter/metric_names.py; declare it there to log it")
    return key


def at(key: str, point: tuple[str, Position]) -> str:
    """A metric's name at a site and position (:class:`tiltmeter.states.capture.ReadPoint`).

    Raises:
        ValueError: no metric of hidden states has this name.

    >>> at("shift_share/delta", ("layer_03", "prompt_last")), at("projection/delta", ("layer_03", "diverge"))
    ('shift_share/delta/layer_03', 'projection/delta/layer_03')
    >>> at("shift_share/delta", ("layer_03", "content"))
    'shift_share/delta/content/layer_03'
    """
    found = _DECLARED.get((key, True))
    if found is None:
        raise ValueError(f"metric {key}: not declared in tiltmeter/metric_names.py as a metric of hidden states")
    return f"{key}/{_place(*point, usual=found.position)}"


def place(point: tuple[str, Position]) -> str:
    """A site and position as files of vectors name them.

    >>> place(("layer_03", "prompt_last")), place(("layer_03", "diverge"))
    ('layer_03', 'diverge/layer_03')
    """
    return _place(*point, usual=_USUAL)


def _place(site: str, position: Position, *, usual: Position | None) -> str:
    return site if position == usual else f"{position}/{site}"


@cache
def find(name: str) -> Found | None:
    """Meaning of a name, the inverse of :func:`metric` and :func:`at`; None: it is not declared.

    >>> found = find("shift_share/delta/content/layer_03")
    >>> found.key, found.position, found.site, found.metric.unit
    ('shift_share/delta', 'content', 'layer_03', 'share, 0 … 1')
    >>> find("train/lost") is None
    True
    """
    *head, site = name.split("/")
    stated = head.pop() if head and head[-1] in POSITIONS else None
    key = "/".join(head)
    declared = _DECLARED.get((key, True)) if is_site(site) else None
    if declared is not None and stated != declared.position:
        return Found(declared, key, site, stated or declared.position, {})  # type: ignore[arg-type]
    return _of_run(name)


def keys_of(family: str) -> list[str]:
    """All names of a family that leave nothing to be filled in, without position and site."""
    return [key for declared in METRICS + MEDIA if declared.family == family for key in declared.keys if "<" not in key]


def behaviour(figure: str) -> Found | None:
    """Meaning of the name of a figure, as tables have it: without ``behaviour/``; a judge's own are whole."""
    return find(figure if figure.startswith("judge/") else f"behaviour/{figure}")


def _of_run(name: str) -> Found | None:
    if (exact := _DECLARED.get((name, False))) is not None:
        return Found(exact, name, None, None, {})
    matches = ((pattern.fullmatch(name), metric, key) for pattern, metric, key in _OPEN)
    return next((Found(metric, key, None, None, m.groupdict()) for m, metric, key in matches if m), None)


def _row(declared: Metric) -> str:
    """A metric's line of its family's table; ``[/base]`` where the base has the same one."""
    site = "" if declared.position is None else "/<site>"
    keys = set(declared.keys)
    of_base = {f"{key}/base" for key in keys} & keys
    names = [f"`{key}{site}{'[/base]' * (f'{key}/base' in keys)}`" for key in declared.keys if key not in of_base]
    where = "" if declared.position in (None, _USUAL) else f", at `{declared.position}`"
    return f"| {', '.join(names)} | {declared.unit} | {declared.meaning}{where} | {declared.needs} |"


def page() -> str:
    """docs/metrics.md: a table a family."""
    lines = [_PAGE]
    for family in dict.fromkeys(metric.family for metric in METRICS + MEDIA):
        lines += [f"\n## {family}\n", "| name | unit | what it says | needs |", "|---|---|---|---|"]
        lines += [_row(declared) for declared in METRICS + MEDIA if declared.family == family]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
