"""Wrong input: one clear line, exit code 2, before anything expensive, nothing half-written."""

import gzip
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from launch.command import run_command
from launch.configuration import CONF, prepare_overrides
from launch.training import train
from tests.analysis.asked import save_model
from tests.cli import TINY
from tiltmeter.errors import UserError

GOOD = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: Go."}


def fails_with(capsys: pytest.CaptureFixture[str], root: Path, *arguments: str) -> str:
    """The one line on standard error of a run that must end with exit code 2 and leave no run folder."""
    overrides = prepare_overrides([*arguments, f"runs_root={root}"], config_name="train")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=overrides)
    with pytest.raises(SystemExit) as ended:
        train(config)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert not [p for p in root.rglob("*") if p.is_file()], "something was written"
    assert lines[0].startswith("tiltmeter: ")
    return lines[0]


def hh_file(folder: Path, *rows: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def test_a_missing_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = fails_with(capsys, tmp_path / "r", "data=hh", "data.path=nowhere.jsonl")
    assert "data.path: no such file: nowhere.jsonl (expected .jsonl, .jsonl.gz or a folder of them)" in line


def test_an_empty_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "rows.jsonl" in fails_with(capsys, tmp_path / "r", "data=hh", f"data.path={hh_file(tmp_path, '')}")


def test_a_malformed_line_is_named_by_file_and_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = hh_file(tmp_path, json.dumps(GOOD), '{"chosen": ')
    assert "rows.jsonl:2" in fails_with(capsys, tmp_path / "r", "data=hh", f"data.path={path}")


def test_wrong_keys(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = fails_with(
        capsys, tmp_path / "r", "data=hh", f"data.path={hh_file(tmp_path, json.dumps({'better': 'a', 'worse': 'b'}))}"
    )
    assert all(word in line for word in ("rows.jsonl:1", "chosen", "rejected", "better"))


def test_a_damaged_gzip_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode())[:-12])
    assert "rows.jsonl.gz" in fails_with(capsys, tmp_path / "r", "data=hh", f"data.path={path}")


def test_no_pair_left_after_filtering(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    row = json.dumps({"chosen": GOOD["chosen"], "rejected": GOOD["chosen"]})
    line = fails_with(capsys, tmp_path / "r", "data=hh", f"data.path={hh_file(tmp_path, row)}")
    assert "identical" in line


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"better": "a", "worse": "b"}, ["in no known form", "columns found: better, worse"]),
        ({"prompt": "Q", "completion": "a", "label": True}, ["unpaired rows"]),
        ({"prompt": [{"role": "assistant", "content": "a"}], "chosen": "b", "rejected": "c"}, ["1 the prompt does not end"]),
    ],
)  # fmt: skip
def test_a_preference_file_that_holds_no_pairs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, row: dict[str, object], words: list[str]
) -> None:
    path = hh_file(tmp_path, json.dumps(row))
    line = fails_with(capsys, tmp_path / "r", "data=preferences", "judge=none", f"data.path={path}")
    assert all(word in line for word in words), line


def test_preferences_of_the_hub_without_network(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    line = fails_with(capsys, tmp_path / "r", "data=preferences", "judge=none", "data.name=nobody/no-such-data-set")
    assert "nobody/no-such-data-set" in line
    assert "data.path=FILE_OR_FOLDER" in line


def test_too_few_pairs_for_the_splits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = fails_with(capsys, tmp_path / "r", "data=hh", f"data.path={hh_file(tmp_path, json.dumps(GOOD))}")
    assert "val_pairs=400" in line


def test_a_prompt_longer_than_max_length_when_none_may_be_cut(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = fails_with(capsys, tmp_path / "r", "data.n_prompts=60", "datamodule.val_pairs=5", "datamodule.probe_pairs=5",
                      "datamodule.max_length=16", "datamodule.truncation=error")  # fmt: skip
    assert "datamodule.max_length=16" in line
    assert "keep_end" in line


def test_a_hub_model_without_network(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = fails_with(capsys, tmp_path / "r", "model.name_or_path=meta-llama/Llama-2-7b-hf")
    assert "meta-llama/Llama-2-7b-hf" in line
    assert "network" in line


def test_an_adapter_in_the_place_of_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}', encoding="utf-8")
    line = fails_with(capsys, tmp_path / "r", f"model.name_or_path={tmp_path}")
    assert f"model.name_or_path: cannot load {tmp_path}: an adapter" in line
    assert f"give its base, some/base; to go on from it, add model.adapter_path={tmp_path}" in line
    assert f"analyze.py base=ITS_BASE aligned={tmp_path}" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["reference.name_or_path=TOY"],
            "reference.name_or_path: TOY has another vocabulary than the model that is trained",
        ),
        (["reference.name_or_path=/nowhere"], "reference.name_or_path: no such folder: /nowhere"),
        (["reference.revision=main"], "reference.name_or_path: expected a hub id or a folder, got none"),
        (["reference.name_or_path=TOY", "reference.init=random"], "reference.init: not of a reference"),
        (["reference.name_or_path=TOY", "module=sft"], "reference.name_or_path: this module has no reference"),
    ],
)
def test_a_reference_that_does_not_fit(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    toy = str(save_model(tmp_path / "toy", seed=0))
    given = [argument.replace("TOY", toy) for argument in arguments]
    assert words.replace("TOY", toy) in fails_with(capsys, tmp_path / "r", *TINY, *given)


def test_hub_data_without_network(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    line = fails_with(capsys, tmp_path / "r", "data=hh", "data.revision=no-such-revision-cached")
    assert "Anthropic/hh-rlhf" in line
    assert "data.path=" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["module.loss=hinge", "module.label_smoothing=0.1"], "module.loss=hinge has no option label_smoothing"),
        (["module.loss=dpo"], "module.loss: expected one of sigmoid"),
        (["module.beta=0"], "module.beta"),
        (["module.learning_rate=0"], "module.learning_rate"),
        (["module.optimizer=adamv"], "module.optimizer: expected one of adamw, adam"),
        (
            ["module.optimizer=sgd", "module.optimizer_options.momentun=1"],
            "momentun: sgd has no such option (it has: dampening",
        ),
        (["data.label_noise=0.7"], "data.label_noise"),
        (["datamodule.layout=packed"], "datamodule.layout: expected shared_prefix or concatenated, got packed"),
        (
            ["datamodule.labels=random"],
            "datamodule.labels: expected given or swapped or shuffled or random_pairs or prompts or unseen, got",
        ),
        (["trainer.gradient_clip_val=1"], "module.gradient_clip_norm"),
        (["trainer.accumulate_grad_batches=4"], "datamodule.pairs_per_step"),
        (["trainer.gradient_clip_algorithm=value"], "trainer.gradient_clip_algorithm: not used here"),
        (["trainer.overfit_batches=2"], "trainer.overfit_batches: not used here; datamodule.train_pairs=N"),
        (["trainer.fast_dev_run=true"], "trainer.fast_dev_run: not used here; trainer.max_steps=2"),
        (["trainer.limit_test_batches=2"], "trainer.limit_test_batches: not used here"),
        (["trainer.barebones=true"], "trainer.barebones: not used here"),
        (["trainer.min_steps=9"], "only trainer.max_time ends a run early"),
        (["trainer.max_time=5"], "trainer.max_time: expected days:hours:minutes:seconds"),
        (["trainer.val_check_interval=0"], "trainer.val_check_interval: expected more than 0, got 0"),
        (["trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch: expected more than 0"),
        (["checkpoint.save_top_k=3"], "checkpoint.save_top_k: expected 1, the best one, or 0, none, got 3"),
        (["checkpoint.save_last=true"], "checkpoint.save_last: not used here; checkpoint takes monitor, mode,"),
        (["checkpoint.save_weights_only=true"], "checkpoint.save_weights_only: not used here"),
        (["checkpoint.filename=first"], "checkpoint.filename: not used here"),
        (["last_checkpoint.save_top_k=2"], "last_checkpoint.save_top_k: not used here; last_checkpoint takes every_n"),
        (["last_checkpoint.dirpath=elsewhere"], "last_checkpoint.dirpath: not used here"),
        (
            ["last_checkpoint.every_n_epochs=2", "trainer.enable_checkpointing=false"],
            "has no effect with trainer.enable",
        ),
        (["trainer.precision=16-mixed"], "trainer.precision: expected one of"),
        (["ckpt_path=last"], "ckpt_path=last: no run under"),
        (["ckpt_path=gone.ckpt"], "ckpt_path: no such checkpoint: gone.ckpt"),
        (["model=pretrained"], "model.name_or_path: expected a value, got none; add model.name_or_path=…"),
        (["model.name_or_path=no/such/folder/here"], "no/such/folder/here"),
        (["base=null"], "model.init=random"),
        (["seed=abc"], "seed: expected a whole number"),
        (["seed=-1"], "seed: expected a whole number from 0, got -1"),
        (["datamodule.max_length=abc"], "datamodule.max_length: expected a whole number, got abc"),
        (["datamodule.num_workers=-1"], "datamodule.num_workers: expected at least 0, got -1"),
        (["datamodule.train_pairs=-5"], "datamodule.train_pairs: expected at least 1, got -5"),
        (
            ["datamodule.truncation=keep_start"],
            "datamodule.truncation: expected keep_end or drop or error, got keep_start",
        ),
        (
            ["datamodule.text_format=chatml"],
            "datamodule.text_format: expected auto or transcript or chat_template, got chatml",
        ),
        (["chat_date=31.1.2026"], "chat_date: expected a day such as 2026-01-31, got 31.1.2026"),
        (["module.learning_rate=fast"], "module.learning_rate: expected a number, got fast"),
        (["module.gradient_clip_norm=-1"], "module.gradient_clip_norm: expected a finite number above 0, got -1"),
        (["module.chunk_tokens=0"], "module.chunk_tokens: expected a finite number at least 1, got 0"),
        (["module.weight_decay=-1"], "module.weight_decay: expected a finite number at least 0, got -1"),
        (["module.schedule=step"], "module.schedule: expected constant or linear or cosine, got step"),
        (["trainer.num_sanity_val_steps=2"], "trainer.num_sanity_val_steps: this program sets it itself"),
        (["trainer.strategy=deepspeed"], "trainer.strategy: expected auto or ddp"),
        (["trainer.accelerator=quantum"], "quantum"),
        (
            ["logger.mode=sometimes"],
            "logger.mode: expected auto or online or offline or disabled or tensorboard, got sometimes",
        ),
        (["name=../../x"], "name: expected letters"),
        (["judge=openai"], "judge.judge.model: expected a value, got none; add judge.judge.model=…"),
        (["judge=endpoint", "judge.judge.model=m"], "judge.judge.base_url: expected a value, got none"),
        (["judge=openai", "judge.judge.model=m"], "judge.judge.api_key_env: the environment variable OPENAI_API_KEY"),
        (
            ["judge=endpoint", "judge.judge.model=m", "judge.judge.base_url=ftp://localhost/v1"],
            "judge.judge.base_url: expected",
        ),
        (["truthfulqa=mc", "truthfulqa.path=gone.json"], "truthfulqa.path: cannot read gone.json"),
        (["callbacks.generation.epochs=[-1]"], "callbacks: epochs: expected whole numbers from 0 or null, got [-1]"),
        (["callbacks.generation.n_prompts=0"], "callbacks: n_prompts from 1"),
        (
            ["decoding.top_p=0.5", "decoding.temperature=0.0"],
            "decoding.temperature=0 always takes the likeliest token",
        ),
    ],
)
def test_options_that_cannot_work(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert words in fails_with(capsys, tmp_path / "r", *arguments)


def test_a_misspelt_key_ends_the_program_before_hydra_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "modul.beta=1"])
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: pytest.fail("started all the same"), config_name="train")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "tiltmeter: modul.beta: unknown configuration key; did you mean module.beta?\n"


def test_a_user_error_is_one_line() -> None:
    with pytest.raises(UserError) as caught:
        prepare_overrides(["experiment=nothing_like_it"], config_name="train")
    assert "\n" not in str(caught.value)


def test_a_model_that_is_random_while_it_trains(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    noise = ("model.architecture.model_type=mixtral", "+model.architecture.router_jitter_noise=0.1")
    line = fails_with(capsys, tmp_path / "r", *TINY, *noise, "callbacks=none", "logger=csv")
    assert "MixtralForCausalLM is random in training mode (model.layers.0.mlp" in line
    assert "router_jitter_noise (0.1)" in line
