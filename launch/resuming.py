"""Going on with a run: which checkpoint, under which settings, and what of the run folder is cleaned up first."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from analysis.runs import start_of
from launch.run_folder import is_first_process
from tiltmeter.checkpoint_files import DamagedCheckpoint, data_of, newest_valid, remove_unfinished, target_of, verify
from tiltmeter.errors import UserError

SETTINGS = "settings_sha256"
"""In manifests: hash of the settings that make a run what it is."""
_MAY_CHANGE = {"run_dir", "runs_root", "ckpt_path", "allow_config_change", "debug", "name", "trainer", "monitor"} | {
    "callbacks",
    "judge",
    "toxicity",
    "truthfulqa",
    "logger",
    "checkpoint",
    "last_checkpoint",
}
_MAY_CHANGE_INSIDE = {"datamodule.num_workers", "datamodule.tokens_per_micro_batch", "module.chunk_tokens"}
_STAYS_INSIDE = {"trainer.precision"}
_N_SHOWN = 8


def find_checkpoint(ckpt_path: str, root: Path, experiment: str) -> tuple[Path, list[str]]:
    """The checkpoint to resume, and a line on each that was passed over.

    The first process reads every byte of it; the others look at names and sizes, and are told its choice later.

    Args:
        ckpt_path: a path, or ``last`` for the newest valid one of the newest run of this experiment that has any.
        root, experiment: where runs are.

    Raises:
        UserError: there is none, or it is damaged.
    """
    contents = is_first_process()
    if ckpt_path != "last":
        path = Path(ckpt_path)
        if not path.exists():
            raise UserError(f"ckpt_path: no such checkpoint: {path} (expected a path, or last)")
        data = target_of(path)
        if data.absolute().parent.name != "checkpoints":
            raise UserError(
                f"ckpt_path: expected a checkpoint inside a run folder (RUN/checkpoints/NAME.ckpt), got {path}"
            )
        try:
            verify(data, contents=contents)
        except DamagedCheckpoint as damage:
            raise UserError(f"ckpt_path: {data} {damage}; choose another one, or ckpt_path=last") from damage
        return data, []
    passed_over = []
    for run in sorted((root / experiment).glob("*/"), key=start_of, reverse=True):
        folder = run / "checkpoints"
        if not data_of(folder):
            passed_over.append(f"Passed over: {run}, which has no checkpoint yet")
            continue
        found, skipped = newest_valid(folder, contents=contents)
        if found is None:
            raise UserError(
                f"ckpt_path=last: no checkpoint of {run} can be used: {'; '.join(skipped)}. Start anew, or name another run's"
            )
        return found, passed_over + [f"Skipped: {line}" for line in skipped]
    raise UserError(
        f"ckpt_path=last: no run under {root / experiment} has a checkpoint yet; start one without ckpt_path"
    )


def clean_up(folder: Path) -> Iterator[str]:
    """Remove what saves left that were interrupted; yields a line on each. The run's lock is held."""
    for path in remove_unfinished(folder):
        yield f"Removed: {path}, left by a save that was interrupted"


def check_same_run(checkpoint: Path, config: DictConfig) -> list[str]:
    """Refuse to resume under settings that would make it another run, unless ``allow_config_change`` is set.

    Returns:
        what differs, a line a setting.

    Raises:
        UserError: settings differ, or nobody knows the old ones.
    """
    saved = checkpoint.parent.parent / "config.yaml"
    try:
        before = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"ckpt_path: cannot read {saved}, which says how the run was started ({type(error).__name__})"
        ) from error
    now = OmegaConf.to_container(config, resolve=True)
    changed = _differences(_lasting(before), _lasting(now))
    if not changed and verify(checkpoint, contents=False).made_by.get(SETTINGS) != settings_sha256(config):
        changed = [f"{saved} is not what {checkpoint.name} was made under"]
    if changed and not config.allow_config_change:
        more = f" and {len(changed) - _N_SHOWN} more" if len(changed) > _N_SHOWN else ""
        raise UserError(
            f"ckpt_path: these settings would make it another run: {'; '.join(changed[:_N_SHOWN])}{more}; resume with the old "
            "ones, or with allow_config_change=true"
        )
    only_cut = [
        f"{line} (the same steps; sums in another order, losses equal to about 1e-5)"
        for line in _differences(
            *({k: v for k, v in _flat(s).items() if k in _MAY_CHANGE_INSIDE} for s in (before, now))
        )
    ]
    return [f"Changed: {line}" for line in changed + only_cut]


def settings_sha256(config: DictConfig) -> str:
    """Hash of the settings that may not change when a run goes on."""
    lasting = _lasting(OmegaConf.to_container(config, resolve=True))
    return hashlib.sha256(json.dumps(lasting, sort_keys=True, default=str).encode()).hexdigest()


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{key} was {old.get(key)}, now {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _lasting(settings: Any) -> dict[str, Any]:
    return {"trainer.precision": "32-true"} | {  # Lightning's default, where a trainer's file leaves it out
        key: value
        for key, value in _flat(settings).items()
        if (key.split(".")[0] not in _MAY_CHANGE or key in _STAYS_INSIDE) and key not in _MAY_CHANGE_INSIDE
    }


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v for key, inner in value.items() for k, v in _flat(inner, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: value}
