"""F7, F25 and F33 before anything starts: which checkpoint is taken, under which settings, and what is only data."""

import os
from contextlib import ExitStack
from inspect import signature
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from datamodules.preference import PreferenceDataModule
from launch.configuration import CONF
from launch.resuming import (
    SETTINGS,
    check_same_run,
    check_step_is_left,
    find_checkpoint,
    keep_chat_date,
    settings_sha256,
)
from launch.run_folder import write_config
from launch.training import _checkpoint_to_resume
from lightning_modules.base import LogProbModule
from lightning_modules.dpo import DPOModule
from lightning_modules.sft import SFTModule
from tests.tiltmeter.interrupted_saves import write_file
from tiltmeter.checkpoint_files import commit
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import CausalLM

IN_WEIGHTS_OR_ORDER = {
    "module.freeze_embeddings", "module.lora", "module.vector", "module.sparse", "module.optimizer",
    "module.optimizer_options",
    "datamodule.pairs_per_step", "datamodule.bucket_steps", "datamodule.seed",
    "model.revision", "model.adapter_path", "model.init", "model.architecture", "model.tokenizer", "model.vocab_size",
    "model.dtype", "model.quantization",
}  # fmt: skip
"""A run that goes on can't change them: what it did under them is in its weights, its reference or the order of its steps."""


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def saved(run: Path, *steps: int, config: DictConfig | None = None) -> list[Path]:
    """A run folder with checkpoints."""
    folder = run / "checkpoints"
    made_by = {} if config is None else {SETTINGS: settings_sha256(config)}
    for step in steps:
        commit(folder / "last.ckpt", write_file, step=step, made_by=made_by)
    return [folder / f"last-step-{step:06d}.ckpt" for step in steps]


def test_last_is_the_newest_run_s_newest_valid_one_and_the_rest_is_said(tmp_path: Path) -> None:
    saved(tmp_path / "tiny" / "2026-01-01_00-00-00", 90)
    before, newest = saved(tmp_path / "tiny" / "2026-01-02_00-00-00", 3, 6)
    early = tmp_path / "tiny" / "2026-01-03_00-00-00" / "checkpoints"
    early.mkdir(parents=True)
    (early / ".partial-last.ckpt").write_bytes(b"half")
    os.truncate(newest, 5)
    found, lines = find_checkpoint("last", tmp_path, "tiny")
    assert found == before
    assert lines == [
        f"Passed over: {early.parent}, which has no checkpoint yet",
        f"Skipped: {newest} is truncated or overwritten: {newest.name} has 5 bytes, 64 were written",
    ]


def test_last_never_falls_back_to_another_run(tmp_path: Path) -> None:
    saved(tmp_path / "tiny" / "2026-01-01_00-00-00", 90)
    for path in saved(tmp_path / "tiny" / "2026-01-02_00-00-00", 3, 6):
        os.truncate(path, 0)
    with pytest.raises(UserError, match=r"ckpt_path=last: no checkpoint of .*2026-01-02.* can be used: .*has 0 bytes"):
        find_checkpoint("last", tmp_path, "tiny")


def test_a_named_one_is_found_by_its_link_and_refused_with_file_and_reason(tmp_path: Path) -> None:
    (data,) = saved(tmp_path / "run", 3)
    link = data.with_name("last.ckpt")
    assert find_checkpoint(str(link), tmp_path, "tiny") == (data, [])
    content = bytearray(data.read_bytes())
    content[30] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match=rf"ckpt_path: {data} has changed since it was written: the sha256 of"):
        find_checkpoint(str(link), tmp_path, "tiny")


def test_a_checkpoint_outside_a_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "some.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="inside a run folder"):
        find_checkpoint(str(tmp_path / "some.ckpt"), tmp_path, "tiny")


def test_f25_other_settings_are_refused_with_all_that_differs_and_allowed_when_asked_for(tmp_path: Path) -> None:
    config = composed()
    (checkpoint,) = saved(tmp_path, 3, config=config)
    write_config(tmp_path, config)
    free = ("trainer.max_epochs=7", "logger=csv", "callbacks=none", "trainer=ddp", "++trainer.precision=32-true")
    assert check_same_run(checkpoint, composed(*free)) == []
    other, said = (
        ("++module.beta=0.5", "module.learning_rate=1e-3"),
        ("module.beta was None, now 0.5", "was 0.0003, now 0.001"),
    )
    with pytest.raises(UserError) as refused:
        check_same_run(checkpoint, composed(*other))
    assert all(line in str(refused.value) for line in (*said, "allow_config_change=true"))
    lines = check_same_run(checkpoint, composed(*other, "allow_config_change=true"))
    assert set(lines) == {said[0], f"module.learning_rate {said[1]}"}


def test_every_option_of_a_run_is_taken_over_or_refused_by_name(tmp_path: Path) -> None:
    config = composed("allow_config_change=true")
    (checkpoint,) = saved(tmp_path, 3, config=config)
    write_config(tmp_path, config)
    parts = {
        "module": (DPOModule, SFTModule, LogProbModule),
        "datamodule": (PreferenceDataModule,),
        "model": (CausalLM,),
    }
    names = {
        f"{group}.{name}" for group, kinds in parts.items() for kind in kinds for name in signature(kind).parameters
    }
    names -= {"module.options", "datamodule.source", "datamodule.chat_date"}  # dates: below
    refused = {}
    for name in names:
        changed = config.copy()
        OmegaConf.update(changed, name, "other", force_add=True)
        try:
            (line,) = check_same_run(checkpoint, changed)
        except UserError as error:
            refused[name] = str(error)
        else:
            assert line.startswith(f"{name} was ")
    assert all("can't be changed when it goes on" in said and f"{name} was" in said for name, said in refused.items())
    assert refused.keys() == IN_WEIGHTS_OR_ORDER


def test_settings_that_no_step_is_left_for_are_refused_unless_they_only_cut_the_work() -> None:
    check_step_is_left(["datamodule.num_workers was 0, now 2"])
    with pytest.raises(
        UserError, match=r"leaves none to take under module.beta was 0.1, now 0.2; set trainer.max_epochs"
    ):
        check_step_is_left(["module.beta was 0.1, now 0.2", "datamodule.num_workers was 0, now 2"])


def test_a_config_that_was_edited_afterwards_is_not_what_the_checkpoint_was_made_under(tmp_path: Path) -> None:
    (checkpoint,) = saved(tmp_path, 3, config=composed("++module.beta=0.5"))
    write_config(tmp_path, composed())
    with pytest.raises(UserError, match=r"config.yaml is not what last-step-000003.ckpt was made under"):
        check_same_run(checkpoint, composed())


def test_f33_a_config_with_a_python_tag_is_data_and_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (checkpoint,) = saved(tmp_path, 3)
    (tmp_path / "config.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{canary}']\n", encoding="utf-8")
    with pytest.raises(UserError, match="ConstructorError"):
        check_same_run(checkpoint, composed())
    assert not canary.exists()


def on(day: str, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> DictConfig:
    monkeypatch.setenv("TILTMETER_DATE", day)
    return composed("++datamodule.text_format=chat_template", *overrides)


@pytest.fixture
def of_friday(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a run with a chat template, started on 5 July."""
    config = on("2024-07-05", monkeypatch)
    run = tmp_path / config.name / "2024-07-05_23-59-00"
    (checkpoint,) = saved(run, 3, config=config)
    write_config(run, config)
    return checkpoint


def test_a_run_that_goes_on_another_day_keeps_the_date_of_its_chat_template(
    tmp_path: Path, of_friday: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = on("2024-07-06", monkeypatch, "ckpt_path=last")
    with ExitStack() as held:
        assert _checkpoint_to_resume(later, tmp_path, held)[0] == of_friday
    assert later.datamodule.chat_date == later.chat_date == "2024-07-05"


def test_another_date_of_the_chat_template_makes_another_run_where_texts_have_one(
    of_friday: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = on("2024-07-06", monkeypatch, "chat_date=2024-07-06")
    keep_chat_date(of_friday, later)
    with pytest.raises(UserError, match=r"another run: datamodule.chat_date was 2024-07-05, now 2024-07-06"):
        check_same_run(of_friday, later)
    plain = "++datamodule.text_format=transcript"
    config = composed(plain)
    (checkpoint,) = saved(of_friday.parent.parent.with_name("plain"), 3, config=config)
    write_config(checkpoint.parent.parent, config)
    assert check_same_run(checkpoint, composed(plain, "chat_date=2020-01-01")) == []
