"""What one observation costs without its forward pass: rows streamed through ``tiltmeter.geometry.moments``, then all spectra."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Message, forget_peak_memory, peak_memory_mb, resident_memory_mb
from benchmarks.worker import Channel, Turns
from tiltmeter.geometry.moments import MATRICES, UpdateMoments
from tiltmeter.geometry.rows import Variant

ROWS_AT_A_TIME = 512
VARIANTS: tuple[Variant, ...] = ("raw", "centred")
N_SPECTRA = len(MATRICES) * len(VARIANTS)
"""Spectra of one site: those that ``SpectralEntropy`` logs by default."""


@dataclass(frozen=True)
class Case:
    """One cell of the table; travels as JSON."""

    n_rows: int
    """Prompts of the probe, one row each."""
    d_model: int
    n_sites: int
    """Sites that are measured; any number costs as many times one."""
    n_spectra: int = N_SPECTRA
    """Spectra of the first site that are timed; the others are alike."""

    def as_json(self) -> dict[str, Any]:
        """For the command line of a worker."""
        return asdict(self)


def synthetic_rows(n_rows: int, d_model: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hidden states of a base and a policy: a common mean, a few wide directions, and an update that is mostly one shift."""
    scales = 1 / (1 + torch.arange(d_model)).float().sqrt()
    base = torch.randn(n_rows, d_model, generator=generator) * scales + 1
    return base, base + 0.1 + 0.03 * torch.randn(n_rows, d_model, generator=generator)


def stream(case: Case, moments: list[UpdateMoments]) -> float:
    """Seconds that accumulators take for all rows of all sites; making the rows is not counted."""
    generator = torch.Generator().manual_seed(0)
    seconds = 0.0
    for at in range(0, case.n_rows, ROWS_AT_A_TIME):
        base, policy = synthetic_rows(min(ROWS_AT_A_TIME, case.n_rows - at), case.d_model, generator)
        started = time.perf_counter()
        for site in moments:
            site.update(base, policy)
        seconds += time.perf_counter() - started
    return seconds


def decompose(case: Case, moments: list[UpdateMoments]) -> float:
    """Seconds for the spectra of all sites; where only some were timed, as many times more as there are."""
    wanted = [(matrix, variant) for variant in VARIANTS for matrix in MATRICES][: case.n_spectra]
    started = time.perf_counter()
    for site in moments:
        for matrix, variant in wanted:
            site.of[matrix].geometry(variant)
    return (time.perf_counter() - started) * N_SPECTRA / case.n_spectra


def held_mb(moments: list[UpdateMoments]) -> float:
    """What accumulators hold, in 10^6 bytes: rows that are kept or wait, means and scatters."""
    tensors: list[Tensor | None] = []
    for rows in (rows for site in moments for rows in site.of.values()):
        tensors += rows._kept
        for part in rows._folded or ():
            tensors += [part.mean, part.scatter]
    return sum(x.nbytes for x in tensors if x is not None) / 1e6


def work(settings: Message, channel: Channel) -> Message:
    """Measure one case; the first turn warms up."""
    case = Case(**settings)
    turns = Turns([0, 1], channel, lambda: None)
    warm = UpdateMoments(8, max_rows_kept=0)
    stream(Case(64, 8, 1), [warm])
    decompose(Case(64, 8, 1), [warm])
    turns.before_step()
    forget_peak_memory()
    before = resident_memory_mb()
    moments = [UpdateMoments(case.d_model) for _ in range(case.n_sites)]
    stream_seconds = stream(case, moments)
    held = held_mb(moments)
    spectra_seconds = decompose(case, moments)
    turns.end()
    return {
        "stream_seconds": stream_seconds,
        "spectra_seconds": spectra_seconds,
        "held_mb": held,
        "peak_mb": peak_memory_mb("cpu") - before,
        "keeps_rows": moments[0].of["delta"].keeps_rows,
    }
