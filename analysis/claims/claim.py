"""Claims as data: what is said, the number T that it is about, its threshold, and what could refute it; read from YAML.

A claim of one's own is one more entry, over statistics of hidden states or over any table of a report (docs/claims.md).
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import yaml

from analysis.claims.statistics import (
    PREFERENCE_STATISTICS,
    SITES,
    STATISTICS,
    Source,
    Statistic,
)
from analysis.open.studies import DPO
from tiltmeter.errors import UserError
from tiltmeter.plain_text import did_you_mean
from tiltmeter.stats.arms import Arm

Side = Literal["at_least", "above", "at_most", "below"]
_SIDES: Mapping[str, tuple[Callable[[float, float], bool], str]] = {
    "at_least": (operator.ge, "≥"),
    "above": (operator.gt, ">"),
    "at_most": (operator.le, "≤"),
    "below": (operator.lt, "<"),
}
ARMS = (
    "dpo", "sft_chosen", "dpo_shuffled", "dpo_swapped", "dpo_random_pairs", "lm_continued", "constant_vector",
    "constant_vector_shuffled", "fsrl",
)  # fmt: skip
"""Arms of a study that are shipped (conf/arm, docs/claims.md)."""
DRAWN = ("random_update", "random_update_rotated")
"""Arms that are drawn, not trained; a further draw has to be passed, and not their mean."""
_POSITIONS = ("prompt_last", "content")
"""Positions that runs store for it."""
OWN = ("base_states", "permuted")
"""Controls that are computed of the same runs."""


class Within(NamedTuple):
    """Margin around the value that a figure has if nothing changed."""

    equals: float
    margin: float

    def reach(self, low: float, high: float) -> float:
        """Distance of the farther end of an interval from the value, in margins; up to 1 is equivalence, at 2.5 % a side.

        >>> Within(1.0, 0.05).reach(0.975, 0.995)
        0.5000000000000004
        """
        return max(abs(low - self.equals), abs(high - self.equals)) / self.margin


@dataclass(frozen=True)
class OfTable:
    """T as a number of a report's table: the mean of a column over the rows that are meant.

    Args:
        table: its file's name in report/tables/.
        column: of the table.
        where: column → value of the rows.
        less: column → value of the rows whose mean is taken off, where they differ from those meant; empty: none is.
        within: if there is one, T is the largest distance of a row's 95 % interval from a value, instead of a mean.
    """

    table: str
    column: str
    where: Mapping[str, str | float | bool]
    less: Mapping[str, str | float | bool] = field(default_factory=dict)
    within: "Within | None" = None
    conditions: ClassVar[tuple[str, ...]] = ()
    """Conditions that it can be told of: none."""

    def under(self, condition: str) -> Statistic:
        """Raises ValueError: a table can't be told of a condition."""
        raise ValueError(f"a table can't be told of {condition}")

    def of_arm(self, name: str, arms: Source) -> Arm | str:
        """T in the runs of an arm; text: why it is not known."""
        return arms.of_table(name, self)


@dataclass(frozen=True)
class Gained:
    """T as the share of what dpo gains in held-out loss that another arm gains: (L₀ − L) / (L₀ − L_dpo).

    Args:
        arm: that other arm.
    """

    arm: str
    conditions: ClassVar[tuple[str, ...]] = ()
    """Conditions that it can be told of: none."""

    def under(self, condition: str) -> Statistic:
        """Raises ValueError: losses can't be told of a condition."""
        raise ValueError(f"held-out losses can't be told of {condition}")

    def of_arm(self, name: str, arms: Source) -> Arm | str:
        """T in the runs of an arm, by default of its own; text: why it is not known."""
        return arms.of_losses(self.arm if name == DPO else name)


@dataclass(frozen=True)
class Unchanged:
    """T as the least multiple of their margins within which all of some figures are equivalent to unchanged.

    An interval inside its margins is equivalence by two one-sided tests (:mod:`tiltmeter.stats.equivalence`), and all figures have
    to pass, so that no adjustment for their number is needed (the intersection–union test; Berger 1982).

    Args:
        figures: of tables, each within its margin.
    """

    figures: tuple[OfTable, ...]
    conditions: ClassVar[tuple[str, ...]] = ()
    """Conditions that it can be told of: none."""

    def under(self, condition: str) -> Statistic:
        """Raises ValueError: tables can't be told of a condition."""
        raise ValueError(f"tables can't be told of {condition}")

    def of_arm(self, name: str, arms: Source) -> Arm | str:
        """T in the runs of an arm; text: why it is not known."""
        found = [arms.of_table(name, figure) for figure in self.figures]
        missing = [one for one in found if isinstance(one, str)]
        known = [one.values for one in found if not isinstance(one, str)]
        return missing[0] if missing else Arm(torch.stack(known).max(0).values)


Asked = Statistic | OfTable | Gained | Unchanged
"""Everything that a claim can be about."""


@dataclass(frozen=True)
class Bound:
    """A threshold τ, and on which side of it T has to lie."""

    side: Side
    value: float

    def holds(self, value: float) -> bool:
        """Whether a number is on the right side; NaN isn't."""
        return bool(_SIDES[self.side][0](value, self.value))

    @property
    def is_lower(self) -> bool:
        """True where T has to be large."""
        return self.side in ("at_least", "above")

    def __str__(self) -> str:
        """As it is printed: ``≥ 0.9``."""
        return f"{_SIDES[self.side][1]} {self.value:g}"


@dataclass(frozen=True)
class Survival:
    """Condition under which a claim still has to hold."""

    name: str
    statistic: Asked | None
    """T there; None: nothing here computes it yet."""
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
        arm: whose runs T is told of.
    """

    key: str
    says: str
    statistic: Asked | None
    bound: Bound
    beats: Mapping[str, Asked | None]
    survives: tuple[Survival, ...]
    arm: str = DPO


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
    _known(
        where, entry, ("says", "arm", "statistic", *get_args(Side), "sites", "minus", "position", "beats", "survives")
    )
    if "says" not in entry:
        raise UserError(f"{where}: says is missing: the claim in words")
    bound = _bound(where, entry)
    statistic = _statistic(where, entry, arms)
    beats: dict[str, Asked | None] = {}
    for name in map(str, entry.get("beats", ())):
        _one_of(f"{where}: beats", name, (*arms, *DRAWN, *OWN))
        beats[name] = _under(f"{where}: beats", statistic, name) if name in OWN else statistic
    survives = tuple(
        _survival(f"{where}: survives", str(name), option, statistic, bound, arms)
        for name, option in _named(entry.get("survives", ()))
    )
    arm = str(entry.get("arm", DPO))
    _one_of(f"{where}: arm", arm, arms)
    return Claim(key, str(entry["says"]), statistic, bound, beats, survives, arm)


def _survival(
    where: str,
    name: str,
    option: Mapping[str, Any] | None,
    statistic: Asked | None,
    bound: Bound,
    arms: Sequence[str],
) -> Survival:
    if option is None:
        return Survival(name, _under(where, statistic, name), bound)
    here = f"{where}: {name}"
    _known(here, option, ("statistic", "sites", "minus", "position", *get_args(Side)))
    own = _statistic(here, option, arms) if "statistic" in option else statistic
    return Survival(name, own, _bound(here, option) if any(side in option for side in get_args(Side)) else bound)


def _named(entries: Any) -> list[tuple[str, Mapping[str, Any] | None]]:
    """Names, each with its options if it has some."""
    found: list[tuple[str, Mapping[str, Any] | None]] = []
    for entry in entries:
        found += list(entry.items()) if isinstance(entry, dict) else [(str(entry), None)]
    return found


def _under(where: str, statistic: Asked | None, condition: str) -> Statistic | None:
    """The statistic under a condition. Raises UserError: it can't be told of it."""
    if statistic is None:
        return None
    if not statistic.conditions:
        _has_no(where, {condition: ""}, "a number that is read, not computed of states")
    _one_of(where, condition, statistic.conditions)
    return statistic.under(condition)


def _statistic(where: str, entry: Mapping[str, Any], arms: Sequence[str]) -> Asked | None:
    asked = entry.get("statistic")
    places = {key: str(entry[key]) for key in ("sites", "minus", "position") if entry.get(key) is not None}
    if isinstance(asked, dict) and "gained_by" in asked:
        _known(f"{where}: statistic", asked, ("gained_by",))
        _one_of(f"{where}: statistic: gained_by", str(asked["gained_by"]), arms)
        _has_no(where, places, "held-out losses")
        return Gained(str(asked["gained_by"]))
    if isinstance(asked, dict) and "unchanged" in asked:
        _known(f"{where}: statistic", asked, ("unchanged",))
        _has_no(where, places, "tables, whose rows are named under where")
        return _unchanged(f"{where}: statistic: unchanged", asked["unchanged"])
    if isinstance(asked, dict):
        _has_no(where, places, "a table, whose rows are named under where")
        return _of_table(f"{where}: statistic", asked, ("less",))
    if asked is None:
        _has_no(where, places, "no statistic")
        return None
    _one_of(f"{where}: statistic", str(asked), (*STATISTICS, *PREFERENCE_STATISTICS))
    for key, known in (("sites", SITES), ("minus", SITES), ("position", _POSITIONS)):
        if key in places:
            _one_of(f"{where}: {key}", places[key], known)
    if str(asked) in PREFERENCE_STATISTICS:
        _has_no(
            where, {key: value for key, value in places.items() if key == "position"}, f"{asked}, which has its own"
        )
    return Statistic(str(asked), **places)  # type: ignore[arg-type]


def _of_table(where: str, asked: Any, options: Sequence[str]) -> OfTable:
    """A table's number; options that it takes beside its place."""
    if not isinstance(asked, dict) or not {"table", "column"} <= asked.keys():
        raise UserError(f"{where}: expected table and column, got {asked!r:.60}")
    _known(where, asked, ("table", "column", "where", *options))
    meant, less = (dict(asked.get(key, {})) for key in ("where", "less"))
    return OfTable(str(asked["table"]), str(asked["column"]), meant, less)


def _unchanged(where: str, asked: Any) -> Unchanged:
    """Figures, each with the margin within which it is unchanged, and its value if nothing changed (0 unless said)."""
    if not isinstance(asked, list) or not asked:
        raise UserError(f"{where}: expected a list of figures, each with table, column and margin, got {asked!r:.60}")
    figures = []
    for i, entry in enumerate(asked):
        here = f"{where}[{i}]"
        figure = _of_table(here, entry, ("margin", "equals"))
        margin, equals = entry.get("margin"), entry.get("equals", 0.0)
        if not _is_number(margin) or margin <= 0 or not _is_number(equals):
            raise UserError(f"{here}: expected a margin above 0 and equals, numbers, got {margin!r} and {equals!r}")
        figures.append(replace(figure, within=Within(float(equals), float(margin))))
    return Unchanged(tuple(figures))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _has_no(where: str, given: Mapping[str, str], what: str) -> None:
    """Refuse an option that would have no effect."""
    for key in given:
        raise UserError(f"{where}: {key}: has no effect on {what}; leave it out")


def _bound(where: str, entry: Mapping[str, Any]) -> Bound:
    given = [side for side in get_args(Side) if side in entry]
    if len(given) != 1 or not _is_number(entry[given[0]]):
        raise UserError(f"{where}: expected one threshold, a number under {', '.join(get_args(Side))}")
    return Bound(given[0], float(entry[given[0]]))


def _known(where: str, entry: Mapping[str, Any], keys: Iterable[str]) -> None:
    for key in entry:
        _one_of(where, str(key), keys)


def _one_of(where: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        raise UserError(f"{where}: there is no {name}{did_you_mean(name, names)} (there are: {', '.join(names)})")
