"""Going on with a run: which checkpoint, under which settings, and what of the run folder is cleaned up first."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from analysis.open.kept_models import DATA, kept_hashes, read_provenance
from analysis.open.runs import start_of
from datamodules.preference import PreferenceDataModule
from launch.run_folder import is_first_process
from tiltmeter.checkpoint_files import DamagedCheckpoint, data_of, newest_valid, remove_unfinished, target_of, verify
from tiltmeter.errors import UserError
from tiltmeter.files import sha256_of

SETTINGS = "settings_sha256"
"""In manifests: hash of the settings that make a run what it is."""
CHAT_DATE = "chat_date"
_MAY_CHANGE = {"run_dir", "runs_root", "ckpt_path", "allow_config_change", "debug", "name", "trainer", "monitor"} | {
    CHAT_DATE,
    "callbacks",
    "judge",
    "toxicity",
    "truthfulqa",
    "logger",
    "checkpoint",
    "last_checkpoint",
}
_MAY_CHANGE_INSIDE = {"datamodule.num_workers", "datamodule.tokens_per_micro_batch", "module.chunk_tokens"}
_STAYS_INSIDE = {"trainer.precision": "32-true", "trainer.limit_train_batches": 1.0, "trainer.overfit_batches": 0.0}
"""With Lightning's defaults, where a trainer's file leaves them out."""
_TAKES_EFFECT = {
    "module": "learning_rate weight_decay betas warmup_share schedule gradient_clip_norm max_skipped_steps spike_sigmas "
    "predict_prompt loss beta label_smoothing gamma_beta_ratio sft_weight router_aux_loss activation_checkpointing compile_blocks",
    "datamodule": "max_length max_response_length truncation text_format chat_date train_pairs val_pairs probe_pairs labels "
    "split_seed layout packed",
    "model": "name_or_path attn_implementation",
}
"""Settings that ``allow_config_change`` lets a run that goes on take over, from its next step on.

Those of the data and the model's place as long as token ids and weights are the same. Nothing else could be in force: it is in
the weights, the reference or the order of the steps that were taken."""
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


def keep_chat_date(checkpoint: Path, config: DictConfig) -> None:
    """Let a run that goes on another day print the day on which it was started, unless the command line says another one."""
    if OmegaConf.is_interpolation(config, CHAT_DATE):
        config[CHAT_DATE] = _settings_of(checkpoint).get(CHAT_DATE)


def _settings_of(checkpoint: Path) -> dict[str, Any]:
    """Settings of the run that a checkpoint belongs to. Raises UserError."""
    saved = checkpoint.parent.parent / "config.yaml"
    try:
        return dict(yaml.safe_load(saved.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(
            f"ckpt_path: cannot read {saved}, which says how the run was started ({type(error).__name__})"
        ) from error


def check_same_run(checkpoint: Path, config: DictConfig) -> list[str]:
    """Refuse to resume under settings that would make it another run, unless ``allow_config_change`` is set.

    Returns:
        what differs and will be in force, a line a setting.

    Raises:
        UserError: settings differ, or nobody knows the old ones.
    """
    saved, before = checkpoint.parent.parent / "config.yaml", _settings_of(checkpoint)
    now: Any = OmegaConf.to_container(config, resolve=True)
    changed = _differences(_lasting(before), _lasting(now))
    manifest = verify(checkpoint, contents=False)
    _check_can_go_on(checkpoint, manifest.step, changed, now)
    if not changed and manifest.made_by.get(SETTINGS) != settings_sha256(config):
        changed = [f"{saved} is not what {checkpoint.name} was made under"]
    if changed and not config.allow_config_change:
        raise UserError(
            f"ckpt_path: these settings would make it another run: {_some(changed)}; resume with the old ones, or with "
            "allow_config_change=true"
        )
    inside = _differences(*({k: v for k, v in _flat(s).items() if k in _MAY_CHANGE_INSIDE} for s in (before, now)))
    return changed + [f"{line} (the same steps; sums in another order, losses equal to about 1e-5)" for line in inside]


def _check_can_go_on(checkpoint: Path, n_steps: int, changed: Sequence[str], now: Mapping[str, Any]) -> None:
    """Refuse changes that nothing allows. Raises UserError."""
    if fixed := [line for line in changed if not _takes_effect(line.partition(" ")[0])]:
        raise UserError(
            f"ckpt_path: these settings would make it another run and can't be changed when it goes on: {_some(fixed)}; resume "
            "with the old settings, or start a new run"
        )
    max_steps = now.get("trainer", {}).get("max_steps", -1)
    if 0 <= max_steps < n_steps:
        raise UserError(
            f"trainer.max_steps={max_steps}: {checkpoint} has taken {n_steps} steps already; set it to more, or start a new run"
        )


def check_same_data(checkpoint: Path, data: PreferenceDataModule) -> None:
    """Refuse token ids that aren't those that the run has trained on, before any model is touched.

    Raises:
        UserError: a split is another one; says which.
    """
    before = (
        read_provenance(checkpoint.parent.parent).get(DATA, {}).items()
    )  # the checkpoint says so too, of what is trained on
    if changed := [name for name, digest in before if name not in data.splits or data.digest(name) != digest]:
        raise UserError(
            f"ckpt_path: {checkpoint} was trained on other data or another tokenisation (other token ids: {', '.join(changed)}); "
            "resume with the same data options"
        )


def check_same_model(checkpoint: Path, config: DictConfig) -> None:
    """Refuse a starting model of another name, unless its weights are those that the run started from.

    Raises:
        UserError: they aren't, or can't be compared.
    """
    run_dir, now = checkpoint.parent.parent, config.model.get("name_or_path")
    before = _settings_of(checkpoint)["model"].get("name_or_path")
    if before == now:
        return
    kept = {name: digest for name, digest in kept_hashes(run_dir).items() if name.startswith("base/")}
    expected = {Path(name).name: digest for name, digest in kept.items() if name.endswith(".safetensors")}
    found = {path.name: sha256_of(path) for path in Path(str(now)).glob("*.safetensors")}
    if not found or found != expected:
        raise UserError(
            f"ckpt_path: a run that goes on can't change model.name_or_path (was {before}, now {now}), whose weights aren't those "
            "that the run started from; resume with the old settings, or start a new run"
        )


def check_step_is_left(changed: list[str]) -> None:
    """Refuse changed settings that no step is left to be taken under.

    Raises:
        UserError: there are some.
    """
    if lasting := [line for line in changed if line.partition(" ")[0] not in _MAY_CHANGE_INSIDE]:
        raise UserError(
            f"ckpt_path: the checkpoint is behind the last step, which leaves none to take under {_some(lasting)}; set "
            "trainer.max_epochs or trainer.max_steps to more, or resume with the old settings"
        )


def settings_sha256(config: DictConfig) -> str:
    """Hash of the settings that may not change when a run goes on."""
    lasting = _lasting(OmegaConf.to_container(config, resolve=True))
    return hashlib.sha256(json.dumps(lasting, sort_keys=True, default=str).encode()).hexdigest()


def _takes_effect(key: str) -> bool:
    group, _, name = key.partition(".")
    return group in ("arm", "data", "decoding") or name.partition(".")[0] in _TAKES_EFFECT.get(group, "").split()


def _some(changes: list[str]) -> str:
    return "; ".join(changes[:_N_SHOWN]) + (f" and {len(changes) - _N_SHOWN} more" if len(changes) > _N_SHOWN else "")


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{key} was {old.get(key)}, now {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _lasting(settings: Any) -> dict[str, Any]:
    flat = _flat(settings)
    if flat.get("datamodule.text_format") == "transcript" or flat.get(f"datamodule.{CHAT_DATE}") is None:
        flat.pop(f"datamodule.{CHAT_DATE}", None)  # of no effect
    return _STAYS_INSIDE | {
        key: value
        for key, value in flat.items()
        if (key.split(".")[0] not in _MAY_CHANGE or key in _STAYS_INSIDE) and key not in _MAY_CHANGE_INSIDE
    }


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v for key, inner in value.items() for k, v in _flat(inner, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: value}
