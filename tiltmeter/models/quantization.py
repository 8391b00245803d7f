"""Weights in 4 bits (NF4, arXiv 2305.14314) by bitsandbytes: made, recognised, and read as the numbers that they stand for."""

import importlib.util

import torch
from torch.nn import Linear
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from tiltmeter.errors import UserError, argument

QUANTIZATIONS = ("nf4",)
BLOCK = 64
"""Weights that share a scale."""


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """The quantization of QLoRA: 4-bit NormalFloat in blocks of 64, whose scales are quantized too.

    Args:
        dtype: of the matrix products.

    Raises:
        UserError: bitsandbytes is missing.
    """
    check_bitsandbytes(f"{argument('CausalLM.quantization')}=nf4")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def check_bitsandbytes(what: str) -> None:
    """Refuse what needs bitsandbytes where it isn't installed. Raises UserError.

    Args:
        what: the option, as it is said in the error.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{what}: needs bitsandbytes, which isn't installed; pip install 'tiltmeter[quantization]'")


def is_quantized(config: PretrainedConfig, where: str) -> bool:
    """True where a model's files say that bitsandbytes has quantized its weights; other ways are left to transformers.

    Args:
        where: the model, as it is said in the error.

    Raises:
        UserError: bitsandbytes is missing.
    """
    said = getattr(config, "quantization_config", None)
    method = None if said is None else said.get("quant_method") if isinstance(said, dict) else said.quant_method
    if str(getattr(method, "value", method)) != "bitsandbytes":
        return False
    check_bitsandbytes(f"{where}, whose weights are quantized")
    return True


def check_blocks(model: PreTrainedModel, where: str) -> None:
    """Refuse quantized maps whose rows aren't whole blocks: bitsandbytes 0.50 mixes up their scales on a CPU.

    Args:
        where: the model, as it is said in the error.

    Raises:
        UserError: it has one; names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, Linear) and hasattr(module, "quant_state") and module.in_features % BLOCK:
            raise UserError(
                f"{where}: {name} takes {module.in_features} numbers, expected a multiple of {BLOCK}, the block in which weights "
                "are quantized; leave quantization out"
            )


def dequantized(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model with plain weights: the very numbers that its quantized ones stand for; one without any as it is.

    Args:
        model: is changed in place.
        dtype: of the weights; None: the model's.
    """
    if not getattr(model, "is_quantized", False) or not is_quantized(model.config, type(model).__name__):
        return model
    plain: PreTrainedModel = model.dequantize(dtype=dtype or model.dtype)
    del plain._weight_conversions  # of the files that it was read from; with them transformers refuses to save it
    return plain
