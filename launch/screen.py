"""The terminal: a table of what was loaded and dropped, one progress bar, one closing table, the next command."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from analysis.behaviour.words import LeadRow, as_counts, has_interval, number
from analysis.controls.c08_random_weights import difference, is_known, verdict
from analysis.report.site_axes import as_text
from datamodules.preference import PreferenceDataModule
from datamodules.records import LoadReport
from datamodules.tokenization import TokenizationReport

_SILENCED = (
    "lightning",
    "lightning.pytorch",
    "lightning.fabric",
    "transformers",
    "datasets",
    "wandb",
    "httpx",
    "torch",
)
_SCORER_CHARACTERS = 76
_NARROWEST_TEXT = 14
"""Columns of a terminal below which a column of words is no longer read easily."""


class FittingTable(Table):
    """A table that never cuts a figure: words wrap, and where that isn't enough, every cell gets a line of its own."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield what rich prints."""
        for column in self.columns:
            column.overflow = "fold"
        if self._least_width(console) <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield Text(str(self.title), style="bold")
        names = [" ".join(str(column.header).split()) for column in self.columns]
        for first, *others in zip(*(column.cells for column in self.columns), strict=True):
            yield Text(f"{names[0]} {first}".strip() if first else "–")
            for name, cell in zip(names[1:], others, strict=True):
                yield Text(f"  {name}: {cell}" if name else f"  {cell}")
        if self.caption:
            yield Text(str(self.caption))

    def _least_width(self, console: Console) -> int:
        wide, least = console.options.update(width=10_000), self._extra_width
        for column in self.columns:
            shortest, longest = self._measure_column(console, wide, column)
            is_figure = column.no_wrap or column.justify == "right"
            least += longest if is_figure else min(shortest, _NARROWEST_TEXT)
        return least


def quiet_libraries() -> None:
    """Silence warnings that a user of this program can do nothing about; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault(
        "DISABLE_SAFETENSORS_CONVERSION", "1"
    )  # transformers would ask a public service to convert weights
    for name in _SILENCED:
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for module in ("lightning", "torch", "transformers", "pydantic"):
        warnings.filterwarnings("ignore", module=rf"{module}\b.*")


def data_table(data: PreferenceDataModule, labels: str) -> Table:
    """A table of what each source gave and lost, and of what tokenisation did to each split."""
    table = FittingTable(title="Data", title_justify="left", title_style="bold")
    for column, justify in (("source or split", "left"), ("pairs", "right"), ("dropped, cut or noted", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for report in data.reports:
        table.add_row(
            f"{report.source} ({report.location})", f"{report.n_kept} of {report.n_rows}", _source_remarks(report)
        )
    if data.repeats:
        table.add_row("all sources together", "", "; ".join(f"{n} {what}, kept" for what, n in data.repeats.items()))
    for name, remark in _how_written(data).items():
        table.add_row(name, "", remark)
    table.add_section()
    for name, split in data.splits.items():
        remarks = _cut_remarks(split.report, data.max_length) + _split_remarks(name, len(split.pairs), labels)
        table.add_row(name, str(len(split.pairs)), "; ".join(remarks) or "–")
    return table


def _how_written(data: PreferenceDataModule) -> dict[str, str]:
    found = {} if data.written_as is None else {"text format": "{}: {}".format(*data.written_as)}
    if day := data.printed_date:
        found["chat template"] = f"prints the date, {day} in all texts and when the run goes on (chat_date)"
    return found


def _split_remarks(name: str, n_pairs: int, labels: str) -> list[str]:
    if name == "train" and labels != "given":
        return [f"labels {labels} (control)"]
    if name == "val" and not n_pairs:
        return ["datamodule.val_pairs=0: no validation, no held-out metrics, no best checkpoint"]
    return []


def _cut_remarks(report: TokenizationReport, max_length: int) -> list[str]:
    counts = {
        **report.dropped,
        f"prompts cut from the left to fit {max_length} tokens": report.prompts_cut,
        "responses cut": report.responses_cut,
        "with words of special tokens, taken as plain text": report.special_words,
    }
    return [f"{n} {what}" for what, n in counts.items() if n]


def _source_remarks(report: LoadReport) -> str:
    dropped = [f"{n} {reason}" for reason, n in sorted(report.dropped.items(), key=lambda item: -item[1])]
    return "; ".join(dropped + [f"{k}: {v}" for k, v in report.notes.items()]) or "–"


def result_table(rows: Sequence[tuple[str, str]]) -> Table:
    """The closing table: figure and value."""
    table = FittingTable(title="Result", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="cyan")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return table


def geometry_tables(last: pd.DataFrame) -> Iterator[Table]:
    """Tables of what training did to hidden states, a line a site: f beside its controls, then other figures beside random weights.

    Args:
        last: :func:`analysis.figures.layer_curves.geometry_table`; empty: no tables.
    """
    if last.empty:
        return
    where = f"ΔH = policy − base at {last['position'].iloc[0]}, after {last['steps_taken'].iloc[0]:.0f} steps"
    f, rho, ratio, cosine = "shift_share", "top1_energy", "sigma_ratio", "mean_cosine_leave_one_out"
    shares = [("f", last[f]), ("random\nweights", last[f"{f}_random"]), ("their\nrange", _ranges(last, f))]
    shares += [("f less\nrandom", [_signed(x) for x in difference(last, f)]), ("f of\nbase", last[f"{f}_base"])]
    shares += [("f at\ncontent", last[f"{f}_content"]), ("random\nthere", last[f"{f}_content_random"])]
    said = f".\n Beside random weight changes of equal norm it is {verdict(last, f)}" if is_known(last, f) else ""
    yield _site_table(f"Hidden states: {where}", last, shares, f" f: share of ΔH that is one constant row{said}")
    others = []
    for column, heading in ((rho, "ρ₁"), (f"{rho}_centred", "ρ₁ centred"), (ratio, "σ₂/σ₁")):
        others.append((f"{heading}\n| random", _side_by_side(last[column], last[f"{column}_random"])))
    cosines = _side_by_side(last[cosine], last[f"{cosine}_random"], last[f"{cosine}_base"])
    others.append(("cosine\n| random | base", cosines))
    yield _site_table("", last, others, " cosine: mean cosine of a row with the mean of the others\n")


def _site_table(title: str, last: pd.DataFrame, columns: Sequence[tuple[str, Any]], caption: str) -> Table:
    table = FittingTable(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=Text(caption),
    )
    table.caption_justify = "left"
    table.add_column("site", no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    cells = [[x if isinstance(x, str) else number_or_dash(x) for x in values] for _, values in columns]
    for site, *line in zip(last["site"], *cells, strict=True):
        table.add_row(site, *line)
    return table


def number_or_dash(value: float) -> str:
    """Three decimals, or – for what is not known.

    >>> number_or_dash(0.1234), number_or_dash(float("nan"))
    ('0.123', '–')
    """
    return "–" if value != value else f"{value:.3f}".replace("-", "−")


def _signed(value: float) -> str:
    return "–" if value != value else as_text(value, "+.3f")


def _side_by_side(*columns: pd.Series) -> list[str]:
    """Figures of a site in one cell, without the zero before the point: the table fits 80 characters."""
    return [" | ".join(number_or_dash(x).replace("0.", ".") for x in row) for row in zip(*columns, strict=True)]


def _ranges(last: pd.DataFrame, column: str) -> list[str]:
    ends = zip(last[f"{column}_random_low"], last[f"{column}_random_high"], strict=True)
    return ["–" if low != low else f"{low:.2f} … {high:.2f}" for low, high in ends]


def behaviour_table(rows: Sequence[LeadRow]) -> Table:
    """A table of figures of behaviour, a line each; the scorers that its last column counts stand below."""
    steps = max(row.last.steps_taken for row in rows)
    table = FittingTable(
        title=f"Behaviour: policy beside its base, after {steps:.0f} steps",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption_justify="left",
    )
    are_of_one_step = all(row.last.steps_taken == steps for row in rows)
    for heading in ("figure", *(() if are_of_one_step else ("step",)), "base", "policy", "95 % interval", "n", "by"):
        table.add_column(heading, justify="left" if heading == "figure" else "right", no_wrap=True)
    scorers: dict[str, int] = {}
    for figure, before, last in rows:
        interval = f"{number(last.ci_low)} … {number(last.ci_high)}" if has_interval(last) else "–"
        by = str(scorers.setdefault(last.scorer, len(scorers) + 1))
        when = () if are_of_one_step else (f"{last.steps_taken:.0f}",)
        table.add_row(figure, *when, number(before), number(last.value), interval, as_counts(last), by)
    table.caption = Text("\n".join(f" {i} {_cut(name)}" for name, i in scorers.items()) + "\n")
    return table


def _cut(text: str) -> str:
    return text if len(text) <= _SCORER_CHARACTERS else f"{text[: _SCORER_CHARACTERS - 1]}…"


def console(*, enabled: bool = True) -> Console:
    """Standard output, in which brackets are no markup; nothing on processes other than the first."""
    return Console(quiet=not enabled, soft_wrap=False, highlight=False, markup=False)
