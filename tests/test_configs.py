"""Every YAML composes and instantiates; every experiment runs two steps with a tiny stand-in for its model and data."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from analysis.open.runs import is_finished
from datamodules.tokenization import train_bpe_tokenizer
from launch.configuration import CONF, check_config, missing_keys
from launch.training import train
from tests.cli import TINY

GROUPS = sorted((p.parent.name, p.stem) for p in CONF.glob("*/*.yaml"))
ANALYZED = ("data", "judge", "toxicity", "truthfulqa")
ONLY_ANALYZED = ("claims",)
TO_BE_NAMED = {"data._target_", "model.name_or_path", "module.sparse.sae", "judge.judge.model", "judge.judge.base_url"}
"""What only the user knows."""
EXPERIMENTS = sorted(p.stem for p in CONF.glob("experiment/*.yaml"))
HUMAN_TEXTS = [f"question number {i} about some thing" for i in range(40)]


def composed(*overrides: str, config_name: str = "train") -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(config_name, overrides=list(overrides))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama folder, an HH file and an OASST file, in place of everything on the hub."""
    folder = tmp_path_factory.mktemp("stand_in")
    pairs = [
        {
            "chosen": f"\n\nHuman: {text}\n\nAssistant: A kind answer, number {i}.",
            "rejected": f"\n\nHuman: {text}\n\nAssistant: No {i}.",
        }
        for i, text in enumerate(HUMAN_TEXTS)
    ]
    (folder / "harmless-base.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    (folder / "oasst.jsonl").write_text(
        "\n".join(json.dumps(_tree(i, t)) for i, t in enumerate(HUMAN_TEXTS)), encoding="utf-8"
    )
    tokenizer = train_bpe_tokenizer([p["chosen"] for p in pairs], vocab_size=300)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def _tree(i: int, text: str) -> dict[str, object]:
    replies = [
        {"message_id": f"{i}-{r}", "parent_id": str(i), "text": f"Reply {r} of {i}.", "role": "assistant", "lang": "en"}
        | {"rank": r, "replies": []}
        for r in (0, 1)
    ]
    prompt = {
        "message_id": str(i),
        "parent_id": None,
        "text": text,
        "role": "prompter",
        "lang": "en",
        "replies": replies,
    }
    return {"message_tree_id": str(i), "tree_state": "ready_for_export", "prompt": prompt}


@pytest.mark.parametrize(("group", "choice"), GROUPS)
def test_every_file_composes_and_its_keys_are_known(group: str, choice: str) -> None:
    if group not in ONLY_ANALYZED:
        check(composed(f"{group}={choice}"))
    if group in (*ANALYZED, *ONLY_ANALYZED):
        check(composed(f"{group}={choice}", config_name="analyze"), config_name="analyze")


def check(config: DictConfig, *, config_name: str = "train") -> None:
    missing = missing_keys(config)
    assert TO_BE_NAMED.issuperset(missing), missing
    for key in missing:
        is_class = key.endswith("_target_")
        OmegaConf.update(config, key, "datamodules.synthetic.SyntheticWorld" if is_class else "somewhere")
    check_config(config, config_name=config_name)


@pytest.mark.parametrize(("group", "choice"), [(g, c) for g, c in GROUPS if g in ("judge", "toxicity", "truthfulqa")])
def test_every_scorer_that_a_file_describes_can_be_made_without_reaching_anything(group: str, choice: str) -> None:
    config = composed(f"{group}={choice}")
    for key in missing_keys(config):
        OmegaConf.update(config, key, "https://judge.example/v1")
    scorer = instantiate(config[group])
    assert (scorer is None) == (choice == "none")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_part_of_an_experiment_can_be_instantiated(experiment: str) -> None:
    config = composed(f"experiment={experiment}")
    if OmegaConf.is_missing(config.model, "name_or_path"):
        config.model.name_or_path = "somewhere"
    if config.module.get("sparse") is not None:
        config.module.sparse = None  # its autoencoder is that of a run before it
    module, model = instantiate(config.module), instantiate(config.model)
    data = instantiate(config.datamodule, source=instantiate(config.data))
    assert module.optimizer.learning_rate == config.module.learning_rate
    assert model.init in ("random", "pretrained")
    assert data.source.name in ("synthetic", "hh", "oasst1", "mixture", "preferences")


def autoencoder_run(config: DictConfig) -> Path:
    """A run that trains an autoencoder of the same base."""
    sae = composed("experiment=tiny_sae")
    OmegaConf.set_struct(sae, False)
    for key in ("runs_root", "model", "data", "datamodule", "base", "trainer", "logger"):
        sae[key] = config[key]
    return train(sae)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_takes_two_steps_with_a_stand_in(experiment: str, stand_in: Path, tmp_path: Path) -> None:
    overrides = [
        f"experiment={experiment}",
        f"runs_root={tmp_path}",
        "logger=csv",
        "trainer=cpu",
        "++trainer.max_steps=2",
    ]
    overrides += ["++datamodule.pairs_per_step=4", "++datamodule.val_pairs=6", "++datamodule.probe_pairs=4"]
    overrides += ["++trainer.enable_progress_bar=false", "++decoding.max_new_tokens=8"]
    config = composed(*overrides)
    OmegaConf.set_struct(config, False)
    if "path" in config.data:
        config.data.path = str(
            stand_in / f"{'oasst' if config.data._target_.endswith('OASST1') else 'harmless-base'}.jsonl"
        )
    if "name" in config.data:
        config.data.name = None
    for name, source in config.data.get("sources", {}).items():
        source.path = str(stand_in / f"{'harmless-base' if name == 'hh' else 'oasst'}.jsonl")
    if config.base is None:
        config.model.name_or_path = str(stand_in / "model")
    else:
        config.merge_with_dotlist([o for o in TINY if not o.startswith("data.n_prompts")])
    config.datamodule.train_pairs = 24
    config.datamodule.val_pairs, config.datamodule.probe_pairs = 6, 4
    if "site" in config.module:
        config.module.site = "layer_01"
    if config.module.get("sparse") is not None:  # of the autoencoder of a run before it
        config.module.sparse.sae = str(autoencoder_run(config) / "adapter")
        config.module.sparse.folder = None
    run = train(config)
    assert is_finished(run)
