"""Train, validation and probe splits that share no prompt, and controls on the training labels."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from datamodules.records import PreferencePair
from tiltmeter.errors import UserError
from tiltmeter.pairs.batch import TokenizedPair

Split = Literal["train", "val", "probe"]
LabelControl = Literal["given", "swapped", "shuffled"]


def split_by_group(
    pairs: Sequence[PreferencePair], *, sizes: Mapping[str, int | None], seed: int
) -> dict[Split, list[PreferencePair]]:
    """Deal whole groups (prompts, trees) to validation, probe and training, in a seeded order.

    Validation and probe take groups until they hold at least their size and are then cut to it; training takes what is
    left, cut to its own size. Where a source says which pairs are held out, validation and probe take those only and training
    none of them. Held-out pairs whose label was flipped on purpose get their clean label back.

    Args:
        pairs: all pairs of a source.
        sizes: pairs wanted in ``train`` (None: all that remain), ``val`` and ``probe``.
        seed: of the order of groups.

    Raises:
        UserError: not enough pairs for the sizes asked for.
    """
    by_group: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        by_group.setdefault(pair.group, []).append(pair)
    names = sorted(by_group)
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    splits: dict[Split, list[PreferencePair]] = {"train": [], "val": [], "probe": []}
    position = 0
    given = {pair.group for pair in pairs if pair.held_out}
    if given and not (sizes["val"] or sizes["probe"]):
        raise UserError(
            "data.validation_path: nothing is held out with datamodule.val_pairs=0 and probe_pairs=0; ask for pairs of it, or "
            "leave it out"
        )
    may_be_held_out = [name for name in order if name in given] if given else order
    held_out: tuple[Split, ...] = ("val", "probe")
    for split in held_out:
        wanted = sizes[split] or 0
        while len(splits[split]) < wanted and position < len(may_be_held_out):
            splits[split] += by_group[may_be_held_out[position]]
            position += 1
        if given and len(splits[split]) < wanted:
            raise UserError(
                f"datamodule: the {sum(pair.held_out for pair in pairs)} pairs of data.validation_path are too few for "
                f"val_pairs={sizes['val']} and probe_pairs={sizes['probe']}; ask for fewer"
            )
        splits[split] = [with_clean_label(pair) for pair in splits[split][:wanted]]
    for name in order if given else order[position:]:
        splits["train"] += [pair for pair in by_group[name] if name not in given]
    available = len(splits["train"])
    wanted_train = sizes["train"]
    splits["train"] = splits["train"][:wanted_train]
    if not splits["train"] or len(splits["train"]) < (wanted_train or 1):
        raise UserError(
            f"datamodule: {len(pairs)} pairs in {len(names)} prompts are too few for train_pairs={wanted_train}, "
            f"val_pairs={sizes['val']}, probe_pairs={sizes['probe']}: only {available} are left to train on; "
            f"{'no prompt may be in two of them, so use pairs of more prompts' if len(names) < len(splits) else 'ask for fewer'}"
        )
    return splits


def count_repeats(pairs: Sequence[PreferencePair]) -> dict[str, int]:
    """Pairs that repeat an earlier one word for word, and pairs that contradict one (same texts, other label)."""
    seen: set[tuple[str, str, str]] = set()
    counts = {"repeated pairs": 0, "contradictory pairs": 0}
    for pair in pairs:
        texts = (pair.prompt_text, pair.chosen_text, pair.rejected_text)
        counts["repeated pairs"] += texts in seen
        counts["contradictory pairs"] += (texts[0], texts[2], texts[1]) in seen
        seen.add(texts)
    return {name: n for name, n in counts.items() if n}


def with_clean_label(pair: PreferencePair) -> PreferencePair:
    """Undo a deliberate label flip (``attributes["label_flipped"]``)."""
    if not pair.attributes.get("label_flipped"):
        return pair
    attributes = {_other_side(key): value for key, value in pair.attributes.items()} | {"label_flipped": False}
    if isinstance(gap := attributes.get("utility_gap"), int | float):
        attributes["utility_gap"] = -gap
    return replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_text=pair.rejected_text,
        rejected_text=pair.chosen_text,
        attributes=attributes,
    )


def _other_side(key: str) -> str:
    for side, other in (("chosen/", "rejected/"), ("rejected/", "chosen/")):
        if key.startswith(side):
            return other + key.removeprefix(side)
    return key


def control_labels(pairs: Sequence[TokenizedPair], control: LabelControl, *, seed: int) -> list[TokenizedPair]:
    """Training pairs with all labels reversed (``swapped``) or reversed with probability ½ (``shuffled``)."""
    if control == "given":
        return list(pairs)
    flip = (
        np.ones(len(pairs), bool) if control == "swapped" else np.random.default_rng((seed, 1)).random(len(pairs)) < 0.5
    )
    return [
        TokenizedPair(p.prompt_ids, p.rejected_ids, p.chosen_ids) if f else p for p, f in zip(pairs, flip, strict=True)
    ]
