import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from launch.configuration import CONF, check_config, expand_home, prepare_overrides
from launch.parts import check_options
from tiltmeter.errors import UserError


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=prepare_in_context(overrides))


def prepare_in_context(overrides: tuple[str, ...]) -> list[str]:
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    prepared = prepare_overrides(overrides, config_name="train")
    initialize_config_dir(str(CONF), version_base="1.3")
    return prepared


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("modul.beta=1", ["modul.beta", "did you mean module.beta?"]),
        ("module.betta=0.2", ["did you mean module.beta?"]),
        ("datamodule.max_lenght=3", ["did you mean datamodule.max_length?"]),
        ("trainer.num_node=4", ["did you mean trainer.num_nodes?"]),
        ("experiment=tiny_hhh", ["experiment=tiny_hhh", "did you mean tiny_hh?", "tiny_synthetic"]),
        ("trainer=gpuu", ["did you mean gpu?"]),
        ("arm=dpo,dpo_shufled", ["arm=dpo_shufled", "did you mean dpo_shuffled?"]),
        ("nonsense", ["expected key=value"]),
        ("a..b=1", ["a..b=1: cannot be read as key=value"]),
        ("=1", ["=1: expected key=value"]),
    ],
)
def test_a_misspelt_argument_is_one_line_with_the_nearest_match(argument: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        prepare_overrides([argument], config_name="train")
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("value", ["x/last-step=000011.ckpt", "new (1)/a", "it's", "größe", "#1", "a{b"])
def test_a_value_outside_hydra_s_grammar_is_refused_with_a_form_that_works(value: str) -> None:
    with pytest.raises(UserError, match="quote it: ") as caught:
        prepare_overrides([f"ckpt_path={value}"], config_name="train")
    said = str(caught.value)
    assert "\n" not in said
    (word,) = shlex.split(said.partition("quote it: ")[2])
    assert composed(word).ckpt_path == value


def test_several_values_without_multirun_are_refused_with_forms_that_work() -> None:
    with pytest.raises(UserError, match="needs --multirun; a text with commas is quoted, ") as caught:
        prepare_overrides(["data.path=a,b", "data=hh"], config_name="train")
    as_text, as_list = re.findall(r"'(data.path=.*?)'", str(caught.value))
    assert composed("data=hh", as_text).data.path == "a,b"
    assert composed("data=hh", as_list).data.path == ["a", "b"]


def test_options_that_only_the_constructor_knows_may_be_set() -> None:
    prepared = prepare_overrides(
        ["datamodule.truncation=drop", "trainer.limit_val_batches=2", "module.beta=0.3"], config_name="train"
    )
    assert prepared == ["++datamodule.truncation=drop", "++trainer.limit_val_batches=2", "++module.beta=0.3"]


def test_options_of_a_base_class_reached_through_keywords_may_be_set() -> None:
    assert prepare_overrides(["module.warmup_share=0.2"], config_name="train") == ["++module.warmup_share=0.2"]


def test_a_plain_mapping_takes_any_key() -> None:
    assert prepare_overrides(["model.architecture.rms_norm_eps=1e-6"], config_name="train")[0].startswith("++")


def test_flags_and_sweeps_pass_through() -> None:
    arguments = ["--multirun", "arm=dpo,dpo_swapped", "seed=1,2", "--cfg", "job"]
    assert sorted(prepare_overrides(arguments, config_name="train")) == sorted(arguments)


@pytest.mark.parametrize("secret", ["sk-" + "a1" * 12, "hf_" + "b2" * 14, "c3d4" * 10])
def test_a_value_that_looks_like_a_secret_is_refused(secret: str) -> None:
    config = composed(f"logger.project={secret}")
    with pytest.raises(UserError, match=r"logger\.project: this looks like a secret"):
        check_config(config)


def test_a_pinned_revision_is_no_secret() -> None:
    check_config(composed("model=llama2_7b", "base=null", "model.revision=" + "a" * 40))


def test_an_unknown_key_in_an_overlay_is_refused() -> None:
    config = composed()
    from omegaconf import open_dict

    with open_dict(config):
        config.experimnt = 1
    with pytest.raises(UserError, match="experimnt: unknown configuration key"):
        check_config(config)


def test_experiments_are_short_and_start_with_their_command() -> None:
    for file in sorted((CONF / "experiment").glob("*.yaml")):
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 25, file.name
        assert lines[0] == "# @package _global_"
        expected = "# python train.py" + ("" if file.stem == "tiny_synthetic" else f" experiment={file.stem}")
        assert lines[1].startswith(expected), f"{file.name}: {lines[1]}"
        assert f"name: {file.stem}" in lines, file.name


def test_no_configuration_file_lies_outside_the_groups() -> None:
    groups = {"model", "data", "module", "adapter", "arm", "callbacks", "trainer", "logger", "experiment"}
    groups |= {"judge", "toxicity", "truthfulqa", "study", "claims"}
    assert {path.parent.name for path in CONF.rglob("*.yaml") if path.parent != Path(CONF)} == groups


def test_a_tilde_at_the_start_of_a_value_is_the_home_of_its_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    mixture = ("data=hh_oasst1", "data.sources.hh.path=~/hh.jsonl", "data.sources.oasst1.path=[~/a,'b~/c']")
    config = composed(
        "runs_root=~", "ckpt_path='~/x.ckpt'", "model=pretrained", "model.name_or_path='~nobody_/m'", *mixture
    )
    expand_home(config)
    assert config.runs_root == str(tmp_path)
    assert config.ckpt_path == f"{tmp_path}/x.ckpt"
    assert config.data.sources.hh.path == f"{tmp_path}/hh.jsonl"
    assert config.data.sources.oasst1.path == [f"{tmp_path}/a", "b~/c"]
    assert config.model.name_or_path == "~nobody_/m"


@pytest.mark.parametrize("config_name", ["train", "analyze"])
def test_no_folder_is_made_that_is_named_tilde(
    config_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    prepare_in_context(())
    whole = compose(config_name, overrides=["runs_root='~/runs'"], return_hydra_config=True)
    assert whole.hydra.sweep.dir == f"{tmp_path}/runs/cache/multirun"
    if config_name == "train":
        config = compose(config_name, overrides=["runs_root='~/runs'"])
        check_options(config)
        assert config.runs_root == f"{tmp_path}/runs"


def test_a_callback_is_added_by_its_class_and_its_options_are_known() -> None:
    added = "+callbacks.weights._target_=callbacks.changed_weights.ChangedWeights"
    config = composed("callbacks=geometry", added, "callbacks.weights.n_entries=9")
    assert config.callbacks.weights == {"_target_": "callbacks.changed_weights.ChangedWeights", "n_entries": 9}
    check_config(config)
    with pytest.raises(UserError, match=r"did you mean callbacks\.weights\.n_entries\?"):
        composed("callbacks=none", added, "callbacks.weights.n_entry=9")
