"""What a reader must know of figures of behaviour before believing them: how answers came about, and what each figure is not."""

from collections.abc import Mapping, Sequence

import pandas as pd

from analysis.behaviour.words import WIN_RATES, has, last_point, rules_fired
from tiltmeter.models.generation import Decoding, as_words

CLAIM = "D-STEER: alignment raises judged quality (G-Eval) and lowers toxicity; its Fig. 2 wants the same by steering alone."
"""What figures of behaviour put to the test."""
INTERVAL = (
    "95 %, over prompts, of each number alone; both models answer the same prompts, so a difference can be surer than "
    "two overlapping intervals suggest."
)
LIMITS = (
    "Quality: every number is what its scorer makes of the words, and scorers can be wrong together.",
    "Other prompts, other decoding, another seed of training.",
)
_CAVEATS: Mapping[Sequence[str], str] = {
    tuple(WIN_RATES): "Win rate: share of answers preferred, a tie half; ½ is a model against itself.",
    ("rougeL", "bleu"): "Overlap with the chosen response says how far the wording moved, not whether it got better.",
    ("oracle_preference_rate",): (
        "The planted oracle is the synthetic world’s own utility, read off the words; it is no language model."
    ),
    ("toxicity_word_list",): "The word list finds rude words, not meaning; it is no toxicity classifier.",
    ("truthfulqa_mc2", "truthfulqa_mc2_zero_shot"): (
        "TruthfulQA’s multiple choice can be gamed by the form of the answers; its authors recommend their binary version."
    ),
    ("preference_accuracy",): (
        "Preference accuracy and drifts are of log-probs, on pairs of the data, not of what a model says; equal is wrong, so a "
        "model against itself has accuracy 0 and only ties."
    ),
}


def reading_of(table: pd.DataFrame, *, n_prompts: int | None, decoding: Decoding | None) -> list[str]:
    """What a reader must know of these figures.

    Args:
        n_prompts: that both models completed; None: not known.
        decoding: how completions were drawn; None: not known.
    """
    is_drawn = decoding is not None and decoding.temperature > 0
    how = "how they were drawn is not known" if decoding is None else as_words(decoding)
    lines = [
        f"Both models complete the same {f'{n_prompts} ' if n_prompts else ''}prompts ({how})"
        + (", with the same random numbers." if is_drawn else "."),
        "Every number names its scorer below the table; numbers of different scorers are not comparable. n counts completions, "
        "for preference figures pairs, for TruthfulQA questions.",
    ]
    lines += [line for metrics, line in _CAVEATS.items() if any(has(table, metric) for metric in metrics)]
    if has(table, "degeneration_words"):
        fired = rules_fired(lambda name: last_point(table, name, "policy").value)
        lines.append(
            f"Degenerate: empty, or mostly repeated words, characters or tokens. Of the aligned model’s, by rule: {fired}."
        )
    if has(table, "kl"):
        is_unbiased = is_drawn and decoding is not None and decoding.temperature == 1 and decoding.top_p == 1
        lines.append(
            "kl: mean of log π − log π₀ over the aligned model’s own completions, nats; "
            + (
                "drawn as they were, an unbiased estimate of KL(π‖π₀)."
                if is_unbiased
                else "no estimate of KL(π‖π₀), for "
            )
            + ("" if is_unbiased else "which completions are drawn at temperature 1 from the whole distribution.")
        )
    if table["n_missing"].max() > 0:
        lines.append(
            "What could not be scored is left out and counted; a figure that lacks too much (usually above 5 %) has no number."
        )
    return lines
