"""Train, validation and probe splits that share no prompt, and controls on the training labels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Literal

import numpy as np

from datamodules.records import PreferencePair
from tiltmeter.errors import UserError
from tiltmeter.pairs.batch import TokenizedPair

Split = Literal["train", "val", "probe"]
LabelControl = Literal["given", "swapped", "shuffled", "random_pairs", "prompts", "unseen"]


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
    groups = _shuffled_groups(pairs, seed)
    given = {pair.group for pair in pairs if pair.held_out}
    rest = iter([group for name, group in groups.items() if name not in given])
    may_be_held_out = iter([groups[name] for name in groups if name in given]) if given else rest
    n_val, n_probe = sizes["val"] or 0, sizes["probe"] or 0
    val, probe = _take(may_be_held_out, n_val), _take(may_be_held_out, n_probe)
    if given:
        _check_held_out(n_val, n_probe, n_taken=len(val) + len(probe), n_given=sum(pair.held_out for pair in pairs))
    train = list(chain.from_iterable(rest))
    if len(train) < (sizes["train"] or 1):
        needs_prompts = len(groups) < len(sizes)
        advice = ("ask for fewer", "no prompt may be in two of them, so use pairs of more prompts")[needs_prompts]
        raise UserError(
            f"datamodule: {len(pairs)} pairs in {len(groups)} prompts are too few for train_pairs={sizes['train']}, "
            f"val_pairs={sizes['val']}, probe_pairs={sizes['probe']}: only {len(train)} are left to train on; {advice}"
        )
    return {"train": train[: sizes["train"]], "val": val, "probe": probe}


def _check_held_out(n_val: int, n_probe: int, *, n_taken: int, n_given: int) -> None:
    """Refuse pairs that are held out in vain, or too few of them. Raises UserError."""
    if not n_val + n_probe:
        raise UserError(
            "data.validation_path: nothing is held out with datamodule.val_pairs=0 and probe_pairs=0; ask for pairs of it, or "
            "leave it out"
        )
    if n_taken < n_val + n_probe:
        raise UserError(
            f"datamodule: the {n_given} pairs of data.validation_path are too few for val_pairs={n_val} and probe_pairs={n_probe}; "
            "ask for fewer"
        )


def _shuffled_groups(pairs: Sequence[PreferencePair], seed: int) -> dict[str, list[PreferencePair]]:
    """Pairs by their group, groups in a seeded order."""
    by_group: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        by_group.setdefault(pair.group, []).append(pair)
    names = sorted(by_group)
    return {names[i]: by_group[names[i]] for i in np.random.default_rng(seed).permutation(len(names))}


def _take(groups: Iterator[list[PreferencePair]], wanted: int) -> list[PreferencePair]:
    """The next whole groups until there are enough pairs, cut to that many, with clean labels."""
    taken: list[PreferencePair] = []
    while len(taken) < wanted and (group := next(groups, None)):
        taken += group
    return [with_clean_label(pair) for pair in taken[:wanted]]


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


def control_labels(
    pairs: Sequence[TokenizedPair], control: LabelControl, *, seed: int, validation: Sequence[TokenizedPair] = ()
) -> list[TokenizedPair]:
    """Training pairs under a control.

    Args:
        control: ``swapped``: all labels reversed; ``shuffled``: reversed with probability ½; ``random_pairs``: both responses from
            other prompts, each from another one, cut to the longer of its own; ``prompts``: the
            prompt behind its first token in the place of the chosen response, in which there is no preference; ``unseen``: as
            many pairs, but validation's (:func:`unseen_pairs`) over and over, which no base that was made here has learned from.
        seed: of what is drawn.
        validation: pairs of the validation split, for ``unseen``.

    Raises:
        UserError: no validation pairs for ``unseen``.
    """
    if control == "given":
        return list(pairs)
    if control == "unseen":
        others = unseen_pairs(validation)
        return [others[row % len(others)] for row in range(len(pairs))]
    if control == "random_pairs":
        return _random_pairs(pairs, seed)
    if control == "prompts":
        return [
            TokenizedPair(p.prompt_ids[:1], p.prompt_ids[1:], p.rejected_ids) if len(p.prompt_ids) > 1 else p
            for p in pairs
        ]
    flip = (
        np.ones(len(pairs), bool) if control == "swapped" else np.random.default_rng((seed, 1)).random(len(pairs)) < 0.5
    )
    return [
        TokenizedPair(p.prompt_ids, p.rejected_ids, p.chosen_ids) if f else p for p, f in zip(pairs, flip, strict=True)
    ]


def unseen_pairs(validation: Sequence[TokenizedPair]) -> Sequence[TokenizedPair]:
    """The first three quarters of the validation split, to fine-tune a control on; :func:`matching_pairs` are the others.

    Raises:
        UserError: fewer than four pairs.
    """
    if len(validation) < 4:
        raise UserError(
            "datamodule.labels=unseen: trains on validation's pairs, expected at least 4 in datamodule.val_pairs, got "
            f"{len(validation)}"
        )
    return validation[: -(len(validation) // 4)]


def matching_pairs(validation: Sequence[TokenizedPair]) -> Sequence[TokenizedPair]:
    """The last quarter of the validation split, on which the distance of a control from the base is measured."""
    return validation[-max(1, len(validation) // 4) :]


def _random_pairs(pairs: Sequence[TokenizedPair], seed: int) -> list[TokenizedPair]:
    """Each prompt with the chosen response of one other prompt and the rejected one of a third: shifts of one random order."""
    order, n = np.random.default_rng((seed, 2)).permutation(len(pairs)), len(pairs)
    found = list(pairs)
    for place, row in enumerate(order.tolist()):
        own, chosen, rejected = pairs[row], pairs[order[(place + 1) % n]], pairs[order[(place + 2) % n]]
        room = max(1, *map(len, own[1:]))
        found[row] = TokenizedPair(own.prompt_ids, chosen.chosen_ids[:room], rejected.rejected_ids[:room])
    return found
