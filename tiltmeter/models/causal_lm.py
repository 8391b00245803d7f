"""Causal language models and tokenizers by hub id, by folder or from scratch: safetensors only, no code from elsewhere."""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from torch.nn import Embedding
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tiltmeter.errors import UserError, argument
from tiltmeter.models.generation import named_end_ids
from tiltmeter.models.model_files import Part, find_fault, reason_of
from tiltmeter.models.quantization import QUANTIZATIONS, check_blocks, nf4
from tiltmeter.models.sharded_weights import WEIGHT_FILES, EmptyModel, make_empty

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
KERNELS = ("sdpa", "eager")
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class CausalLM:
    """Choice of a model; building it is a separate step, so that this can be checked and passed around for free.

    Args:
        name_or_path: hub id or folder with safetensors weights, or a GGUF file that a command converts first
            (:mod:`tiltmeter.models.gguf_file`); None for ``init=random``.
        revision: commit or tag on the hub, of a GGUF file its sha256; pin it for runs that are to be remade.
        init: ``pretrained`` loads weights, ``random`` makes a model from ``architecture``.
        architecture: for ``init=random``: ``model_type`` and the fields of that family's configuration.
        adapter_path: folder or hub id of a LoRA adapter that is merged into the weights before anything else is done with them;
            :meth:`build` and its like are of the merged model, whose choice has none any more.
        quantization: ``nf4``: the linear maps' weights in 4 bits (:mod:`tiltmeter.models.quantization`), for LoRA on few
            gigabytes; None: as the files hold them.
        tokenizer: hub id or folder; None: the model's own. For ``init=random`` None means: train a BPE on the data.
        vocab_size: size of a trained BPE.
        dtype: of the weights. float32 weights with ``trainer.precision=bf16-mixed`` is the usual choice.
        attn_implementation: ``sdpa`` or ``eager``; None: :func:`choose_attention`.
    """

    name_or_path: str | None = None
    revision: str | None = None
    init: str = "pretrained"
    architecture: Mapping[str, Any] | None = None
    adapter_path: str | None = None
    quantization: str | None = None
    tokenizer: str | None = None
    vocab_size: int = 4096
    dtype: str = "float32"
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        """Check that the options fit together."""
        init, is_random = self._argument("init"), self.init == "random"
        lacks_family = "model_type" not in (self.architecture or {})
        for is_wrong, name, said in (
            (self.init not in ("pretrained", "random"), "init", f"expected pretrained or random, got {self.init}"),
            (
                not is_random and not self.name_or_path,
                "name_or_path",
                f"expected a hub id or a folder, got none (or set {init}=random)",
            ),
            (
                not is_random and self.architecture,
                "architecture",
                f"only for {init}=random; a pretrained model brings its own",
            ),
            (is_random and self.name_or_path, "name_or_path", f"not with {init}=random; choose one of the two"),
            (
                is_random and self.adapter_path,
                "adapter_path",
                f"not with {init}=random; give the base that it was trained on",
            ),
            (
                is_random and lacks_family,
                "architecture",
                f"{init}=random needs model_type (for example llama) and its sizes",
            ),
            (
                self.quantization not in (None, *QUANTIZATIONS),
                "quantization",
                f"expected {' or '.join(QUANTIZATIONS)}, or null for none, got {self.quantization}",
            ),
            (is_random and self.quantization, "quantization", f"not with {init}=random; only of a model that there is"),
            (self.dtype not in DTYPES, "dtype", f"expected one of {', '.join(DTYPES)}, got {self.dtype}"),
            (
                self.attn_implementation not in (None, *KERNELS),
                "attn_implementation",
                f"expected sdpa or eager, got {self.attn_implementation}",
            ),
        ):
            if is_wrong:
                raise UserError(f"{self._argument(name)}: {said}")

    def _argument(self, name: str) -> str:
        return argument(f"CausalLM.{name}")

    @property
    def trains_tokenizer(self) -> bool:
        """True when the tokenizer is to be trained on the run's own texts."""
        return self.init == "random" and self.tokenizer is None

    def load_tokenizer(self) -> Tokenizer:
        """The model's tokenizer, with a padding token (EOS where it has none: padding is masked by length).

        Raises:
            UserError: not found, no network, gated.
        """
        if self.trains_tokenizer:
            raise ValueError("this model's tokenizer is trained on the data, not loaded")
        where = self.tokenizer or str(self.name_or_path)
        revision = self.revision if where == self.name_or_path else None
        tokenizer = _load(
            self._argument("name_or_path" if self.tokenizer is None else "tokenizer"),
            where,
            lambda: AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False),
            part="tokenizer",
            is_model=self.tokenizer is None,
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load_config(self, tokenizer: Tokenizer | None = None) -> PretrainedConfig:
        """The model's configuration with all dropout off; ``init=random`` takes vocabulary and special ids from a tokenizer."""
        if self.init == "random":
            fields = dict(self.architecture or {})
            if tokenizer is not None:
                fields |= {"vocab_size": len(tokenizer)}
                fields |= {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}
            config = _from_architecture(lambda: AutoConfig.for_model(fields.pop("model_type"), **fields))
        else:
            where = str(self.name_or_path)
            config = _load(
                self._argument("name_or_path"),
                where,
                lambda: AutoConfig.from_pretrained(where, revision=self.revision, trust_remote_code=False),
                part="config",
            )
        choose_attention(config, self.attn_implementation)  # one that the family lacks is refused before any long work
        return without_dropout(config)

    def load_end_ids(self) -> list[int]:
        """Ids of the tokens at which the model stops when it generates, as its own files name them; none of a random model."""
        if self.init == "random":
            return []
        where = str(self.name_or_path)
        try:
            return named_end_ids(GenerationConfig.from_pretrained(where, revision=self.revision or "main"))
        except (OSError, ValueError):  # it has none: transformers takes config.json's
            return named_end_ids(self.load_config())

    def build(self, tokenizer: Tokenizer) -> PreTrainedModel:
        """The model itself; a random one draws from torch's global generator.

        Raises:
            UserError: weights not found, no network, gated, no safetensors, a tokenizer larger than the vocabulary.
        """
        config = self.load_config(tokenizer)
        dtype = DTYPES[self.dtype]
        if self.init == "random":
            model = _from_architecture(lambda: self._from_config(config))
        else:
            where = str(self.name_or_path)
            quantized = (
                {} if self.quantization is None else {"quantization_config": nf4(dtype), "device_map": _fastest()}
            )
            loaded: Any = _load(
                self._argument("name_or_path"),
                where,
                lambda: AutoModelForCausalLM.from_pretrained(
                    where,
                    revision=self.revision,
                    config=config,
                    dtype=dtype,
                    attn_implementation=choose_attention(config, self.attn_implementation),
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **quantized,
                ),
                part="weights",
            )
            model, found = loaded
            if missing := sorted(found["missing_keys"]):  # the library fills them with random numbers
                raise UserError(
                    f"{self._argument('name_or_path')}: cannot load {where}: {len(missing)} weights are missing, {missing[0]} "
                    "among them; restore it, or take config.json and weights from one model"
                )
            check_blocks(model, f"{self._argument('name_or_path')}: {where}")
        _check_vocabulary(self._argument("tokenizer"), model, tokenizer)
        return model

    def build_empty(self, tokenizer: Tokenizer) -> EmptyModel | None:
        """The model without its weights, for sharding before they are read (each process its share).

        None for models from scratch, quantized ones, and where the files hold weights in another form than the model
        does or with buffers; :meth:`build` makes these.

        Raises:
            UserError: as :meth:`build`.
        """
        if self.init == "random":
            return None
        config, where = self.load_config(), str(self.name_or_path)
        if self.quantization is not None or getattr(config, "quantization_config", None) is not None:
            return None

        def make() -> EmptyModel | None:
            is_local = Path(where).is_dir()
            folder = (
                where if is_local else snapshot_download(where, revision=self.revision, allow_patterns=[*WEIGHT_FILES])
            )
            return make_empty(Path(folder), lambda: self._from_config(config))

        empty = _load(self._argument("name_or_path"), where, make, part="weights")
        if empty is not None:
            _check_vocabulary(self._argument("tokenizer"), empty.model, tokenizer)
        return empty

    def build_on_meta(self, tokenizer: Tokenizer) -> PreTrainedModel:
        """The model without weights, on the meta device: what its modules are costs nothing to know."""
        with torch.device("meta"):
            return self._from_config(self.load_config(tokenizer))

    def _from_config(self, config: PretrainedConfig) -> PreTrainedModel:
        kernel = choose_attention(config, self.attn_implementation)
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=kernel, dtype=DTYPES[self.dtype], trust_remote_code=False
        )


class ReferenceModel(CausalLM):
    """Choice of another model than the one that training starts from, by which a policy's rewards are measured.

    Args:
        name_or_path, revision, dtype, attn_implementation: see :class:`CausalLM`; its tokenizer is only compared.
    """

    def _argument(self, name: str) -> str:
        return argument(f"ReferenceModel.{name}")

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse one whose token ids mean something else.

        Args:
            tokenizer: the policy's.

        Raises:
            UserError: another vocabulary, or no tokenizer was found.
        """
        own, theirs = self.load_tokenizer().get_vocab(), tokenizer.get_vocab()
        if own != theirs:
            n_other = len(own.items() ^ theirs.items())
            raise UserError(
                f"{self._argument('name_or_path')}: {self.name_or_path} has another vocabulary than the model that is trained "
                f"({len(own)} tokens, there {len(theirs)}; {n_other} entries differ); a reference has to read the same token ids"
            )


def _check_vocabulary(key: str, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    size = cast(Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > size:
        raise UserError(
            f"{key}: has {len(tokenizer)} tokens, but the model's vocabulary {size}; they don't belong together"
        )


def _fastest() -> str:
    """The device on which weights are quantized."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_attention(config: PretrainedConfig, asked: str | None = None) -> str:
    """The attention kernel of a model: the one asked for, else ``sdpa`` where its family has it and ``eager`` elsewhere.

    Raises:
        UserError: ``sdpa`` is asked of a family that has none (Gemma 2, Bloom, GPT-J …).
    """
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    has_sdpa = all(kind._supports_sdpa for kind in (found if isinstance(found, tuple) else (found,)))
    if asked == "sdpa" and not has_sdpa:
        raise UserError(
            f"{argument('CausalLM.attn_implementation')}=sdpa: {config.model_type} has no such kernel; leave it out or set it "
            "to eager"
        )
    return asked or ("sdpa" if has_sdpa else "eager")


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Set every dropout rate of a configuration to 0: policy and reference must be the same function."""
    for name in config.to_dict():
        value = getattr(config, name, None)
        if isinstance(value, PretrainedConfig):
            without_dropout(value)
        elif isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
    return config


def _load(key: str, where: str, load: Callable[[], T], *, part: Part, is_model: bool = True) -> T:
    """Call a from_pretrained and turn what goes wrong into one line."""
    instead = f" or set {argument('CausalLM.tokenizer')}" if is_model else ""
    looks_local = where.startswith((".", "/", "~")) or Path(where).exists()
    if looks_local and not Path(where).is_dir():
        raise UserError(
            f"{key}: no such folder: {where} (expected a hub id or a folder with config.json and safetensors)"
        )
    if looks_local and (fault := find_fault(where, part, is_model=is_model, instead=instead)):
        raise UserError(f"{key}: cannot load {where}: {fault}")
    try:
        return load()
    except Exception as error:  # whatever a damaged or foreign file makes the loaders raise
        fault, reason = find_fault(where, part, is_model=is_model, instead=instead), reason_of(error, where)
        if looks_local or fault:
            raise UserError(f"{key}: cannot load {where}: {fault or f'{reason}; restore it'}") from error
        raise UserError(
            f"{key}: cannot load {where} from the Hugging Face hub ({reason}); check the name, the network and, for a gated "
            "model, your licence and login (`hf auth login`), or give a local folder"
        ) from error


def _from_architecture(make: Callable[[], T]) -> T:
    """Make a configuration or a random model and turn what goes wrong into one line."""
    try:
        return make()
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(
            f"{argument('CausalLM.architecture')}: {textwrap.shorten(str(error), 200, placeholder=' …')}"
        ) from error
