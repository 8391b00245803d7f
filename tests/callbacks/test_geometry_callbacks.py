"""What callbacks log while a tiny model trains, against the same figures made by hand from output_hidden_states."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from callbacks.directional_consistency import DirectionalConsistency
from callbacks.gradient_geometry import GradientGeometry
from callbacks.hidden_state_snapshot import HiddenStateSnapshot
from callbacks.preference_projection import PreferenceProjection
from callbacks.probe_session import ProbeSession
from callbacks.spectral_entropy import SpectralEntropy
from callbacks.training_alarms import TrainingAlarms
from datamodules.preference import PreferenceDataModule
from lightning_modules.base import LogProbModule
from lightning_modules.sft import SFTModule
from tests.callbacks.memory_logger import MemoryLogger
from tests.callbacks.watched import dpo, probe_data, watch
from tests.tiny_models import fit, lightning_warnings, make_data
from tiltmeter.errors import UserError
from tiltmeter.metric_names import at
from tiltmeter.states.snapshots import SnapshotReader

pytestmark = lightning_warnings
SITES = ("layer_00", "final_pre_norm", "final_post_norm")


def everything(**options: Any) -> list[Callback]:
    observers: list[Callback] = [
        HiddenStateSnapshot(**options),
        PreferenceProjection(**options),
        SpectralEntropy(**options),
        DirectionalConsistency(**options),
    ]
    return [*observers, GradientGeometry(every_n_steps=2), TrainingAlarms(window=2)]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryLogger, LogProbModule, PreferenceDataModule, Path]:
    folder = tmp_path_factory.mktemp("run")
    return *watch(folder, everything(), max_epochs=2), folder


def states_by_hand(model: PreTrainedModel, data: PreferenceDataModule) -> dict[str, Tensor]:
    """Site → [pair, d] at the prompt's last token, one prompt at a time; final_pre_norm undoes nothing, it is hooked."""
    found: dict[str, list[Tensor]] = {site: [] for site in SITES}
    for prompt, _, _ in data.splits["probe"].pairs:
        before: list[Tensor] = []
        handle = model.model.norm.register_forward_pre_hook(lambda _, inputs, kept=before: kept.append(inputs[0]))
        with torch.no_grad():
            states = model(input_ids=torch.tensor([list(prompt)]), output_hidden_states=True).hidden_states
        handle.remove()
        for site, state in zip(SITES, (states[1], before[0], states[-1]), strict=True):
            found[site].append(state[0, -1].double())
    return {site: torch.stack(rows) for site, rows in found.items()}


def test_spectra_are_those_of_the_models_own_hidden_states(watched: Any) -> None:
    logger, module, data, _ = watched
    policy = states_by_hand(module.trained_policy.model, data)
    fresh = dpo(learning_rate=1e-30)
    fit(fresh, data, family="llama", dtype="float32", max_steps=1)
    base = states_by_hand(fresh.trained_policy.model, data)
    for site in SITES:
        update = policy[site] - base[site]
        for name, matrix in (("delta", update), ("delta_centred", update - update.mean(0)), ("policy", policy[site])):
            energy = torch.linalg.svdvals(matrix).square()
            q = energy / energy.sum()
            entropy = -(q * q.clamp(min=1e-300).log()).sum()
            assert logger.of(f"top1_energy/{name}/{site}")[-1] == pytest.approx(float(q[0]), abs=1e-4)
            assert logger.of(f"spectral_entropy/{name}/energy/{site}")[-1] == pytest.approx(float(entropy), abs=1e-3)
        mean = update.mean(0)
        share = len(update) * mean.square().sum() / update.square().sum()
        assert logger.of(f"shift_share/delta/{site}")[-1] == pytest.approx(float(share), abs=1e-4)
        cosines = torch.nn.functional.cosine_similarity(update, mean[None])
        assert logger.of(f"mean_cosine/in_sample/{site}")[-1] == pytest.approx(float(cosines.mean()), abs=1e-4)
        others = torch.nn.functional.cosine_similarity(update, len(update) * mean - update)
        assert logger.of(f"mean_cosine/leave_one_out/{site}")[-1] == pytest.approx(float(others.mean()), abs=1e-4)


def test_the_base_is_read_before_training_and_has_no_update_yet(watched: Any) -> None:
    logger, _, _, _ = watched
    first = [row for row in logger.rows if row.get("probe/steps_taken") == 0]
    names = {name for row in first for name in row}
    assert "spectral_entropy/base/energy/layer_00" in names
    assert not {name for name in names if name.split("/")[1:2] == ["delta"] and "update_norm" not in name}
    taken = sorted({row["probe/steps_taken"] for row in logger.rows if "shift_share/delta/layer_00" in row})
    assert taken == [3, 6], "at the end of both epochs"
    assert [row["step"] for row in logger.rows if "shift_share/delta/layer_00" in row] == [2, 5]
    assert "direction_settled/layer_00" in logger.names, "v* of the second epoch against that of the first"


def test_projections_have_intervals_and_the_hyperplane_says_whose_log_odds_grew(watched: Any) -> None:
    logger, _, _, _ = watched
    for site in SITES:
        change = logger.of(f"projection/delta/{site}")[-1]
        low, high = (logger.of(f"projection/delta_{end}/{site}")[-1] for end in ("low", "high"))
        assert low <= change <= high
        difference = logger.of(f"projection/policy/{site}")[-1] - logger.of(f"projection/base/{site}")[-1]
        assert change == pytest.approx(difference, abs=1e-4)
        assert -1 <= logger.of(f"direction_cosine/token/{site}")[-1] <= 1
    assert logger.of("projection/share_grown")[-1] == logger.of("hyperplane/share_preferred")[-1]
    assert "projection_sequence/share_grown/layer_00" in logger.names


def test_snapshots_hold_what_was_measured(watched: Any) -> None:
    logger, _, data, folder = watched
    reader = SnapshotReader(folder / "snapshots")
    assert reader.names == ["base", "epoch=000", "epoch=001"]
    base, last = reader.load("base"), reader.load("epoch=001")
    assert reader.pair_ids == [record.pair_id for record in data.splits["probe"].records]
    for point, found in last.items():
        update = found.rows.double() - base[point].rows.double()
        share = len(update) * update.mean(0).square().sum() / update.square().sum()
        assert logger.of(at("shift_share/delta", point))[-1] == pytest.approx(float(share), abs=1e-6)
        if point.position == "prompt_last":
            vectors = load_file(folder / "vectors" / "steering.safetensors")
            torch.testing.assert_close(vectors[point.site].double(), update.mean(0), rtol=1e-4, atol=1e-6)


def test_gradients_and_alarms_are_logged_every_few_steps(watched: Any) -> None:
    logger, _, _, _ = watched
    assert len(logger.of("gradient/mean_resultant")) == 3
    assert all(0 <= value <= 1 for value in logger.of("gradient/mean_resultant"))
    assert all(0 < value <= 1 for value in logger.of("gradient/energy_along_sequence"))
    assert len(logger.of("gradient/energy_along_steering")) == 2, "from the first observation after a step on"
    rewards, beta = logger.of("train/rewards/chosen"), 0.1
    lost = [-sum(rewards[i : i + 2]) / 2 / beta for i in range(0, 6, 2)]
    assert logger.of("alarm/chosen_logp_drop") == pytest.approx(lost, abs=1e-5)
    assert {"alarm/accuracy_saturation", "alarm/length_ratio", "alarm/nan"} <= logger.names


@pytest.mark.parametrize("kind", range(6))
def test_each_callback_works_alone_and_logs_the_same_as_in_company(watched: Any, tmp_path: Path, kind: int) -> None:
    together, _, _, _ = watched
    alone, _, _ = watch(tmp_path, [everything()[kind]], max_epochs=2)
    own = {name for name in alone.names if not name.startswith(("train/", "throughput/", "epoch", "step"))}
    for name in own:
        assert alone.of(name)[-1] == pytest.approx(together.of(name)[-1], abs=1e-6), name
    if kind == 0:
        assert SnapshotReader(tmp_path / "snapshots").names == ["base", "epoch=000", "epoch=001"]
    else:
        assert own - {"probe/steps_taken"}


def test_order_of_callbacks_and_size_of_batches_change_nothing(watched: Any, tmp_path: Path) -> None:
    together, _, _, _ = watched
    reversed_, _, _ = watch(tmp_path, everything()[::-1], data=probe_data(tokens_per_micro_batch=90), max_epochs=2)
    names = {n for n in together.names if n.startswith(("spectral", "shift", "mean_cosine", "projection", "top1"))}
    for name in names:
        assert reversed_.of(name)[-1] == pytest.approx(together.of(name)[-1], abs=2e-3), name


def test_watching_changes_nothing_in_training(watched: Any, tmp_path: Path) -> None:
    together, module, _, _ = watched
    plain, other, _ = watch(tmp_path, [], max_epochs=2)
    assert plain.of("train/loss") == together.of("train/loss")
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"lora": True}])
def test_other_ways_to_train_are_watched_too(options: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig

    if options.get("lora"):
        options = {"lora": LoraConfig(r=2, lora_alpha=4)}
    logger, _, _ = watch(tmp_path, everything(), module=dpo(**options))
    assert logger.of("update_norm/layer_00")[-1] > 0
    assert logger.of("gradient/mean_resultant")


def test_sft_is_watched_on_the_same_probe(tmp_path: Path) -> None:
    logger, _, _ = watch(tmp_path, everything(), module=SFTModule(learning_rate=3e-3, warmup_share=0.0))
    assert logger.of("shift_share/delta/layer_00")
    assert logger.of("projection/delta/layer_00")


def test_every_n_steps_adds_looks_in_between(tmp_path: Path) -> None:
    logger, _, _ = watch(tmp_path, [SpectralEntropy(sites="layer_00", every_n_steps=2)])
    assert [row["probe/steps_taken"] for row in logger.rows if "state_norm/layer_00" in row] == [0, 2, 3]
    assert not any("final" in name for name in logger.names)


def test_one_forward_pass_serves_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    plain = ProbeSession._read
    monkeypatch.setattr(
        ProbeSession, "_read", lambda self, trainer, module: reads.append(1) or plain(self, trainer, module)
    )
    watch(tmp_path, everything())
    assert len(reads) == 2


def test_a_resumed_run_compares_with_the_first_base(watched: Any, tmp_path: Path) -> None:
    _, module, data = watch(tmp_path, everything(), module=dpo(schedule="constant"))
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    module.trainer.save_checkpoint(checkpoint)
    resumed, _, _ = watch(
        tmp_path, everything(), module=dpo(schedule="constant"), data=data, max_epochs=2, ckpt_path=str(checkpoint)
    )
    whole, _, _ = watch(tmp_path / "whole", everything(), module=dpo(schedule="constant"), max_epochs=2)
    names = ("shift_share/delta", "projection/delta", "mean_cosine/in_sample", "direction_settled")
    for name in (f"{name}/layer_00" for name in names):
        assert resumed.of(name)[-1] == pytest.approx(whole.of(name)[-1], abs=1e-6), name
    assert SnapshotReader(tmp_path / "snapshots").names == ["base", "epoch=000", "epoch=001"]


def test_resuming_without_the_base_is_refused(tmp_path: Path) -> None:
    _, module, data = watch(tmp_path, [])
    checkpoint = tmp_path / "last.ckpt"
    module.trainer.save_checkpoint(checkpoint)
    with pytest.raises(UserError, match="holds no hidden states of the base model at final_post_norm, content"):
        watch(tmp_path, [SpectralEntropy()], data=data, max_epochs=2, ckpt_path=str(checkpoint))


def test_resuming_with_a_look_at_other_sites_is_refused(tmp_path: Path) -> None:
    _, module, data = watch(tmp_path, [SpectralEntropy(sites="final_post_norm")])
    checkpoint = tmp_path / "last.ckpt"
    module.trainer.save_checkpoint(checkpoint)
    with pytest.raises(UserError, match="no hidden states of the base model at layer_00, content"):
        watch(
            tmp_path,
            [SpectralEntropy(sites=["layer_00", "final_post_norm"])],
            data=data,
            max_epochs=2,
            ckpt_path=str(checkpoint),
        )


def test_a_full_disk_raises_an_alarm_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tiltmeter.states.snapshots.save_file", full)
    with pytest.warns(
        UserWarning, match=r"snapshots: could not be written \(No space left on device; .* MiB are free there\)"
    ):
        logger, module, _ = watch(tmp_path, [HiddenStateSnapshot()])
    assert logger.of("alarm/snapshot") == [1.0, 1.0]
    assert module.trainer.global_step == 3
    assert not list(tmp_path.glob("snapshots/*"))


def test_wrong_options_are_one_line() -> None:
    with pytest.raises(UserError, match="positions: expected one of"):
        SpectralEntropy(positions=["somewhere"])
    with pytest.raises(UserError, match="every_n_steps: expected at least 1"):
        SpectralEntropy(every_n_steps=0)
    with pytest.raises(UserError, match="variants: expected raw"):
        SpectralEntropy(variants=["cooked"])
    with pytest.raises(UserError, match="dtype: expected one of"):
        HiddenStateSnapshot(dtype="float8")


def test_an_unknown_site_or_an_empty_probe_stops_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layer_77"):
        watch(tmp_path, [SpectralEntropy(sites=["layer_77"])])
    with pytest.raises(UserError, match=r"expected held-out pairs to probe, got none; set datamodule.probe_pairs"):
        watch(tmp_path, [SpectralEntropy()], data=make_data(8, pairs_per_step=4))
