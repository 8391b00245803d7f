"""People's own preference data: files in any of TRL's forms, saved data sets, and data sets of the Hugging Face hub."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NoReturn

from datamodules.files.malformed import Malformed, MalformedRows, check_policy
from datamodules.files.preference_forms import COLUMNS, FORMS, TRANSCRIPTS, UNPAIRED, Parsed, Row, common_form, parse
from datamodules.files.tables import Table, hub_table, local_tables, unique_names
from datamodules.records import AttributeValue, LoadReport, Message, PreferencePair
from tiltmeter.errors import UserError
from tiltmeter.plain_text import did_you_mean

N_FIRST = 50
"""Rows that tell a table's form."""
MOST_SOURCES = 50
"""Values that ``source_column`` may have; each becomes a set of metrics."""
_SCORES = ("score_chosen", "score_rejected")


class PreferenceFile:
    """Preference pairs of files or of a data set on the hub, whatever their form; see docs/data.md for the forms.

    Args:
        path: a ``.jsonl``, ``.jsonl.gz``, ``.json``, ``.parquet``, ``.csv`` or ``.tsv`` file, a folder of them, a folder
            written by ``save_to_disk``, or a list of these.
        name: instead of ``path``, a data set of the hub such as ``trl-lib/ultrafeedback_binarized``. No code of it is run.
        config, revision: of the data set on the hub.
        split: of the data set on the hub or a saved one, by default ``train``; of a folder, the files whose name contains it, by
            default all.
        validation_path: files of pairs to validate on and to probe, like ``path``; training then takes none of their prompts.
            None: some prompts of ``path`` are held out.
        columns: names of columns that are called otherwise, such as ``{prompt: question}``.
        source_column: column whose value is each pair's source, for metrics of each; None: the file is.
        min_margin: least ``score_chosen`` − ``score_rejected`` of the pairs to keep; None: all.
        malformed: what to do with rows that can't be read: ``strict`` refuses the first, ``skip`` leaves up to 1 % of a file
            out and says so.

    Raises:
        UserError: neither or both of ``path`` and ``name``, options of the one with the other, or an unknown column or policy.
    """

    name = "preferences"

    def __init__(
        self,
        path: str | Sequence[str] | None = None,
        name: str | None = None,
        config: str | None = None,
        split: str | None = None,
        revision: str | None = None,
        validation_path: str | Sequence[str] | None = None,
        columns: Mapping[str, str] | None = None,
        source_column: str | None = None,
        min_margin: float | None = None,
        malformed: Malformed = "strict",
    ) -> None:
        check_policy(malformed)
        if (path is None) == (name is None):
            got = "both" if path is not None else "neither"
            raise UserError(
                f"data: expected data.path=FILE_OR_FOLDER, or data.name=OWNER/NAME of the Hugging Face hub, got {got}"
            )
        if path is not None and (config, revision) != (None, None):
            raise UserError(
                "data.config, data.revision: only for data from the hub; leave them out together with data.path"
            )
        self.columns = _check_columns(columns or {})
        self.paths = _listed(path, "data.path")
        self.validation_paths = _listed(validation_path, "data.validation_path")
        self.hub = name
        self.config, self.split, self.revision = config, split, revision
        self.source_column = source_column
        self.min_margin = min_margin
        self.malformed: Malformed = malformed

    def load(self) -> tuple[list[PreferencePair], list[LoadReport]]:
        """All usable pairs in the order of files and rows, those of ``validation_path`` last; one report per table.

        Raises:
            UserError: missing or malformed files, a table in no known form, or one with no usable pair.
        """
        tables, left_out = self._tables()
        n_trained = len(tables)
        if self.validation_paths:
            held_out, _ = local_tables(self.validation_paths, None, "data.validation_path")
            tables = unique_names([*tables, *held_out], "data.validation_path")
        names = {table.whole for table in tables[:n_trained]}
        only = f"{self.name}/{next(iter(names))}" if len(names) == 1 else None
        loaded = [
            self._load(table, only or f"{self.name}/{table.whole}", is_held_out=i >= n_trained)
            for i, table in enumerate(tables)
        ]
        if left_out:
            loaded[0][1].notes["not read"] = ", ".join(left_out)
        pairs = [pair for found in _without_held_out_prompts(loaded) for pair in found]
        self._check_sources(pairs)
        return pairs, [report for _, report in loaded]

    def _tables(self) -> tuple[list[Table], list[str]]:
        if self.hub is not None:
            return [hub_table(self.hub, self.config, self.split, self.revision)], []
        return local_tables(self.paths, self.split)

    def _load(self, table: Table, source: str, *, is_held_out: bool) -> tuple[list[PreferencePair], LoadReport]:
        report = LoadReport(source=source, location=table.location)
        malformed = MalformedRows(self.malformed)
        rows = table.rows(malformed)
        first = list(islice(rows, N_FIRST))
        form = self._form([row for _, row in first], table.location)
        pairs: list[PreferencePair] = []
        n_reversed = 0
        for number, given in chain(first, rows):
            row = self._renamed(given)
            report.n_rows += 1
            parsed = parse(row, form)
            scores = _scores(row)
            refused = parsed if isinstance(parsed, str) else self._refuse_margin(scores)
            if isinstance(parsed, str) or refused is not None:
                report.dropped[str(refused)] += 1
                continue
            n_reversed += scores.get("score_margin", 0.0) < 0
            pair_id = f"{self.name}/{table.name}/{number - 1:05d}"
            pairs.append(_pair(pair_id, self._source_of(given, source), parsed, scores, is_held_out=is_held_out))
        report.n_kept = len(pairs)
        malformed.settle(report, report.n_rows)
        report.notes["form"] = form
        if n_reversed:
            report.notes["kept as they are"] = f"{n_reversed} rows whose chosen response has the lower score"
        if not pairs:
            reasons = ", ".join(f"{n} {reason}" for reason, n in report.dropped.most_common())
            raise UserError(f"{table.location}: no usable pair in {report.n_rows} rows of the form “{form}”: {reasons}")
        return pairs, report

    def _source_of(self, row: Row, usual: str) -> str:
        own = None if self.source_column is None else row.get(self.source_column)
        return usual if own is None else str(own)

    def _renamed(self, row: Row) -> dict[str, Any]:
        """A row with its columns under the names of :data:`~datamodules.files.preference_forms.COLUMNS`, others as they are."""
        named = {name: row.get(column) for name, column in self.columns.items()}
        known = {key: value for key, value in row.items() if key not in named}
        if "messages" not in named and "conversations" in row:
            named["messages"] = row["conversations"]
        return known | named

    def _form(self, rows: Sequence[Row], location: str) -> str:
        """The form of a table by its first rows. Raises UserError: none that is known, or a named column isn't there."""
        if not rows:
            raise UserError(f"{location}: no rows")
        there = sorted({name for row in rows for name, value in row.items() if value is not None})
        found = f"columns found: {', '.join(map(str, there)) or 'none'}"
        self._check_named(there, location, found)
        return common_form(map(self._renamed, rows)) or self._refuse_form(there, location, found)

    def _refuse_form(self, there: Collection[str], location: str, found: str) -> NoReturn:
        """Say why a table is in no known form. Raises UserError."""
        if {*UNPAIRED} <= {*there} and "rejected" not in there:
            raise UserError(
                f"{location}: unpaired rows ({found}): they don’t say which of two responses to one prompt was better, which DPO "
                "learns from; join for each prompt a completion of label true as chosen and one of label false as rejected"
            )
        lacking = [name for name in ("chosen", "rejected") if self.columns.get(name, name) not in there]
        if len(lacking) == 1:
            raise UserError(
                f"{location}: no column {lacking[0]}; {found}; if it is called otherwise, data.columns.{lacking[0]}=NAME"
            )
        forms = "; ".join(dict.fromkeys([*FORMS.values(), TRANSCRIPTS]))
        raise UserError(
            f"{location}: in no known form; {found}; known: {forms}; other names of columns by data.columns.prompt=NAME and "
            "so on (docs/data.md)"
        )

    def _check_named(self, there: Collection[str], location: str, found: str) -> None:
        """Refuse options that name columns which aren't there. Raises UserError."""
        for name, column in self.columns.items():
            if column not in there:
                raise UserError(f"{location}: data.columns.{name}={column}: no such column; {found}")
        if self.source_column is not None and self.source_column not in there:
            raise UserError(f"{location}: data.source_column={self.source_column}: no such column; {found}")
        if self.min_margin is not None and not {self.columns.get(name, name) for name in _SCORES} <= {*there}:
            raise UserError(
                f"{location}: data.min_margin: expected the columns score_chosen and score_rejected; {found}; name them by "
                "data.columns.score_chosen= and data.columns.score_rejected="
            )

    def _refuse_margin(self, scores: Mapping[str, float]) -> str | None:
        if self.min_margin is None:
            return None
        if "score_margin" not in scores:
            return "without two scores"
        return f"with a margin below {self.min_margin:g}" if scores["score_margin"] < self.min_margin else None

    def _check_sources(self, pairs: Sequence[PreferencePair]) -> None:
        sources = Counter(pair.source for pair in pairs)
        if self.source_column is not None and len(sources) > MOST_SOURCES:
            raise UserError(
                f"data.source_column={self.source_column}: {len(sources)} different values; each gets metrics of its own, so "
                f"expected a column with at most {MOST_SOURCES}"
            )


def _without_held_out_prompts(
    loaded: Sequence[tuple[Sequence[PreferencePair], LoadReport]],
) -> Iterator[Sequence[PreferencePair]]:
    """Pairs of each table, without training pairs whose prompt is held out; reports say how many were dropped."""
    prompts = {pair.group for pairs, _ in loaded for pair in pairs if pair.held_out}
    for pairs, report in loaded:
        kept = [pair for pair in pairs if pair.held_out or pair.group not in prompts]
        if len(kept) < len(pairs):
            report.dropped["whose prompt is in data.validation_path too"] = len(pairs) - len(kept)
        report.n_kept = len(kept)
        yield kept


def _listed(paths: str | Sequence[str] | None, key: str) -> list[str]:
    found = [] if paths is None else [paths] if isinstance(paths, str) else list(paths)
    if (paths is not None and not found) or not all(isinstance(path, str) and path for path in found):
        raise UserError(f"{key}: expected a file, a folder or a list of them, got {paths!r}")
    return found


def _check_columns(columns: Mapping[str, str]) -> dict[str, str]:
    for name, column in columns.items():
        if name not in COLUMNS or not isinstance(column, str):
            hint = "" if name in COLUMNS else did_you_mean(str(name), COLUMNS)
            raise UserError(
                f"data.columns.{name}={column}: expected the name of a column for {', '.join(COLUMNS)}{hint}"
            )
    return dict(columns)


def _scores(row: Row) -> dict[str, float]:
    """Scores of the two responses, as far as they are finite numbers, and their difference."""
    scores: dict[str, float] = {}
    for name in _SCORES:
        try:
            score = float(row[name])
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(score):
            scores[name] = score
    if len(scores) == len(_SCORES):
        scores["score_margin"] = scores["score_chosen"] - scores["score_rejected"]
    return scores


def _pair(
    pair_id: str, source: str, parsed: Parsed, attributes: Mapping[str, AttributeValue], *, is_held_out: bool
) -> PreferencePair:
    return PreferencePair(
        pair_id=pair_id,
        source=source,
        group=parsed.group,
        prompt=parsed.prompt,
        chosen=Message("assistant", parsed.chosen),
        rejected=Message("assistant", parsed.rejected),
        prompt_text=parsed.prompt_text,
        chosen_text=parsed.chosen_text,
        rejected_text=parsed.rejected_text,
        attributes=attributes,
        held_out=is_held_out,
    )
