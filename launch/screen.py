"""What a person sees in the terminal: what was loaded and dropped, one progress bar, one closing table, the next command."""

import logging
import os
import warnings
from collections.abc import Sequence
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from analysis.behaviour_words import LeadRow, as_counts, has_interval, number
from analysis.layer_curves import shown_table
from analysis.observations import GeometryRow
from datamodules.preference import PreferenceDataModule
from datamodules.records import LoadReport

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
    """What each source gave and lost, and what tokenisation did to each split."""
    table = Table(title="Data", title_justify="left", title_style="bold")
    for column, justify in (("source or split", "left"), ("pairs", "right"), ("dropped, cut or noted", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for report in data.reports:
        table.add_row(
            f"{report.source} ({report.location})", f"{report.n_kept} of {report.n_rows}", _source_remarks(report)
        )
    if data.repeats:
        table.add_row("all sources together", "", "; ".join(f"{n} {what}, kept" for what, n in data.repeats.items()))
    table.add_section()
    for name, split in data.splits.items():
        remarks = [f"{n} {reason}" for reason, n in split.report.dropped.items()]
        if split.report.prompts_cut:
            remarks.append(f"{split.report.prompts_cut} prompts cut from the left to fit {data.max_length} tokens")
        if split.report.responses_cut:
            remarks.append(f"{split.report.responses_cut} responses cut")
        if split.report.special_words:
            remarks.append(f"{split.report.special_words} with words of special tokens, taken as plain text")
        if name == "train" and labels != "given":
            remarks.append(f"labels {labels} (control)")
        table.add_row(name, str(len(split.pairs)), "; ".join(remarks) or "–")
    return table


def _source_remarks(report: LoadReport) -> str:
    dropped = [f"{n} {reason}" for reason, n in sorted(report.dropped.items(), key=lambda item: -item[1])]
    return "; ".join(dropped + [f"{k}: {v}" for k, v in report.notes.items()]) or "–"


def result_table(rows: Sequence[tuple[str, str]]) -> Table:
    """The closing table: figure and value."""
    table = Table(title="Result", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="cyan")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return table


def geometry_table(rows: Sequence[GeometryRow]) -> Table:
    """What training did to hidden states, a line a site."""
    where = f"ΔH = policy − base at {rows[0].position}, after {rows[0].steps_taken} steps"
    table = Table(
        title=f"Hidden states: {where}", title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    shown = shown_table(rows)
    for heading in shown.columns:
        justify: Literal["left", "right"] = "left" if heading == "site" else "right"
        narrow = heading.replace(" ", "\n").replace("leave-", "leave-\n")  # the table fits 80 characters
        table.add_column(narrow, justify=justify, no_wrap=True)
    for line in shown.itertuples(index=False):
        table.add_row(*line)
    return table


def behaviour_table(rows: Sequence[LeadRow]) -> Table:
    """What the model says, a line a figure; the scorers that its last column counts stand below."""
    steps = max(row.last.steps_taken for row in rows)
    table = Table(
        title=f"Behaviour: policy beside its base, after {steps:.0f} steps",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
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
    """Standard output; nothing on processes other than the first."""
    return Console(quiet=not enabled, soft_wrap=False, highlight=False)
