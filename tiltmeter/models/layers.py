"""Finds the parts of a Hugging Face causal language model: backbone, blocks, norms, embeddings, unembedding; and sites.

Every difference between model families that matters to this project is in this file.

A *site* is a named place where hidden states are read. With L decoder blocks, counted from 0:

=================== ============================================ ================================================
site                what it holds                                in Hugging Face's ``output_hidden_states``
=================== ============================================ ================================================
``layer_07``        residual stream after block 7                ``hidden_states[8]``; the last block's is not there
``final_pre_norm``  input of the final norm = after block L-1    not there
``final_post_norm`` output of the final norm = input of lm_head  ``hidden_states[L]``, the last one
=================== ============================================ ================================================

So ``layer_07`` is the residual stream that enters block 8, and ``layer_<L-1>`` is ``final_pre_norm`` by another name. In the
notation of METHOD: ``layer_07`` = resid_post.7 = resid_pre.8.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiltmeter.errors import UserError

FINAL_PRE_NORM, FINAL_POST_NORM = "final_pre_norm", "final_post_norm"

_LAYER_SITE = re.compile(r"layer_(\d{2,})")
_FINAL_NORMS = (
    "norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "final_norm",
    "embedding_norm", "ln_out", "out_norm", "layer_norm", "layernorm",
)  # fmt: skip
"""Attribute of the backbone by family: Llama and most others, GPT-2 and its kin, GPT-NeoX and OPT, Phi, MPT, ModernBERT; LFM2,
RWKV, xLSTM, XGLM and BioGPT, CTRL."""
_WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "sliding_window_size")
"""Settings that say how far back narrow layers see: most families, GPT-Neo, RecurrentGemma, Llama 4, Inkling."""


@dataclass(frozen=True)
class Unembedding:
    """logits = cap · tanh(scale · (h Wᵀ + b) / cap), the last map of a causal language model."""

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    """Constant factor on the logits (Cohere ``logit_scale``, Granite ``1 / logits_scaling``)."""
    soft_cap: float | None = None
    """Gemma 2's ``final_logit_softcapping``; None: no cap."""


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its unembedding: ids in, hidden states after the final norm out (HF ``last_hidden_state``).

    Raises:
        UserError: the model has no separate backbone.
    """
    found, embedding = model.get_decoder(), model.get_input_embeddings()
    if not isinstance(found, nn.Module) or found is model or embedding not in found.modules():
        inside = [child for child in model.children() if child is not embedding and embedding in child.modules()]
        found = inside[0] if inside else None
    if found is None:
        raise UserError(f"model: expected a causal language model with a backbone, got {type(model).__name__}")
    return found


def unembedding(model: PreTrainedModel) -> Unembedding:
    """Weight, bias and logit transformation of the model's head, read from its module and its configuration.

    Raises:
        UserError: the model has no linear output embedding.
    """
    head = model.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise UserError(f"model: expected a linear unembedding (lm_head), {type(model).__name__} has none")
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    soft_cap = getattr(config, "final_logit_softcapping", None)
    bias = getattr(head, "bias", None)
    return Unembedding(head.weight, bias, scale, None if soft_cap is None else float(soft_cap))


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder blocks, block 0 first.

    Raises:
        UserError: no list of ``config.num_hidden_layers`` modules was found directly in the backbone.
    """
    n_layers = model.config.num_hidden_layers
    for module in backbone(model).children():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise UserError(f"model: expected a list of {n_layers} decoder blocks in {type(model).__name__}, found none")


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last block and the unembedding: its input is ``final_pre_norm``, its output ``final_post_norm``.

    Raises:
        UserError: the backbone has none under a known name.
    """
    for name in _FINAL_NORMS:
        module = getattr(backbone(model), name, None)
        if isinstance(module, nn.Module):
            return module
    raise UserError(
        f"model: expected a final norm named one of {', '.join(_FINAL_NORMS)} in {type(model).__name__}, found none"
    )


def layer_site(layer: int) -> str:
    """Name of the residual stream after block ``layer``, counted from 0.

    >>> layer_site(7), layer_site(123)
    ('layer_07', 'layer_123')
    """
    return f"layer_{layer:02d}"


def all_sites(n_layers: int) -> tuple[str, ...]:
    """Every site once, in the order of the forward pass; the last block's is ``final_pre_norm``.

    >>> all_sites(3)
    ('layer_00', 'layer_01', 'final_pre_norm', 'final_post_norm')
    """
    return (*map(layer_site, range(n_layers - 1)), FINAL_PRE_NORM, FINAL_POST_NORM)


def site_depth(site: str, n_layers: int) -> int:
    """Blocks that a site lies behind, less one: l for ``layer_l``, L-1 for ``final_pre_norm``, L for ``final_post_norm``.

    It is the site's index in ``output_hidden_states``, less one, and the x axis of a curve over layers.

    Raises:
        UserError: no such site in a model of ``n_layers`` blocks.

    >>> [site_depth(site, 3) for site in all_sites(3)]
    [0, 1, 2, 3]
    """
    named = {FINAL_PRE_NORM: n_layers - 1, FINAL_POST_NORM: n_layers}
    if site in named:
        return named[site]
    found = _LAYER_SITE.fullmatch(site)
    if found is None or layer_site(int(found[1])) != site:
        raise UserError(
            f"sites: expected {FINAL_PRE_NORM}, {FINAL_POST_NORM} or a layer such as layer_07, got {site!r}"
        )
    if int(found[1]) >= n_layers:
        raise UserError(
            f"sites: {site}: this model has {n_layers} blocks, the last one is {layer_site(n_layers - 1)} (counted from 0)"
        )
    return int(found[1])


def site_names(sites: str | int | Sequence[str | int]) -> tuple[str, ...]:
    """One name or several, as a tuple.

    Raises:
        UserError: a number, which could be counted from 0 or from 1.
    """
    names = (sites,) if isinstance(sites, str | int) else tuple(sites)
    if numbers := [name for name in names if isinstance(name, int)]:
        raise UserError(
            f"sites: expected {FINAL_PRE_NORM}, {FINAL_POST_NORM} or a layer such as layer_07, got {numbers[0]}; block "
            f"{numbers[0]}, counted from 0, is {layer_site(numbers[0])}"
        )
    return tuple(map(str, names))


def resolve_sites(sites: str | int | Sequence[str | int], n_layers: int) -> tuple[str, ...]:
    """Sites as a user writes them, ``"all"``, one name or several, checked against a model's depth.

    Raises:
        UserError: an unknown site, one twice, none, or a number.

    >>> resolve_sites("final_post_norm", 4), resolve_sites(["layer_00", "layer_02"], 4)
    (('final_post_norm',), ('layer_00', 'layer_02'))
    """
    if sites == "all":
        return all_sites(n_layers)
    names = site_names(sites)
    for name in names:
        site_depth(name, n_layers)
    if not names or len(set(names)) < len(names):
        raise UserError(f"sites: expected 'all' or at least one site, each once, got {list(names)}")
    return names


def sliding_window(model: PreTrainedModel) -> int | None:
    """Number of tokens that a token of the narrowest layers sees (Mistral, Gemma 2, Llama 4, GPT-Neo); None: all before it."""
    kinds = getattr(model.config, "layer_types", None)
    if kinds and {"full_attention"}.issuperset(kinds):
        return None
    windows = [size for name in _WINDOWS if (size := getattr(model.config, name, None))]
    return min(windows, default=None)


def embedding_parameters(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Token and position embeddings and the unembedding: what the paper freezes (arXiv 2512.11838).

    Position embeddings are the backbone's own ``nn.Embedding`` modules (GPT-2 ``wpe``); rotary models have none.
    """
    seen: set[int] = set()
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    modules += [child for child in backbone(model).children() if isinstance(child, nn.Embedding)]
    for module in modules:
        for parameter in [] if module is None else module.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
