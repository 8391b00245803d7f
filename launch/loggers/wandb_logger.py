"""Weights & Biases: online when logged in, else offline; never a prompt for a key, never a failure because of it."""

import os
import shlex
import ssl
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger

from analysis.report.wandb_login import is_logged_in
from tiltmeter.metric_names import MEDIA, METRICS, SCORED_STEP, STEP_AXIS, STEPS_TAKEN, find, metric

_UPDATE_READ = {
    *(metric("mean_cosine", "in_sample", of) for of in ("", "base", "random_update")),
    *(metric(family, "delta") for family in ("shift_share", "projection")),
}
"""One of these is logged whenever hidden states are compared with the base's."""
_REACH_SECONDS = 10.0
"""Seconds that a server may take to answer before the run is kept offline."""
Mode = Literal["auto", "online", "offline", "disabled"]


class RunLogger(WandbLogger):
    """Lightning's WandbLogger around a run that is already open, and deaf to W&B's own failures."""

    observed_at: int | None = None
    """Optimizer steps that had been taken when hidden states were last compared with the base's."""
    n_scored = 0
    """Number of times that scores of generated text were logged."""
    _failed = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars; the first failure is reported once, training and metrics.csv go on."""
        if any((found := find(name)) and found.site and found.key in _UPDATE_READ for name in metrics):
            self.observed_at = int(metrics[STEPS_TAKEN])
        self.n_scored += SCORED_STEP in metrics
        if self._failed:
            return
        try:
            super().log_metrics(metrics, step)
        except Exception as error:
            self._failed = True
            warnings.warn(f"W&B stopped taking metrics ({error}); metrics.csv goes on", stacklevel=2)


def close_wandb(logger: RunLogger) -> None:
    """Finish the run; what goes wrong there is reported and is no failure of the training."""
    try:
        logger.experiment.finish()
    except Exception as error:
        warnings.warn(f"W&B could not finish its run ({error}); metrics.csv has everything", stacklevel=2)


def open_wandb(
    *,
    run_dir: Path,
    config: Mapping[str, Any],
    name: str,
    group: str,
    mode: Mode = "auto",
    project: str = "tiltmeter",
    entity: str | None = None,
    tags: tuple[str, ...] = (),
) -> tuple[RunLogger | None, str]:
    """Open the W&B run of a training job; call on the first process only.

    Returns:
        the logger (None when disabled or when W&B fails) and one line that says where the run goes.

    A run folder that W&B has seen before is the same run there: its id is the end of the folders in ``wandb/``.
    """
    chosen = choose_mode(mode)
    if chosen == "disabled":
        return None, "W&B: disabled; metrics.csv has everything"
    reason = "not logged in, or WANDB_MODE says so"
    if chosen == "online" and (silence := _no_answer()):
        chosen, reason = "offline", silence
    known = id_of(run_dir)
    for attempt in dict.fromkeys((chosen, "offline")):
        try:
            return _open(run_dir, known, config, name, group, attempt, project, entity, tags, why_offline=reason)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            _forget_attempt()
    return None, f"W&B: not available ({reason}); metrics.csv has everything"


def _no_answer() -> str | None:
    """Why W&B's server can't be reached, found out in seconds; None: it answers, whatever it says."""
    try:
        import wandb  # slow to import, and absent is no failure

        address = wandb.setup().settings.base_url
        with urllib.request.urlopen(address, timeout=_REACH_SECONDS):  # through the environment's proxies
            return None
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:  # a certificate that only W&B knows of is an answer
        why = getattr(error, "reason", error)
        return None if isinstance(why, ssl.SSLError) else f"no answer from {address}: {why}"
    except Exception:  # what is wrong with W&B itself is said when it is opened
        return None


def _forget_attempt() -> None:
    """End W&B's own process, which would hold a failed start's id as one in use."""
    with suppress(Exception):
        import wandb

        wandb.teardown()


def _open(
    run_dir: Path,
    known: str | None,
    config: Mapping[str, Any],
    name: str,
    group: str,
    mode: str,
    project: str,
    entity: str | None,
    tags: tuple[str, ...],
    *,
    why_offline: str,
) -> tuple[RunLogger, str]:
    import wandb  # slow to import, and absent is no failure

    settings = wandb.Settings(init_timeout=30, finish_timeout=300, silent=True, save_code=False, console="off")
    run = wandb.init(
        dir=str(run_dir),
        id=known,
        resume="allow" if mode == "online" else None,  # offline, W&B has nothing to look it up in
        config=dict(config),
        name=name,
        group=group,
        job_type="train",
        project=project,
        entity=entity,
        tags=list(tags),
        mode=mode,  # type: ignore[arg-type]
        settings=settings,
        reinit="finish_previous",
    )
    _define_metrics(run)
    if mode == "offline":
        folder = Path(run.dir).parent
        line = f"W&B: kept offline ({why_offline}); upload it with: wandb sync {shlex.quote(str(folder))}"
    else:
        line = f"W&B: {run.url}"
    return RunLogger(experiment=run, save_dir=str(run_dir)), line


def _define_metrics(run: Any) -> None:
    """Tell W&B the axis of every metric, how it is summed up, and which families its page hides."""
    run.define_metric(STEP_AXIS)
    define = partial(run.define_metric, step_metric=STEP_AXIS, step_sync=True)
    for family in dict.fromkeys(each.family for each in METRICS + MEDIA):
        members = [each for each in METRICS + MEDIA if each.family == family]
        define(f"{family}/*", hidden=all(each.is_hidden for each in members) or None)
        for each in members:
            for key in each.keys if each.summary else ():
                define(key, summary=each.summary)


def id_of(run_dir: Path) -> str | None:
    """The id under which W&B knows a run folder; None: it doesn't."""
    found = sorted(run_dir.glob("wandb/*run-*-*"), key=lambda path: path.name.partition("run-")[2])
    return found[-1].name.rpartition("-")[2] if found else None


def choose_mode(mode: Mode) -> str:
    """``auto``: the environment's WANDB_MODE if set, else online when there is a key, else offline."""
    if mode != "auto":
        return mode
    requested = os.environ.get("WANDB_MODE", "").lower()
    if requested in ("offline", "dryrun"):
        return "offline"
    if requested == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return "disabled"
    return "online" if is_logged_in() else "offline"
