"""Claims as data: what is said, the number T that it is about, its threshold, and what could refute it; read from YAML.

A claim of one's own is one more entry, over statistics of hidden states or over any table of a report (docs/claims.md).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from analysis.claims.statistics import (
    CONDITIONS,
    PREFERENCE_CONDITIONS,
    PREFERENCE_STATISTICS,
    SITES,
    STATISTICS,
    Statistic,
)
from tiltmeter.errors import UserError
from tiltmeter.plain_text import did_you_mean
from tiltmeter.states.positions import POSITIONS

Side = Literal["at_least", "above", "at_most", "below"]
ARMS = ("dpo", "sft_chosen", "dpo_shuffled", "dpo_swapped", "dpo_random_pairs", "lm_continued")
"""Arms of a study that are shipped (conf/arm, docs/claims.md)."""
DRAWN = ("random_update", "random_update_rotated")
"""Arms that are drawn, not trained; a further draw has to be passed, and not their mean."""
OWN = ("base_states", "permuted")
"""Controls that are computed of the same runs."""


@dataclass(frozen=True)
class OfTable:
    """T as a number of a report's table: the mean of a column over the rows that are meant.

    Args:
        table: its file's name in report/tables/.
        column: of the table.
        where: column → value of the rows.
        less: column → value of the rows whose mean is taken off, where they differ from those meant; empty: none is.
    """

    table: str
    column: str
    where: Mapping[str, str | float | bool]
    less: Mapping[str, str | float | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Bound:
    """A threshold τ, and on which side of it T has to lie."""

    side: Side
    value: float

    def holds(self, value: float) -> bool:
        """Whether a number is on the right side; NaN isn't."""
        at_or_above, sign = value >= self.value, self.side in ("at_least", "above")
        if value == self.value:
            return self.side in ("at_least", "at_most")
        return value == value and at_or_above == sign

    def __str__(self) -> str:
        """As it is printed: ``≥ 0.9``."""
        return f"{dict(zip(get_args(Side), '≥>≤<', strict=True))[self.side]} {self.value:g}"


@dataclass(frozen=True)
class Survival:
    """Something under which a claim has to hold still."""

    name: str
    statistic: Statistic | OfTable | None
    """None: nothing here computes it yet."""
    bound: Bound


@dataclass(frozen=True)
class Claim:
    """One claim.

    Args:
        key: its short name: ``K4``.
        says: the claim in words.
        statistic: T; None: nothing here computes it yet.
        bound: threshold.
        beats: arms and controls whose T must be smaller (of an upper bound: larger), each with its statistic.
        survives: conditions under which the bound still has to hold.
    """

    key: str
    says: str
    statistic: Statistic | OfTable | None
    bound: Bound
    beats: Mapping[str, Statistic | OfTable | None]
    survives: tuple[Survival, ...]


def read_claims(path: Path, *, arms: Sequence[str] = ARMS) -> list[Claim]:
    """Claims of a YAML file, in its order.

    Args:
        arms: that there are, beside those that are drawn.

    Raises:
        UserError: no such file, or an unknown statistic, control, condition, side or key; says the nearest match.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"claims: no such file: {path}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a plain YAML file ({' '.join(str(error).split())[:120]})") from error
    return make_claims(content, where=path.name, arms=arms)


def make_claims(content: Any, *, where: str, arms: Sequence[str] = ARMS) -> list[Claim]:
    """Claims of plain values, by their keys. Raises UserError as :func:`read_claims`.

    Args:
        where: they come from, for messages.
        arms: that there are, beside those that are drawn.
    """
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise UserError(f"{where}: expected claims by their keys, each with says, statistic and a threshold")
    return [_claim(f"{where}: {key}", str(key), entry, arms) for key, entry in content.items()]


def _claim(where: str, key: str, entry: Mapping[str, Any], arms: Sequence[str]) -> Claim:
    _known(where, entry, ("says", "statistic", *get_args(Side), "sites", "minus", "position", "beats", "survives"))
    if "says" not in entry:
        raise UserError(f"{where}: says is missing: the claim in words")
    bound = _bound(where, entry)
    statistic = _statistic(where, entry)
    beats: dict[str, Statistic | OfTable | None] = {}
    for name in entry.get("beats", ()):
        _one_of(f"{where}: beats", str(name), (*arms, *DRAWN, *OWN))
        beats[str(name)] = _of_condition(statistic, str(name)) if name in OWN else statistic
    survives = tuple(
        _survival(f"{where}: survives", str(name), option, statistic, bound)
        for name, option in _named(entry.get("survives", ()))
    )
    return Claim(key, str(entry["says"]), statistic, bound, beats, survives)


def _survival(
    where: str, name: str, option: Mapping[str, Any] | None, statistic: Statistic | OfTable | None, bound: Bound
) -> Survival:
    if option is None:
        _one_of(where, name, (*CONDITIONS, *PREFERENCE_CONDITIONS))
        return Survival(name, _of_condition(statistic, name), bound)
    _known(f"{where}: {name}", option, ("statistic", "sites", "minus", "position", *get_args(Side)))
    own = _statistic(f"{where}: {name}", option) if "statistic" in option else statistic
    return Survival(
        name, own, _bound(f"{where}: {name}", option) if any(s in option for s in get_args(Side)) else bound
    )


def _named(entries: Any) -> list[tuple[str, Mapping[str, Any] | None]]:
    """Names, each with its options if it has some."""
    found: list[tuple[str, Mapping[str, Any] | None]] = []
    for entry in entries:
        found += list(entry.items()) if isinstance(entry, dict) else [(str(entry), None)]
    return found


def _of_condition(statistic: Statistic | OfTable | None, condition: str) -> Statistic | None:
    if not isinstance(statistic, Statistic):
        return None
    return Statistic(statistic.name, statistic.sites, statistic.minus, statistic.position, condition)


def _statistic(where: str, entry: Mapping[str, Any]) -> Statistic | OfTable | None:
    asked = entry.get("statistic")
    if asked is None:
        return None
    if isinstance(asked, dict):
        _known(f"{where}: statistic", asked, ("table", "column", "where", "less"))
        if not {"table", "column"} <= asked.keys():
            raise UserError(f"{where}: statistic: expected table and column")
        return OfTable(
            str(asked["table"]), str(asked["column"]), dict(asked.get("where", {})), dict(asked.get("less", {}))
        )
    _one_of(f"{where}: statistic", str(asked), (*STATISTICS, *PREFERENCE_STATISTICS))
    sites, minus, position = entry.get("sites", "upper"), entry.get("minus"), entry.get("position", "prompt_last")
    _one_of(f"{where}: sites", str(sites), SITES)
    if minus is not None:
        _one_of(f"{where}: minus", str(minus), SITES)
    _one_of(f"{where}: position", str(position), POSITIONS)
    return Statistic(str(asked), str(sites), minus, position)


def _bound(where: str, entry: Mapping[str, Any]) -> Bound:
    given = [side for side in get_args(Side) if side in entry]
    if len(given) != 1 or isinstance(entry[given[0]], bool) or not isinstance(entry[given[0]], int | float):
        raise UserError(f"{where}: expected one threshold, a number under {', '.join(get_args(Side))}")
    return Bound(given[0], float(entry[given[0]]))


def _known(where: str, entry: Mapping[str, Any], keys: Iterable[str]) -> None:
    for key in entry:
        _one_of(where, str(key), keys)


def _one_of(where: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        raise UserError(f"{where}: there is no {name}{did_you_mean(name, names)} (there are: {', '.join(names)})")
