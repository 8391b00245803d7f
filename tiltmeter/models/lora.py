"""Low-rank adapters (peft) inside a causal language model: put in, checked, switched off for the reference, merged at the end.

Beside them whole modules can be trained (``modules_to_save``): a copy of each takes its place, the original stays the reference's.
"""

import copy
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from torch.nn import Dropout, Linear, Module, Parameter
from transformers import PreTrainedModel

from tiltmeter.errors import UserError, argument
from tiltmeter.models.layers import backbone
from tiltmeter.models.state_adapter import StateAdapter
from tiltmeter.pairs.batch import collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.pairs.verification import LOG_PROB_TOLERANCE, random_pairs

ADAPTER = "default"
_TOLERANCE = 1e-5
"""Adapters start at exactly nothing; DoRA divides and multiplies by the same norm."""


def check_lora(lora: LoraConfig, *, freeze_embeddings: bool) -> None:
    """Refuse options under which the model before the first step would not be the reference, or that have no effect.

    Raises:
        UserError: names the option.
    """
    refused = {
        "init_lora_weights": (
            lora.init_lora_weights if lora.init_lora_weights != "gaussian" else True,
            True,
            "others change the model before its first step, which is the reference (gaussian is possible too)",
        ),
        "bias": (lora.bias, "none", "the weights themselves stay as they are"),
        "ensure_weight_tying": (lora.ensure_weight_tying, False, "embeddings that are trained whole are untied"),
        "trainable_token_indices": (lora.trainable_token_indices or None, None, "embeddings stay as they are"),
    }
    for name, (value, wanted, reason) in refused.items():
        if value != wanted:
            raise UserError(f"{argument(f'LoraConfig.{name}')}: expected {wanted}, got {value}: {reason}")
    whole: object = lora.modules_to_save
    if whole is not None and (not isinstance(whole, list | tuple) or not all(whole)):
        raise UserError(
            f"{argument('LoraConfig.modules_to_save')}: expected a list of modules such as [lm_head], got {whole!r}"
        )
    if not freeze_embeddings:
        raise UserError(
            f"{argument('check_lora.freeze_embeddings')}=false: with {argument('add_lora.lora')} only adapters are trained, and "
            f"what {argument('LoraConfig.modules_to_save')}=[lm_head] names; leave one of the two out"
        )


def add_lora(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Put adapters into the model, in place, and freeze everything else; the model still computes what it did.

    Raises:
        UserError: see :func:`insert_adapters` and :func:`check_adapters`.
    """
    insert_adapters(model, lora)
    check_adapters(model)


def insert_adapters(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Put adapters into the model, in place, and freeze everything else; its own weights may still be on the meta device.

    Modules of ``modules_to_save`` are trained whole, as copies in their own dtype, which only weights that are there give.

    Adapters drop nothing of what they read, whatever mode the model is in, but inside :func:`adapter_dropout`.
    Without ``target_modules`` every linear map of the decoder blocks gets one. Adapters of 16-bit weights are float32,
    in which small updates aren't rounded away.

    Raises:
        UserError: no module matches, or one outside the decoder is matched; a module can't be trained whole.
    """
    if lora.target_modules is None:
        lora.target_modules = "all-linear"
    try:
        with warnings.catch_warnings(), _weights_have_a_device(model):
            warnings.filterwarnings(
                "ignore", "fan_in_fan_out is set to False"
            )  # peft turns it over for GPT-2 by itself
            warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match.*gate_up_proj")
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True` and a tied layer")
            model.add_adapter(lora, ADAPTER)
    except (
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:  # of modules that can't be trained whole: lists, quantized ones
        raise UserError(
            f"{argument('add_lora.lora')}: {' '.join(str(error).split())[:200]}{_other_maps(model, error)}"
        ) from error
    inside = {id(module) for module in backbone(model).modules()} - {id(model.get_input_embeddings())}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and id(module) not in inside:
            raise UserError(
                f"{argument('LoraConfig.target_modules')}: {name} is no part of the decoder; embeddings and unembedding are "
                f"trained whole or not at all ({argument('LoraConfig.modules_to_save')})"
            )
    _check_whole(model, lora.modules_to_save or ())
    for name, parameter in model.named_parameters():
        is_adapter = parameter.requires_grad and "lora_" in name
        if is_adapter and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    for dropout in _dropouts(model):
        dropout.p = 0.0


def trained_whole(model: Module) -> dict[str, ModulesToSaveWrapper]:
    """Modules that are trained whole beside the adapters, each with its original, by the name of the plain module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def _check_whole(model: PreTrainedModel, wanted: Iterable[str]) -> None:
    """Refuse names that no module has, and modules that can't be trained whole. Raises UserError."""
    key, found = argument("LoraConfig.modules_to_save"), trained_whole(model)
    for name in wanted:
        if not any(there.endswith(name) for there in found):
            raise UserError(f"{key}: {name} is no module of {type(model).__name__}; expected names such as lm_head")
    for name, module in found.items():
        if any(isinstance(inner, LoraLayer | ModulesToSaveWrapper) for inner in [*module.modules()][1:]):
            raise UserError(
                f"{key}: {name} has adapters or modules inside that are trained themselves; name it or them, not both"
            )
        if not any(True for _ in module.parameters()):
            raise UserError(f"{key}: {name} has no weights to train; leave it out")


def _other_maps(model: PreTrainedModel, error: Exception) -> str:
    """Advice where peft finds maps unfit that nobody asked for (Mamba's fused ones): the linear maps it doesn't name.

    And where it was to train quantized weights themselves.
    """
    if "floating point" in str(error):
        key = argument("LoraConfig.modules_to_save")
        return f": quantized weights can't be trained whole, {key} takes others such as [lm_head]"
    linear = [name for name, module in backbone(model).named_modules() if isinstance(module, Linear)]
    maps = {_kind(name) for name in linear if "lora_" not in name}  # some may have their adapters already
    left = [name for name in sorted(maps) if f"'{name}'" not in str(error)]
    if "ncompatible" not in str(error) or not left:
        return ""
    return f" …; name the maps to adapt, such as {argument('LoraConfig.target_modules')}=[{','.join(left)}]"


def check_adapters(model: PreTrainedModel) -> None:
    """Adapters that were just put in must change nothing: without them the model is the reference.

    Raises:
        UserError: the model can't run with them, computes something else, or takes weights past them.
    """
    with adapters_disabled(model):
        before = _log_probs(model)
    adapters = {
        cast(Module, module): _kind(name) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    head = model.get_output_embeddings()  # whose weights are read, in chunks, and of which no forward is called
    adapters |= {module: _kind(name) for name, module in trained_whole(model).items() if module is not head}
    ran: set[str] = set()
    hooks = [module.register_forward_hook(lambda module, *_: ran.add(adapters[module])) for module in adapters]
    try:
        worst = float(((_log_probs(model) - before) / before).abs().max())
    except Exception as error:  # of modules that are more than the linear map they are taken for (PhiMoE's routers)
        raise UserError(
            f"{argument('add_lora.lora')}: {type(model).__name__} can't run with these adapters ({_reason(error)}); name the "
            f"maps to adapt, such as {argument('LoraConfig.target_modules')}=[q_proj,v_proj]"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if unused := sorted({*adapters.values()} - ran):
        raise UserError(
            f"{argument('LoraConfig.target_modules')}: {type(model).__name__} reads the weights of {', '.join(unused)} past "
            "their adapters, which would be trained for nothing; name the maps to adapt, such as "
            f"{argument('LoraConfig.target_modules')}=[{','.join(sorted(ran))}]"
        )
    if not worst <= _TOLERANCE:
        raise UserError(
            f"{argument('add_lora.lora')}: these options change the model before its first step, the reference (by {worst:.1g}, "
            "relative); leave the unusual ones out"
        )


def _kind(name: str) -> str:
    """The last name of an adapted map, which those of all blocks and experts share."""
    return re.sub(r"(\.base_layer)+$", "", name).split(".")[-1]


def reads_weights(config: LoraConfig) -> bool:
    """True where adapters begin from the weights they are put beside (DoRA: norms; whole modules), which must be there by then."""
    return bool(config.use_dora or config.modules_to_save)


def is_trained(name: str) -> bool:
    """Whether a weight of an adapted model, by its name, belongs to an adapter or to a module that is trained whole.

    >>> is_trained("model.layers.0.mlp.up_proj.lora_A.default.weight"), is_trained("lm_head.modules_to_save.default.weight")
    (True, True)
    >>> is_trained("model.layers.0.mlp.up_proj.base_layer.weight"), is_trained("lm_head.original_module.weight")
    (False, False)
    """
    return "lora_" in name or ".modules_to_save." in name


def plain_name(name: str) -> str:
    """Name of a weight in the model without adapters.

    >>> plain_name("model.layers.0.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> plain_name("model.layers.0.mlp.experts.base_layer.base_layer.down_proj")
    'model.layers.0.mlp.experts.down_proj'
    >>> plain_name("lm_head.original_module.weight")
    'lm_head.weight'
    """
    return re.sub(r"\.(base_layer|original_module)(?=\.)", "", name)


def plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict that the model would have without adapters; the tensors are its own."""
    adapters = {
        f"{name}.{inner}"
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer | ModulesToSaveWrapper | StateAdapter)
        for inner in cast(Module, module).state_dict()
        if not inner.startswith(("base_layer.", "original_module."))
    }
    return {plain_name(name): tensor for name, tensor in model.state_dict().items() if name not in adapters}


@contextmanager
def _weights_have_a_device(model: PreTrainedModel) -> Iterator[None]:
    """Inside, parameters on the meta device are views of one number on the CPU: peft draws adapters where the weights are."""
    replaced = []
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                view = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
                module.register_parameter(name, Parameter(view, weight.requires_grad))
                replaced.append((module, name, weight))
    try:
        yield
    finally:
        for module, name, weight in replaced:
            weight.requires_grad_(module.get_parameter(name).requires_grad)
            module.register_parameter(name, weight)


@torch.no_grad()
def _log_probs(model: PreTrainedModel) -> Tensor:
    pairs = random_pairs(model)
    return sequence_log_probs(model, collate_pairs(pairs, pair_index=range(len(pairs)), layout="concatenated"))


@contextmanager
def adapters_disabled(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is what it was before adapters, or a vector that is trained, were put in; without any nothing changes.

    What is trained whole is switched alone and not frozen meanwhile, as peft would: FSDP2 has other parameters in its
    root's modules after the pass than before it, and those of before would stay frozen.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer | StateAdapter)]
    whole = trained_whole(model).values()

    def switch(is_on: bool) -> None:
        for layer in layers:
            layer.enable_adapters(is_on)
        for module in whole:
            super(ModulesToSaveWrapper, module).enable_adapters(is_on)

    switch(False)
    try:
        yield
    finally:
        switch(True)


@contextmanager
def adapter_dropout(model: PreTrainedModel, rate: float) -> Iterator[None]:
    """Inside, adapters drop this share of what they read while the model is in training mode (``lora_dropout``)."""
    dropouts = _dropouts(model) if rate else []
    for dropout in dropouts:
        dropout.p = rate
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.p = 0.0


def _dropouts(model: PreTrainedModel) -> list[Dropout]:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [dropout for layer in layers for dropout in layer.lora_dropout.values() if isinstance(dropout, Dropout)]


def merged_state(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a plain model that computes what the adapted one does, up to the rounding of its dtype.

    Args:
        model: a model with adapters on the CPU; its own weights are replaced.
        state: the state dict to merge.

    Raises:
        UserError: these adapters can't be merged into this model, or the merged one computes something else.
    """
    model.load_state_dict(state)
    before = _log_probs(model)
    try:
        _merge_in_place(model, is_safe=True)
        model.delete_adapter(ADAPTER)  # else it would still be saved as one with adapters
        worst = float(((_log_probs(model) - before) / before).abs().max())
    except Exception as error:  # whatever a family makes peft raise, RecursionError too
        raise UserError(f"these adapters can't be merged ({_reason(error)})") from error
    if not worst <= LOG_PROB_TOLERANCE.get(model.dtype, 5e-2):
        raise UserError(f"the merged model gives other log-probs than the adapted one (by {worst:.1g}, relative)")
    return dict(model.state_dict())


def why_not_merged(model: PreTrainedModel, config: LoraConfig) -> str | None:
    """Try whether adapters can be merged; one line on what goes wrong, None where nothing does.

    Args:
        model: without weights, on the meta device; it is used up.

    Raises:
        UserError: as :func:`insert_adapters`.
    """
    insert_adapters(model, copy.deepcopy(config))
    try:
        cast(Module, model).to("meta")
        _merge_in_place(model, is_safe=False)
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _merge_in_place(model: PreTrainedModel, *, is_safe: bool) -> None:
    """Put plain modules with the merged weights where the adapters are; several of one module lie inside each other.

    Embeddings and unembedding that were one weight and are two now stay two when the model is saved and read again.
    """
    for name, module in _outermost(model):
        if isinstance(module, ParamWrapper):
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=is_safe, adapter_names=None)
        else:
            module.merge(safe_merge=is_safe)
            plain = module.get_base_layer()
        model.set_submodule(name, plain)
    for name, whole in trained_whole(model).items():
        model.set_submodule(name, whole.modules_to_save[ADAPTER])
    untie(model)


def untie(model: PreTrainedModel) -> None:
    """Let the model's configuration say that embeddings and unembedding are two weights, where they are and it says otherwise."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(model.config, "tie_word_embeddings", False) and head is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False


def _outermost(model: PreTrainedModel) -> list[tuple[str, LoraLayer]]:
    found: list[tuple[str, LoraLayer]] = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not (found and name.startswith(f"{found[-1][0]}.")):
            found.append((name, module))
    return found
