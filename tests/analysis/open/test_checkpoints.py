import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from analysis.behaviour.asked import Behaviour
from analysis.open import checkpoints as module
from analysis.open.checkpoints import HeldOutPairs, checkpoints_of_run, prompts_of_file
from analysis.open.models import LoadedModel
from analysis.open.runs import open_run
from datamodules.records import LoadReport, PreferencePair
from datamodules.synthetic import SyntheticWorld
from datamodules.tokenization import train_bpe_tokenizer
from tests.analysis import asked
from tests.analysis.asked import save_model
from tests.analysis.conftest import CONFIG
from tests.chat_templates import tokenizer_of
from tests.tiny_models import MemorySource
from tiltmeter.errors import UserError

MakeRun = Callable[..., Path]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    return str(save_model(tmp_path / "base", seed=0)), str(save_model(tmp_path / "aligned", seed=1))


def finished_run(make_run: MakeRun, **options: Any) -> Path:
    run = make_run(prompts=[pair.as_json() for pair in asked.probe_pairs(4)], **options)
    for i, name in enumerate(("base", "aligned")):
        save_model(run / name, seed=i)
    return run


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_two_folders_and_any_source_of_pairs(folders: tuple[str, str]) -> None:
    found, reports, cuts = HeldOutPairs(n_pairs=6, max_length=40).ask(*folders, MemorySource(20))
    assert len(found.pairs) == len({pair.group for pair in found.pairs}) == 6
    assert reports[0].n_rows == 20
    assert cuts.n_pairs == 6
    assert cuts.prompts_cut + cuts.responses_cut > 0
    assert max(len(p.ids.prompt_ids) + len(p.ids.chosen_ids) for p in found.pairs) <= 40
    assert not found.base.model.training
    assert found.world is None
    again, _, _ = HeldOutPairs(n_pairs=6, max_length=40).ask(*folders, MemorySource(20))
    assert again.pairs == found.pairs
    other, _, _ = HeldOutPairs(n_pairs=6, max_length=40, seed=1).ask(*folders, MemorySource(20))
    assert other.pairs != found.pairs


def test_pairs_of_one_prompt_are_asked_about_once(folders: tuple[str, str]) -> None:
    class Twice(MemorySource):
        def load(self) -> tuple[list[PreferencePair], list[LoadReport]]:
            records, reports = super().load()
            return records + [replace(record, pair_id=f"{record.pair_id}/b") for record in records], reports

    found, _, _ = HeldOutPairs().ask(*folders, Twice(5))
    assert sorted(pair.pair_id for pair in found.pairs) == [f"memory/{i}" for i in range(5)]


def test_labels_that_were_flipped_are_asked_about_as_they_are_meant(folders: tuple[str, str]) -> None:
    world = SyntheticWorld(n_prompts=60, label_noise=0.4)
    found, _, _ = HeldOutPairs(n_pairs=60).ask(*folders, world)
    assert found.world is world
    for pair in found.pairs:
        situation = str(pair.attributes["situation"])
        assert world.score(pair.chosen, situation) > world.score(pair.rejected, situation)


def test_two_tokenizers_are_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    other = train_bpe_tokenizer(["other words entirely are said here today " * 20], vocab_size=280)
    assert len(other) == len(asked.TOKENIZER)
    save_model(tmp_path / "other", seed=0, tokenizer=other)
    with pytest.raises(UserError, match=r"base=.* aligned=.*other: their tokenizers differ") as caught:
        HeldOutPairs().ask(folders[0], str(tmp_path / "other"), MemorySource(4))
    one_line(caught)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"hidden_size": 48}, "hidden_size is 32 and 48"), ({"num_hidden_layers": 3}, "num_hidden_layers is 2 and 3")],
)
def test_two_shapes_are_refused_before_any_weights_are_read(
    folders: tuple[str, str], tmp_path: Path, changes: dict[str, int], words: str
) -> None:
    save_model(tmp_path / "other", seed=0, **changes)
    (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"base=.* aligned=.*other: {words}; give two checkpoints") as caught:
        HeldOutPairs().ask(folders[0], str(tmp_path / "other"), MemorySource(4))
    one_line(caught)


def test_weights_that_are_not_there_are_not_made_up(folders: tuple[str, str]) -> None:
    file = Path(folders[1]) / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"aligned: damaged: 1 weights are missing, model\.norm\.weight among them"):
        HeldOutPairs().ask(*folders, MemorySource(4))


def test_a_missing_folder_is_named(folders: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/nowhere: cannot load this model") as caught:
        HeldOutPairs().ask(folders[0], str(tmp_path / "nowhere"), MemorySource(4))
    one_line(caught)


def test_pickled_weights_are_refused(folders: tuple[str, str]) -> None:
    aligned = Path(folders[1])
    torch.save(load_file(aligned / "model.safetensors"), aligned / "pytorch_model.bin")
    (aligned / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"aligned: cannot load this model") as caught:
        HeldOutPairs().ask(*folders, MemorySource(4))
    one_line(caught)


def test_code_beside_the_weights_is_not_run(folders: tuple[str, str]) -> None:
    aligned = Path(folders[1])
    (aligned / "evil.py").write_text("raise SystemExit('run')", encoding="utf-8")
    config = json.loads((aligned / "config.json").read_text(encoding="utf-8"))
    config |= {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"}
    (aligned / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"aligned: cannot load this model"):
        HeldOutPairs().ask(*folders, MemorySource(4))


def test_a_device_that_is_not_there_is_named(folders: tuple[str, str]) -> None:
    for device in ("abacus", "meta:x", "hpu"):
        with pytest.raises(UserError, match=rf"^device={device}: ") as caught:
            HeldOutPairs().ask(*folders, MemorySource(4), device=device)
        one_line(caught)


@pytest.mark.parametrize("options", [{"n_pairs": 0}, {"seed": -1}, {"max_length": 7}])
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"pairs: expected"):
        HeldOutPairs(**options)


def test_a_format_that_the_tokenizer_lacks_is_named(folders: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=r"^text_format=chat_template"):
        HeldOutPairs(text_format="chat_template").ask(*folders, MemorySource(4))


@pytest.mark.parametrize(("stops_at_turns", "chosen"), [(True, "chat_template"), (False, "transcript")])
def test_a_base_model_with_its_chat_models_template_is_asked_in_transcripts(
    tmp_path: Path, stops_at_turns: bool, chosen: str
) -> None:
    tokenizer = tokenizer_of("Llama 3")
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))  # type: ignore[arg-type]
    model.generation_config.eos_token_id = [2, end] if stops_at_turns else 2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found, _, cuts = HeldOutPairs(n_pairs=2).ask(str(tmp_path), str(tmp_path), MemorySource(4))
    assert cuts.written_as.startswith(f"{chosen}: ")
    assert (end in found.pairs[0].ids.chosen_ids) == stops_at_turns


def test_a_source_without_pairs(folders: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="no preference pair"):
        HeldOutPairs().ask(*folders, MemorySource(0))


def test_a_run_is_asked_about_its_own_pairs(make_run: MakeRun) -> None:
    run = open_run(finished_run(make_run, config={"module": {"beta": 0.25}}))
    found = checkpoints_of_run(run)
    assert [pair.as_json() for pair in found.pairs] == [pair.as_json() for pair in asked.probe_pairs(4)]
    assert found.beta == 0.25
    simpo = finished_run(make_run, stamp="2026-01-31_13-00-00", config={"module": {"loss": "simpo"}})
    assert checkpoints_of_run(open_run(simpo)).beta == 10
    assert isinstance(found.world, SyntheticWorld)
    assert (found.world.n_prompts, found.world.label_noise) == (50, 0.1)


@pytest.mark.parametrize("beta", ["a lot", -1, None])
def test_a_beta_that_none_has_is_not_used(make_run: MakeRun, beta: Any) -> None:
    run = open_run(finished_run(make_run, config={"module": {"beta": beta}}))
    assert checkpoints_of_run(run).beta == module.USUAL_LOSS.beta


def test_a_run_without_prompts(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match=r"probe_prompts\.json: no such file"):
        checkpoints_of_run(open_run(make_run()))


def test_a_pointer_is_followed_with_its_revision(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(prompts=[pair.as_json() for pair in asked.probe_pairs(4)])
    save_model(run / "aligned", seed=1)
    (run / "base").mkdir()
    (run / "base" / "pointer.json").write_text(json.dumps({"name": "someone/base", "revision": "abc"}))
    calls = []

    def load(where: str, *, revision: str | None, **options: Any) -> LoadedModel:
        calls.append((where, revision))
        return asked.opened(0)

    monkeypatch.setattr(module, "load_model", load)
    monkeypatch.setattr(module, "load_config", lambda *_, **__: asked.opened(0).model.config)
    checkpoints_of_run(open_run(run))
    assert calls == [("someone/base", "abc"), (str(run / "aligned"), None)]


@pytest.mark.parametrize(
    "data",
    [
        {"n_prompts": 10**9},
        {"n_prompts": "os.system('true')"},
        {"seed": {"_target_": "os.system", "command": "true"}},
        {"label_noise": [1]},
        {"planted_rank": None},
        {"evil": 1},
        {1: 2},
    ],
)
def test_hostile_options_of_the_world_are_one_line(make_run: MakeRun, data: dict[Any, Any]) -> None:
    target = {"_target_": "datamodules.synthetic.SyntheticWorld"}
    run = open_run(finished_run(make_run, config={"data": target | data}))
    with pytest.raises(UserError, match=r"config\.yaml: data: ") as caught:
        checkpoints_of_run(run)
    one_line(caught)


@pytest.mark.parametrize(
    "target", ["os.system", "datamodules.hh.AnthropicHH", 3, ["datamodules.synthetic.SyntheticWorld"]]
)
def test_no_other_class_is_made_from_a_runs_file(make_run: MakeRun, target: Any, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    config = {"data": {"_target_": target, "command": f"touch {touched}"}}
    assert checkpoints_of_run(open_run(finished_run(make_run, config=config))).world is None
    assert not touched.exists()


def test_prompts_of_a_file_stand_behind_one_bos(tmp_path: Path) -> None:
    rows = [{"prompt": {"text": "So he said", "toxicity": 0.7}}, {"prompt": "tea </s> rain"}, {"prompt": "third"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first, second = prompts_of_file(str(tmp_path / "p.jsonl"), 2, asked.opened(0))
    assert first.attributes == {"prompt_toxicity": 0.7}
    assert first.chosen == ""
    assert first.group == first.pair_id != second.pair_id
    for prompt in (first, second):
        assert prompt.ids[0] == asked.TOKENIZER.bos_token_id
        assert asked.TOKENIZER.eos_token_id not in prompt.ids
        assert asked.TOKENIZER.decode(prompt.ids[1:]) == prompt.text


@pytest.mark.parametrize("options", [{"n_prompts": 0}, {"beta": 0.0}, {"dtype": "int4"}])
def test_wrong_options_of_the_question(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"behaviour\."):
        Behaviour(scorers={}, **options)


def kernels(found: module.Checkpoints) -> set[str]:
    return {opened.model.config._attn_implementation for opened in (found.base, found.aligned)}


def test_a_run_is_opened_on_the_attention_kernel_that_it_was_trained_with(make_run: MakeRun) -> None:
    config = CONFIG | {"model": CONFIG["model"] | {"attn_implementation": "eager"}}
    run = open_run(finished_run(make_run, config=config))
    assert kernels(checkpoints_of_run(run)) == {"eager"}
    assert kernels(checkpoints_of_run(run, attn_implementation="sdpa")) == {"sdpa"}


def test_two_checkpoints_are_opened_on_the_kernel_asked_for_or_that_their_family_has(
    folders: tuple[str, str], tmp_path: Path
) -> None:
    def ask(two: tuple[str, str], **options: Any) -> module.Checkpoints:
        return HeldOutPairs(n_pairs=2).ask(*two, MemorySource(3), **options)[0]

    assert kernels(ask(folders)) == {"sdpa"}
    assert kernels(ask(folders, attn_implementation="eager")) == {"eager"}
    capped = tuple(str(save_model(tmp_path / f"gemma2_{i}", seed=i, family="gemma2")) for i in range(2))
    assert kernels(ask(capped)) == {"eager"}  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"attn_implementation=sdpa: gemma2 has no such kernel") as caught:
        ask(capped, attn_implementation="sdpa")  # type: ignore[arg-type]
    one_line(caught)
