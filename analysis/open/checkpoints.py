"""Two checkpoints to be asked the same: those of a run, or any pair; and the held-out pairs to ask them about."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from analysis.open.adapters import check_adapter, find_adapter, merge_adapter
from analysis.open.models import LoadedModel, load_config, load_model, load_tokenizer
from analysis.open.pair_log_probs import SideLogProbs, tokens_of_pairs
from analysis.open.probe_pairs import PROMPTS_FILE, ProbePair, check_ids, read_probe_pairs
from analysis.open.runs import SAE_FILE, STEERING_FILE, VECTOR_FILE, Run
from datamodules.prompts import PromptFile
from datamodules.records import LoadReport, PreferencePair, PreferenceSource, load_pairs
from datamodules.splits import with_clean_label
from datamodules.synthetic import SyntheticWorld
from datamodules.tokenization import PairTokenizer, SegmentEncoder, TokenizationReport
from tiltmeter.errors import UserError
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.models.generation import named_end_ids
from tiltmeter.models.trained_vector import VectorOptions, insert_vector
from tiltmeter.pairs.chat import TextChoice, settle_text_format
from tiltmeter.pairs.preference_losses import PreferenceLoss, make_preference_loss
from tiltmeter.scoring import scorer as scoring
from tiltmeter.scoring.behaviour import Prompt
from tiltmeter.scoring.scorer import LabelledPair, Scorer
from tiltmeter.sparse.steering import insert_steering
from tiltmeter.sparse.steering_file import load_steering
from tiltmeter.steering.vector import load_vectors

Device = str | None
USUAL_LOSS = make_preference_loss("sigmoid")
"""Loss where it is not known with which one a model was trained; its β only scales margins."""
_SHAPE = (
    "model_type", "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads",
    "intermediate_size",
)  # fmt: skip
"""Settings that two checkpoints of one model have in common, as transformers names it, whatever names a family uses."""
_NOT_COMPUTED = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "tie_word_embeddings")
"""Settings that say nothing about what a model computes; nor do names and special tokens."""
_LOSS_KEYS = ("loss", "sft_weight", "beta", "label_smoothing", "gamma_beta_ratio")
"""Options of a module that are its loss's."""
_LEAST_LENGTH = 8
"""Least length that :class:`~datamodules.tokenization.PairTokenizer` takes."""


@dataclass(frozen=True)
class Checkpoints:
    """A base and an aligned model with one tokenizer, and pairs that are asked about.

    Args:
        base, aligned: opened, in evaluation mode.
        pairs: held out, in a fixed order.
        world: the synthetic world that the pairs are from, if they are.
        loss: that aligned was trained with, as far as it is known.
        knows_beta: whether its β is; else it is the usual one.
        sources: folder or hub id of base and aligned, from which they were opened; None: not known.
    """

    base: LoadedModel
    aligned: LoadedModel
    pairs: Sequence[ProbePair]
    world: SyntheticWorld | None = None
    loss: PreferenceLoss = USUAL_LOSS
    knows_beta: bool = False
    sources: tuple[str, str] | None = None

    @property
    def beta(self) -> float:
        """β of the loss."""
        return self.loss.beta

    @cached_property
    def token_log_probs(self) -> tuple[list[SideLogProbs], list[SideLogProbs]]:
        """log π₀ and log π of every token of the pairs' responses, read once for all who ask."""
        ids = [pair.ids for pair in self.pairs]
        return tokens_of_pairs(self.base, ids), tokens_of_pairs(self.aligned, ids)


def start_scorers(scorers: Iterable[Scorer], checkpoints: Checkpoints) -> None:
    """Load or reach what scorers need; judges are held against the pairs' own labels. Raises UserError."""
    pairs = [LabelledPair(p.pair_id, p.prompt, p.chosen, p.rejected, p.group, p.attributes) for p in checkpoints.pairs]
    scoring.start_scorers(scorers, world=checkpoints.world, pairs=pairs)


def checkpoints_of_run(
    run: Run, *, dtype: str = "float32", device: Device = None, attn_implementation: str | None = None
) -> Checkpoints:
    """The base and the aligned model of a finished run, and its probe's pairs; on the attention kernel it was trained with.

    Raises:
        UserError: no pairs, a model that can't be opened, or pairs of another tokenizer.
    """
    pairs = read_probe_pairs(run.folder / PROMPTS_FILE)
    if not pairs:
        raise UserError(
            f"{run.folder / PROMPTS_FILE}: no such file, so it isn't known what to ask; train the run again"
        )
    base, revision = run.base_source
    kernel = attn_implementation or run.setting("model.attn_implementation")
    opened = _open(base, str(run.aligned), dtype, device, None if kernel is None else str(kernel), revision)
    check_ids(pairs, opened[0].model, run.folder / PROMPTS_FILE)
    knows_beta = "train/rewards/margins" in run.metrics  # SFT has none
    sources = base, str(run.aligned)
    return Checkpoints(*opened, pairs, _world_of(run), loss_of(run) or USUAL_LOSS, knows_beta, sources)


class HeldOutPairs:
    """Pairs to ask any two checkpoints about, one a prompt, drawn by a seed from any source; or every pair of it.

    Whether the aligned model was trained on these prompts is not known here.

    Args:
        n_pairs: so many at most; null: every pair of the source in its order, also several of one prompt.
        max_length, text_format, chat_date: see :class:`~datamodules.preference.PreferenceDataModule`; never longer than the model
            has positions.
        seed: of the draw.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        n_pairs: int | None = 256,
        max_length: int = 1024,
        text_format: TextChoice = "auto",
        seed: int = 0,
        chat_date: str | None = None,
    ) -> None:
        if (n_pairs is not None and n_pairs < 1) or seed < 0 or max_length < _LEAST_LENGTH:
            raise UserError(
                f"pairs: expected n_pairs of at least 1 or null, a seed from 0 and max_length from {_LEAST_LENGTH}, got "
                f"{n_pairs}, {seed} and {max_length}"
            )
        self.n_pairs, self.max_length, self.text_format, self.seed = n_pairs, max_length, text_format, seed
        self.chat_date = chat_date

    def draw(self, source: PreferenceSource) -> tuple[list[PreferencePair], list[LoadReport]]:
        """Pairs with their clean labels, held out where the source says which are; with what was read.

        Raises:
            UserError: no pairs.
        """
        records, reports = load_pairs(source)
        records = [record for record in records if record.held_out] or records
        if not records:
            raise UserError("data: no preference pair is left after filtering")
        taken = records if self.n_pairs is None else _one_a_prompt(records, self.n_pairs, self.seed)
        return [with_clean_label(record) for record in taken], reports

    def ask(
        self,
        base: str,
        aligned: str,
        source: PreferenceSource,
        *,
        dtype: str = "float32",
        device: Device = None,
        attn_implementation: str | None = None,
    ) -> tuple[Checkpoints, list[LoadReport], TokenizationReport]:
        """Open two checkpoints, folders or hub ids, and draw the pairs; with what was read, and what encoding cut or dropped.

        Raises:
            UserError: a model that can't be opened, two tokenizers, or no pairs.
        """
        drawn, reports = self.draw(source)
        opened = _open(base, aligned, dtype, device, attn_implementation)
        pairs, cuts = self._encoded(opened, drawn)
        world = source if isinstance(source, SyntheticWorld) else None
        return Checkpoints(*opened, pairs, world, sources=(base, aligned)), reports, cuts

    def of_models(self, models: Checkpoints, source: PreferenceSource) -> Checkpoints:
        """The same two models with pairs of another source.

        Raises:
            UserError: no pairs.
        """
        pairs, _ = self._encoded((models.base, models.aligned), self.draw(source)[0])
        return replace(models, pairs=pairs, world=source if isinstance(source, SyntheticWorld) else None)

    def _encoded(
        self, opened: tuple[LoadedModel, LoadedModel], drawn: Sequence[PreferencePair]
    ) -> tuple[list[ProbePair], TokenizationReport]:
        """Pairs with their token ids, and what encoding cut or dropped."""
        limit = getattr(opened[0].model.config, "max_position_embeddings", None) or self.max_length
        model, tokenizer = opened[0].model, opened[0].tokenizer
        written_as = settle_text_format(self.text_format, tokenizer, named_end_ids(model.generation_config))
        encode = PairTokenizer(
            tokenizer,
            min(self.max_length, limit),
            text_format=written_as[0],
            chat_date=self.chat_date,
        )
        kept, ids, cuts = encode(drawn)
        cuts.written_as = "{}: {}".format(*written_as)
        _check_same_ids(opened, kept)
        return [ProbePair.of(record, tokens) for record, tokens in zip(kept, ids, strict=True)], cuts


def check_same_base(key: str, run: Run, own: Checkpoints, other: Checkpoints) -> None:
    """Refuse a run of another base than the models that it is to be compared with.

    Args:
        key: option that gave the run, for the message.

    Raises:
        UserError: their bases' weights differ.
    """
    one, two = (of.base.model.state_dict() for of in (own, other))
    if one.keys() != two.keys() or any(not torch.equal(one[name], two[name]) for name in one):
        raise UserError(f"{key}: {run.folder}: its base is another model; give runs of one base")


def prompts_of_file(path: str, n_prompts: int | None, opened: LoadedModel) -> list[Prompt]:
    """Prompts without preferences, such as those of RealToxicityPrompts, encoded behind one BOS. Raises UserError."""
    encoder, bos = SegmentEncoder(opened.tokenizer), opened.tokenizer.bos_token_id
    start = [] if bos is None else [bos]
    prompts = PromptFile(path, n_prompts, key="behaviour.prompts").load()
    return [Prompt(p.pair_id, p.text, [*start, *encoder.encode(p.text)], "", p.pair_id, p.attributes) for p in prompts]


def _one_a_prompt(records: Sequence[PreferencePair], n: int, seed: int) -> list[PreferencePair]:
    first: dict[str, PreferencePair] = {}
    for record in records:
        first.setdefault(record.group, record)
    names = sorted(first)
    return [first[names[i]] for i in np.random.default_rng(seed).permutation(len(names))[:n]]


def _open(
    base: str, aligned: str, dtype: str, device: Device, kernel: str | None, base_revision: str | None = None
) -> tuple[LoadedModel, LoadedModel]:
    """Both models, after what can be said without their weights."""
    options: dict[str, Any] = {
        "dtype": DTYPES[dtype],
        "device": device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "attn_implementation": kernel,
    }
    if find_adapter(base) is not None:
        raise UserError(f"base={base}: an adapter, expected a whole model; give the base it was trained on")
    if (Path(aligned) / SAE_FILE).is_file():
        raise UserError(
            f"aligned={aligned}: a sparse autoencoder, no model; open it by tiltmeter.sparse.files.load_sae"
        )
    adapter = find_adapter(aligned)
    insert = _state_adapter(Path(aligned))
    if insert is not None:
        opened = [load_model(base, revision=base_revision, **options) for _ in range(2)]
        insert(opened[1].model)
    elif adapter is None:
        _check_shapes((base, base_revision), (aligned, None))
        opened = [load_model(name, revision=r, **options) for name, r in ((base, base_revision), (aligned, None))]
    else:
        config = check_adapter(adapter, base=base)
        opened = [load_model(base, revision=base_revision, **options) for _ in range(2)]
        merged = merge_adapter(opened[1].model, config, adapter)
        has_tokenizer = (adapter / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(adapter, is_model=False) if has_tokenizer else opened[1].tokenizer
        opened[1] = LoadedModel(merged, tokenizer)
    if opened[0].tokenizer.get_vocab() != opened[1].tokenizer.get_vocab():
        raise UserError(f"base={base} aligned={aligned}: their tokenizers differ; give two checkpoints of one model")
    return opened[0], opened[1]


def _state_adapter(folder: Path) -> Callable[[PreTrainedModel], object] | None:
    """Function that puts the vector or the steering of a folder into its base; None: the folder holds neither."""
    if (folder / VECTOR_FILE).is_file():
        (vector,) = load_vectors(folder / VECTOR_FILE).values()
        return lambda model: insert_vector(model, VectorOptions(vector.site, scale=1.0), vector.values)
    if (folder / STEERING_FILE).is_file():
        stored = load_steering(folder / STEERING_FILE)
        return lambda model: stored.fill(insert_steering(model, stored.sae, stored.options))
    return None


def _check_shapes(base: tuple[str, str | None], aligned: tuple[str, str | None]) -> None:
    """Refuse two models that are not of one shape, by their configurations alone. Raises UserError."""
    configs = [load_config(name, revision=revision) for name, revision in (base, aligned)]
    for what in _SHAPE:
        one, other = (getattr(config.get_text_config(), what, None) for config in configs)
        if one != other:
            raise UserError(
                f"base={base[0]} aligned={aligned[0]}: {what} is {one} and {other}; give two checkpoints of one model"
            )


def _check_same_ids(opened: Sequence[LoadedModel], records: Iterable[PreferencePair]) -> None:
    """Refuse tokenizers of one vocabulary that cut texts differently. Raises UserError."""
    one, other = (SegmentEncoder(model.tokenizer) for model in opened)
    for record in records:
        for text in (record.prompt_text, record.chosen_text, record.rejected_text):
            if one.encode(text) != other.encode(text):
                raise UserError(
                    f"aligned: its tokenizer cuts {text[:40]!r} into other tokens than the base’s; give two of one model"
                )


def settings_that_differ(checkpoints: Checkpoints) -> list[str]:
    """Settings of one computation that two configurations differ in: ``rope_theta 10000.0 and 500000.0``, a text a setting."""
    one, other = (opened.model.config.get_text_config().to_dict() for opened in (checkpoints.base, checkpoints.aligned))
    return [
        f"{name} {one.get(name)} and {other.get(name)}"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
        and not name.startswith("_")
        and not name.endswith("token_id")
        and name not in _NOT_COMPUTED
    ]


def loss_of(run: Run) -> PreferenceLoss | None:
    """The loss of a run with its options; None where its configuration names none that exists, as SFT's."""
    module = run.node("module")
    try:
        return make_preference_loss(**{"loss": "sigmoid", **{key: module[key] for key in _LOSS_KEYS if key in module}})
    except UserError:
        return None


def _world_of(run: Run) -> SyntheticWorld | None:
    """The synthetic world of a run, from the plain numbers of its configuration; None for any other data."""
    if run.setting("data._target_") != f"{SyntheticWorld.__module__}.{SyntheticWorld.__name__}":
        return None
    options = {name: value for name, value in run.node("data").items() if name != "_target_"}
    try:
        return SyntheticWorld(**options)
    except (TypeError, UserError) as error:
        raise UserError(f"{run.folder / 'config.yaml'}: data: {error}; restore the run's own file") from error
