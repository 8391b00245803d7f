"""Results of a run beside its models: provenance, figures per held-out pair, and the closing table."""

import csv
import io
import math
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from analysis.behaviour.words import LeadRow, lead_rows
from analysis.figures.layer_curves import geometry_table
from analysis.open.kept_models import DATA, FILES, PROVENANCE, read_provenance
from analysis.open.observed import Observed
from analysis.open.probe_pairs import PROMPTS_FILE, ProbePair
from launch.parts import Parts
from tiltmeter.files import write_json, write_text
from tiltmeter.metric_names import keys_of, metric
from tiltmeter.scoring.behaviour import FIGURES, read_table
from tiltmeter.stats.proportions import share_interval

CHANGES = "changed_settings"
"""Key of provenance.json: config.yaml holds the settings of a run's last steps, this says from which step on."""
_PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "hydra-core", "wandb", "safetensors")


def provenance(parts: Parts) -> dict[str, Any]:
    """Code, versions, data and model that a run was made from."""
    return {
        "git_commit": git_commit(),
        "versions": versions(),
        DATA: {name: parts.data.digest(name) for name in parts.data.splits},
        "data_sources": {report.source: report.location for report in parts.data.reports},
        "model_revision": parts.model_revision,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    return {"python": sys.version.split()[0], **{name: version(name) for name in _PACKAGES}}


def git_commit() -> str | None:
    """Commit of the code, with ``+changes`` when the tree differs from it; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_provenance(run_dir: Path, parts: Parts, *, step: int, changed: Sequence[str]) -> None:
    """provenance.json; what it says of models that are there already, and of settings that were changed before, stays.

    Args:
        step: optimizer steps that were taken under the settings of before.
        changed: what is another setting from there on, a line each.
    """
    before = read_provenance(run_dir)
    changes = [entry for entry in before.get(CHANGES, []) if entry["after_step"] < step]
    changes += [{"after_step": step, "settings": list(changed)}] if changed else []
    write_json(run_dir / PROVENANCE, provenance(parts) | {FILES: before.get(FILES, {}), CHANGES: changes})


def write_results(run_dir: Path, parts: Parts) -> None:
    """held_out.csv (the last validation, a row a pair) and probe_prompts.json (pairs to be asked again)."""
    write_json(run_dir / PROMPTS_FILE, _probe_pairs(parts))
    if parts.module.validation_table is not None:
        write_text(run_dir / "held_out.csv", _held_out_table(parts, parts.module.validation_table))


def result_rows(parts: Parts, trainer: Trainer, seconds: float) -> list[tuple[str, str]]:
    """Figures of the closing table: name and value."""
    known = {name: float(value) for name, value in trainer.callback_metrics.items()}
    module = parts.module
    rows = [("optimizer steps", f"{trainer.global_step} in {seconds:.0f} s, reference and validation included")]
    rows += [(name, f"{known[name]:.4f}") for split in ("train", "val") if (name := metric(split, "loss")) in known]
    rows += [(name, f"{known[name]:.4f}") for name in keys_of("sparse") if name in known]
    if module.validation_table is not None and "rewards/accuracies" in module.columns:
        rows.append(("held-out preference accuracy", _held_out_accuracy(parts, module.validation_table, trainer)))
    if module.throughput.seconds:
        rows.append(
            ("throughput", f"{module.throughput.pairs / module.throughput.seconds:.1f} pairs/s in training steps")
        )
    if torch.cuda.is_available():
        rows.append(("peak GPU memory", f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"))
    return rows


def _held_out_accuracy(parts: Parts, table: Tensor, trainer: Trainer) -> str:
    """Share of validation pairs whose chosen response has the higher reward, with its interval, as words."""
    module = parts.module
    column = table[:, module.columns.index("rewards/accuracies")].tolist()
    scored = [(v, g) for v, g in zip(column, parts.data.splits["val"].groups, strict=True) if not math.isnan(v)]
    interval = share_interval([v for v, _ in scored], [g for _, g in scored])
    when = "" if module.validated_at_step == trainer.global_step else f", after step {module.validated_at_step}"
    return f"{interval.value:.3f}  (95 % CI {interval.low:.3f} … {interval.high:.3f}, {len(scored)} pairs{when})"


def geometry_of(run_dir: Path) -> pd.DataFrame:
    """The update at every site as last observed, with its controls; empty for a run without a probe."""
    seen = Observed.stored(run_dir, pd.read_csv(run_dir / "metrics.csv"))
    return geometry_table(seen.table, seen.random)


def behaviour_of(run_dir: Path) -> list[LeadRow]:
    """Figures of the model now, beside its base; none for a run that scored nothing."""
    return lead_rows(read_table(run_dir / "report" / "tables" / FIGURES))


def _held_out_table(parts: Parts, table: torch.Tensor) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["pair_id", "source", "prompt", *parts.module.columns])
    numbers: dict[str, int] = {}  # prompts by number: their texts are the data set's, and may be anything
    for record, values in zip(parts.data.splits["val"].records, table.tolist(), strict=True):
        if any(math.isnan(value) for value in values):
            continue  # trainer.limit_val_batches left it out
        writer.writerow([record.pair_id, record.source, numbers.setdefault(record.group, len(numbers)), *values])
    return text.getvalue()


def _probe_pairs(parts: Parts) -> list[dict[str, Any]]:
    """The probe's pairs, to be asked again: samples that people read, scores by other scorers."""
    split = parts.data.splits["probe" if parts.data.splits["probe"].pairs else "val"]
    return [ProbePair.of(record, ids).as_json() for record, ids in zip(split.records, split.pairs, strict=True)]
