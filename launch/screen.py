"""What a person sees in the terminal: what was loaded and dropped, one progress bar, one closing table, the next command."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from analysis.behaviour_words import LeadRow, as_counts, has_interval, number
from analysis.random_updates import difference, is_known, verdict
from analysis.site_axes import as_text
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


def geometry_tables(last: pd.DataFrame) -> Iterator[Table]:
    """What training did to hidden states, a line a site: f beside its controls, then other figures beside random weights.

    Args:
        last: :func:`analysis.layer_curves.geometry_table`; empty: no tables.
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
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
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
