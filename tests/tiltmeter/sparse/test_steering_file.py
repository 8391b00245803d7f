"""A trained steering on disk: it computes what it did, and is not put on another autoencoder."""

from pathlib import Path

import pytest
import torch

from tests.tiltmeter.sparse.dictionaries import noise
from tests.tiltmeter.sparse.test_steering import IDS, loosened, random_sae
from tests.tiny_models import make_model
from tiltmeter.errors import UserError
from tiltmeter.sparse.files import save_sae
from tiltmeter.sparse.steering import SparseOptions, insert_steering
from tiltmeter.sparse.steering_file import load_steering, open_sae, save_steering


def test_a_steering_computes_what_it_did_once_read(tmp_path: Path) -> None:
    save_sae(random_sae(32, dtype=torch.float32), tmp_path / "sae")
    options = SparseOptions(str(tmp_path / "sae"))
    model, again = make_model("llama"), make_model("llama")
    steering = loosened(insert_steering(model, open_sae(options), options)).float()
    save_steering(tmp_path / "steering.safetensors", steering, options)
    stored = load_steering(tmp_path / "steering.safetensors")
    plain = again(IDS).logits
    stored.fill(insert_steering(again, stored.sae, stored.options))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert (plain - again(IDS).logits).abs().max() > 1e-2


def test_another_or_a_missing_autoencoder_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    sae = random_sae(32, dtype=torch.float32)
    save_sae(sae, tmp_path / "sae")
    options = SparseOptions(str(tmp_path / "sae"))
    path = tmp_path / "steering.safetensors"
    with pytest.raises(UserError, match="no such file"):
        load_steering(path)
    save_steering(path, insert_steering(make_model("llama"), open_sae(options), options), options)
    with torch.no_grad():
        sae.encoder_bias.copy_(noise(len(sae.encoder_bias), seed=8))
    save_sae(sae, tmp_path / "sae")
    with pytest.raises(UserError, match="is another one than it was trained with"):
        load_steering(path)
    (tmp_path / "sae").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"its autoencoder can't be read: .*no such folder"):
        load_steering(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged, or no file of a steering"):
        load_steering(path)
