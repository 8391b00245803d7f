"""``python analyze.py`` on tiny models: what it takes, what it refuses, what it leaves behind."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.open import checkpoints
from analysis.open.read_states import StateReading
from tests.analysis import asked
from tests.analysis import planted_behaviour as planted
from tests.analysis import planted_geometry as geometry
from tests.analysis.asked import READ_NOW, save_model
from tests.launch.analyze_command import ask, refused
from tests.processes import run_script
from tests.tiltmeter.scoring.stub_endpoint import refused_url
from tests.tiny_models import make_model
from tiltmeter.errors import IncompleteEvaluation

SMALL = ("decoding.max_new_tokens=6", "behaviour.n_prompts=3", "behaviour.probe_sites=''")
SWEEP = (
    "steering.vectors=[v*]",
    "steering.lambdas=[1.0]",
    "steering.n_random=1",
    "steering.n_generated=2",
    "steering.sites=final_post_norm",
    "transfer.n_random=2",
    "gradient_field.points_per_axis=2",
    "hidden_states.n_random_updates=2",
    "traces.n_random=2",
    "traces.n_prompts=3",
    "depth.forced=[0,1]",
    "depth.max_new_tokens=8",
    "weights.ranks=[1]",
    "shift.n_prompts=4",
    "decoding.max_new_tokens=6",
)
DATA = ("data=synthetic", "judge=none", "data.n_prompts=30", "pairs.n_pairs=5")
CANARY = "canary-0123456789"


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    return f"base={save_model(tmp_path / 'old', seed=0)}", f"aligned={save_model(tmp_path / 'new', seed=1)}"


@pytest.mark.slow
def test_two_checkpoints_and_a_source(tmp_path: Path, two: tuple[str, str]) -> None:
    page = ask(tmp_path, *two, *DATA, *SMALL, *SWEEP)
    assert page.parent.parent.parent == tmp_path / "runs" / "checkpoints"
    text = page.read_text(encoding="utf-8")
    assert "new against old" in text
    assert "5 pairs, one a prompt" in text
    assert "synthetic (seed 0), 30 of 30 pairs" in text
    for word in (*two, *DATA, *SMALL[:2], "analysis=behaviour"):
        assert word in text, "the command makes the same again"
    for name in (*READ_NOW, "steering_sweep"):
        assert (page.parent / "figures" / f"{name}.png").is_file(), name
    (of_clouds,) = re.findall("<pre class=.command.>(.*analysis=clouds)</pre>", text)
    assert "behaviour." not in of_clouds, "options of other figures have no effect on this one"
    assert "layers_by_step: only a run" in text
    assert "likeliest token each time, at most 6 tokens" in text
    samples = pd.read_csv(page.parent / "tables" / "behaviour_samples.csv")
    assert len(samples) == 3
    assert {"base", "policy", "toxicity_word_list/policy"} <= set(samples.columns)
    assert {"sweep.csv", "transfer.csv", "gradient_field.csv"} <= {
        path.name for path in (page.parent / "tables").iterdir()
    }


def test_what_does_not_fit_the_models_is_said_before_any_analysis_begins(
    tmp_path: Path, two: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(tmp_path, *two, *DATA, "analysis=[behaviour,transfer]", "transfer.sites=[layer_00,layer_09]")
    assert "layer_09: this model has 2 blocks" in said
    assert "Asking" not in capsys.readouterr().out


def test_a_tilde_in_a_path_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path}/gone" in refused(tmp_path, "run=~/gone")


def test_the_report_goes_where_it_is_wanted(tmp_path: Path, two: tuple[str, str]) -> None:
    assert (
        ask(tmp_path, *two, *DATA, *SMALL, "analysis=behaviour", f"out={tmp_path / 'here'}")
        == tmp_path / "here" / "index.html"
    )


def test_an_oracle_of_a_synthetic_world(tmp_path: Path, two: tuple[str, str]) -> None:
    with pytest.raises(IncompleteEvaluation, match=r"index.html: written, but without .* oracle_utility of policy"):
        ask(
            tmp_path, *two, *DATA, *SMALL, "analysis=behaviour", "judge=oracle", "toxicity=none"
        )  # random models say no word of the world
    (path,) = tmp_path.rglob("behaviour.csv")
    table = pd.read_csv(path).set_index(["metric", "of"])
    assert table.loc[("oracle_preference_rate", "both"), "value"] == 0.5
    assert table.loc[("oracle_preference_rate", "both"), "n"] == 3
    assert "toxicity_word_list" not in table.index.get_level_values(0)


def test_rewards_of_every_pair_of_a_file(tmp_path: Path, two: tuple[str, str]) -> None:
    rows = [{"prompt": f"Q {i // 2}?", "chosen": f"Yes {i}.", "rejected": "<b>No</b>"} for i in range(6)]
    (file := tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    asked = (*two, "data=preferences", f"data.path={file}", "analysis=rewards")
    page = ask(tmp_path, *asked, "rewards.beta=0.5", "rewards.n_shown=1")
    found = pd.read_csv(page.parent / "tables" / "rewards.csv")
    assert found["prompt"].tolist() == [0, 0, 1, 1, 2, 2], "in the file's order"
    text = page.read_text("utf-8")
    assert "6 pairs, of 3 prompts" in text
    assert "β = 0.5, as rewards.beta says" in text
    assert "rewards.beta=0.5 rewards.n_shown=1 analysis=rewards" in text
    assert "<b>No" not in text
    assert '<pre class="coloured">' in text
    fewer = ask(tmp_path, *asked, "pairs.n_pairs=2", f"out={tmp_path / 'fewer'}")
    assert len(pd.read_csv(fewer.parent / "tables" / "rewards.csv")) == 2
    assert "β = 0.1 is assumed" in fewer.read_text("utf-8")


def test_a_run_is_asked_again(tmp_path: Path, run: Path) -> None:
    page = ask(tmp_path, "run=last", "analysis=behaviour", *SMALL)
    assert page == run / "report" / "index.html"
    text = page.read_text(encoding="utf-8")
    assert f"run={run} {SMALL[0]}" in text
    assert "of this run’s base and aligned model, asked again after training" in text
    assert "The first 3 of the prompts above" in text


@pytest.mark.parametrize(("arguments", "day"), [((), "2024-07-05"), (("chat_date=2023-01-01",), "2023-01-01")])
def test_chat_templates_print_the_date_of_the_run_that_is_asked(
    arguments: tuple[str, ...], day: str, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (run / "config.yaml").open("a", encoding="utf-8") as file:
        file.write("chat_date: '2024-07-05'\n")
    seen: list[Any] = []
    monkeypatch.setattr("launch.analyzing._analyze_run", lambda wanted, _: seen.append(wanted.questions["behaviour"]))
    ask(tmp_path, "run=last", "analysis=behaviour", "truthfulqa=mc", *arguments)
    assert seen[0].truthfulqa.chat_date == day


def test_a_local_judge_in_this_process(tmp_path: Path, two: tuple[str, str]) -> None:
    judge = tmp_path / "judge"
    make_model("llama", seed=2, vocab_size=len(asked.TOKENIZER), max_position_embeddings=8192).save_pretrained(judge)
    asked.TOKENIZER.save_pretrained(judge)
    options = ("judge=local", f"judge.judge.model={judge}", "judge.evaluation_steps=[Look.]", "judge.steps_file=null")
    page = ask(tmp_path, *two, *DATA, *SMALL, "analysis=behaviour", *options)
    table = pd.read_csv(page.parent / "tables" / "behaviour.csv").set_index(["metric", "of"])
    for figure in (("geval_score", "policy"), ("geval_score", "base"), ("geval_win_rate_vs_chosen", "both")):
        assert 0 <= table.loc[figure, "value"] <= 1
        assert table.loc[figure, "n"] == 3
        assert "local:" in table.loc[figure, "scorer"]
    agreement = table.loc["judge/agreement", "judge"]
    assert agreement["n"] == 5, "all pairs that there are"
    assert agreement["ci_low"] <= agreement["value"] <= agreement["ci_high"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "run: expected a run folder, .* got neither"),
        (("run=last", "base=a"), r"run: .* got base and run"),
        (("base=a",), r"run: .* got base$"),
        (("base=a", "aligned=b"), r"data: expected where prompts come from, got none; add data=hh"),
        (("base=a", "aligned=b", "data=synthetic", "analysis=layers_by_step"), r"analysis=layers_by_step: needs a run"),
        (("run=last", "analysis=behavior"), r"analysis=behavior: there is none of that name \(there are: all, .*steering_sweep,"),
        (("run=last",), r"run=last: no finished run below"),
        (("run=last", "analysis=[training,foo]"), r"analysis=foo: there is none of that name"),
        (("run=last", "analysis=[]"), r"analysis=none: there is none of that name"),
        (("run=last", "analysis=training", "judge=oracle"), r"judge: has no effect here; it is for analysis=behaviour or"),
        (("run=last", "analysis=[training,geometry]", "decoding.temperature=1"), r"decoding.temperature: has no effect here"),
        (("run=last", "behaviour.n_prompts=3"), r"behaviour.n_prompts: has no effect here; it is for analysis=behaviour"),
        (
            ("run=last", "analysis=behaviour", "data=synthetic"),
            r"data: has no effect here; it is for two checkpoints, base=… aligned=…, or of a run analysis=shift",
        ),
        (("run=last", "out=x"), r"out: has no effect here; it is for two checkpoints"),
        (("run=last", "analysis=behaviour", "behaviour.n_promts=3"), r"behaviour.n_promts: unknown .* behaviour.n_prompts"),
        (("run=last", "analysis=behaviour", "judge=local"), r"judge.judge.model: expected a value"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    assert re.search(words, refused(tmp_path, *arguments))


@pytest.mark.slow
@pytest.mark.usefixtures("blank_pictures")
def test_all_of_a_run_opens_its_models_once_and_shows_whatever_there_is(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, load = [], checkpoints.load_model
    monkeypatch.setattr(checkpoints, "load_model", lambda where, **how: opened.append(where) or load(where, **how))
    page = ask(tmp_path, f"run={run}", *SWEEP)
    assert opened == [str(run / "base"), str(run / "aligned")]
    shown = ("training", *READ_NOW, "similarity", "rewards", "steering_sweep", "transfer", "weights")
    shown += ("recovery_ladder", "update_models", "depth", "shift", "traces", "neighbours", "gradient_field")
    assert {path.stem for path in (page.parent / "figures").glob("*.png")} == set(shown)
    text = page.read_text(encoding="utf-8")
    assert "behaviour_by_step, layers_by_step: the run logged nothing for it" in text
    assert "What does the model say while it trains" not in text
    assert "has no scores of generated text" in refused(tmp_path, f"run={run}", "analysis=behaviour_by_step")


def test_states_that_a_run_did_not_store_are_read_again_and_the_page_says_so(tmp_path: Path, run: Path) -> None:
    text = ask(tmp_path, f"run={run}", "analysis=geometry", "hidden_states.n_pairs=5").read_text("utf-8")
    assert text.count("The run stored nothing for this: hidden states of 5 of its held-out pairs were read again.") == 1
    assert "after 10 steps" in text
    assert "hidden_states.n_pairs=5 analysis=geometry" in text
    assert "no readings for it (expected a run" in refused(tmp_path, f"run={run}", "analysis=layers_by_step")
    for file in (run / "base").glob("*"):
        file.unlink()
    said = refused(tmp_path, f"run={run}", "analysis=clouds")
    assert "analysis=clouds: " in said
    assert "stored no hidden states for it, and they can’t be read again: " in said
    assert "pointer.json" in said


def test_states_that_a_run_stored_are_not_read_again(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry.write_snapshots(run / "snapshots")
    save_model(run / "base", seed=0)
    pd.DataFrame(geometry.run_rows()).to_csv(run / "metrics.csv", index=False)
    monkeypatch.setattr(StateReading, "read", lambda *_, **__: pytest.fail("read"))
    text = ask(tmp_path, f"run={run}", "analysis=geometry").read_text("utf-8")
    assert "read again" not in text
    said = refused(tmp_path, f"run={run}", "analysis=geometry", "hidden_states.n_pairs=5")
    assert said == "hidden_states.n_pairs: has no effect here; it is for hidden states that no run stored"
    (run / "snapshots" / "epoch=001.safetensors").write_bytes(b"nothing")
    assert "epoch=001.safetensors: damaged" in refused(tmp_path, f"run={run}", "analysis=clouds")


def test_a_dry_run_says_what_each_analysis_would_take(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert ask(tmp_path, f"run={run}", *SWEEP, "dry_run=true") is None
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    said = " ".join(capsys.readouterr().out.split())
    assert "hidden states │ hidden states │ 2.0 │" in said
    assert "steering_sweep │ choosing │ " in said
    assert ask(tmp_path, f"run={run}", "analysis=training", "dry_run=true") is None
    assert "Would run nothing" in capsys.readouterr().out


def test_the_scores_of_training_are_a_section_of_the_report(tmp_path: Path, run: Path) -> None:
    planted.write(run, planted.LOOKS)
    text = ask(tmp_path, f"run={run}", "analysis=behaviour_by_step").read_text(encoding="utf-8")
    assert "What does the model say while it trains" in text
    assert "how they were drawn is not known" in text


def test_a_damaged_table_ends_the_report_of_all_with_its_name(tmp_path: Path, run: Path) -> None:
    planted.write(run, planted.LOOKS).write_text("steps_taken\n1\n", encoding="utf-8")
    assert "behaviour_by_step.csv: expected the columns" in refused(tmp_path, f"run={run}")


@pytest.mark.slow
def test_a_judge_that_is_down_leaves_a_report_and_exit_code_3(tmp_path: Path, run: Path) -> None:
    options = ("judge=endpoint", "judge.judge.model=m", f"judge.judge.base_url={refused_url()}")
    options += (
        "judge.judge.max_retries=0",
        "judge.judge.api_key_env=MY_KEY",
        "judge.evaluation_steps=[Look.]",
        "judge.steps_file=null",
    )
    asking = (f"run={run}", "analysis=behaviour", *SMALL, *options)
    done = run_script("analyze.py", *asking, folder=tmp_path, environment={"MY_KEY": CANARY})
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tiltmeter: ")]
    assert "index.html: written, but without a number for " in line
    assert "geval_score" in line
    text = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "0 of 3" in text
    assert "The policy" not in text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]
    assert CANARY not in done.stdout + done.stderr


@pytest.fixture
def two_of_bloom(tmp_path: Path) -> tuple[str, str]:
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "family": "bloom"}
    old, new = (save_model(tmp_path / name, seed=i, **sizes) for i, name in enumerate(("old", "new")))
    return f"base={old}", f"aligned={new}"


@pytest.mark.slow
@pytest.mark.usefixtures("blank_pictures")
def test_what_a_family_cannot_do_is_left_out_by_name_and_the_rest_is_written(
    tmp_path: Path, two_of_bloom: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    page = ask(tmp_path, *two_of_bloom, *DATA, *SMALL, *SWEEP)
    text, said = page.read_text(encoding="utf-8"), " ".join(capsys.readouterr().out.split())
    for name in (*READ_NOW, "behaviour"):
        assert (page.parent / "figures" / f"{name}.png").is_file(), name
    assert "steering_sweep, gradient_field left out: model: BloomForCausalLM can&#39;t change its attention" in text
    assert "transfer left out: BloomForCausalLM has no attention that rows can be shared in" in text
    assert "transfer left out: BloomForCausalLM" in said


def test_what_a_family_cannot_do_is_refused_where_it_was_asked_for_by_name(
    tmp_path: Path, two_of_bloom: tuple[str, str]
) -> None:
    said = refused(tmp_path, *two_of_bloom, "data=synthetic", *DATA[2:], "analysis=transfer")
    assert "BloomForCausalLM has no attention that rows can be shared in" in said


def test_an_attention_kernel_that_none_has(tmp_path: Path, two: tuple[str, str]) -> None:
    said = refused(tmp_path, *two, *DATA, "attn_implementation=flash")
    assert "attn_implementation: expected sdpa or eager, got flash" in said
