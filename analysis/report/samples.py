"""Continuations of the same held-out prompts by base and aligned model, greedy, side by side."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from analysis.open.checkpoints import Checkpoints
from analysis.open.models import LoadedModel, load_model
from analysis.open.probe_pairs import PROMPTS_FILE, ProbePair, check_ids, read_probe_pairs
from analysis.open.runs import Run
from tiltmeter.models.generation import Completion, Decoding, as_words, generate
from tiltmeter.scoring.scorer import Sample as ScoredSample

N_PROMPTS = 4
_DECODING = Decoding(max_new_tokens=48)
_WEIGHT_BYTES = 4 * 2**30
"""Larger models are not sampled here: this runs on the CPU in float32."""
_SHARED_WORDS = 3


class Span(NamedTuple):
    """A stretch of words, and whether the other model said something else there."""

    text: str
    differs: bool


@dataclass(frozen=True)
class Continuation:
    """A model's continuation, and whether it was cut at the token limit."""

    spans: tuple[Span, ...]
    is_cut: bool

    @property
    def is_blank(self) -> bool:
        """Nothing that could be read."""
        return not any(span.text.strip() for span in self.spans)


@dataclass(frozen=True)
class Sample:
    """One prompt and both continuations."""

    prompt: ProbePair
    base: Continuation
    aligned: Continuation


@dataclass(frozen=True)
class Samples:
    """Samples and how they came about, or one sentence on why there are none."""

    rows: Sequence[Sample]
    note: str = ""
    how: str = ""


def compare_samples(run: Run) -> Samples:
    """Greedy continuations of a run's first probe prompts by base/ and aligned/.

    Raises:
        UserError: a file is damaged or a model can't be loaded.
    """
    pairs = read_probe_pairs(run.folder / PROMPTS_FILE, n_pairs=N_PROMPTS)
    if not pairs:
        return Samples([], f"The run folder has no {PROMPTS_FILE}, so it isn't known which held-out prompts to ask.")
    if note := _why_not(run):
        return Samples([], note)
    said = []
    for folder in (run.base, run.aligned):
        opened = load_model(folder)
        check_ids(pairs, opened.model, run.folder / PROMPTS_FILE)
        said.append(_complete(opened, pairs))
    return _side_by_side(pairs, *said)


def samples_of_models(checkpoints: Checkpoints) -> Samples:
    """Samples of two models that are open already."""
    pairs = checkpoints.pairs[:N_PROMPTS]
    return _side_by_side(pairs, *(_complete(opened, pairs) for opened in (checkpoints.base, checkpoints.aligned)))


def samples_of(pairs: Sequence[ProbePair], scored: Sequence[ScoredSample], decoding: Decoding) -> Samples:
    """The first completions, one a prompt, of those that were scored.

    Args:
        pairs: that may have been asked about.
        decoding: how the completions were drawn.
    """
    by_id = {pair.pair_id: pair for pair in pairs}
    shown = [s for s in scored if not s.index and s.pair_id in by_id][:N_PROMPTS]
    note = "" if shown else "The prompts are not those of the pairs; tables/behaviour_samples.csv has what was said."
    how = f"The first {len(shown)} of the prompts above, not selected, as scored: {as_words(decoding)}."
    return Samples([Sample(by_id[s.pair_id], *_apart(s.base, s.policy)) for s in shown], note, how)


def _complete(opened: LoadedModel, pairs: Sequence[ProbePair]) -> list[Completion]:
    ids = [pair.ids.prompt_ids for pair in pairs]
    return [said[0] for said in generate(opened.model, opened.tokenizer, ids, _DECODING)]


def _side_by_side(pairs: Sequence[ProbePair], base: Sequence[Completion], aligned: Sequence[Completion]) -> Samples:
    rows = [Sample(pair, *_apart(b, a)) for pair, b, a in zip(pairs, base, aligned, strict=True)]
    return Samples(rows, how=f"The first {len(rows)} held-out prompts, not selected: {as_words(_DECODING)}.")


def _why_not(run: Run) -> str:
    """One sentence when the models can't be sampled here."""
    if not (run.base / "config.json").is_file():
        name = run.setting("model.name_or_path") or "a model on the Hugging Face hub"
        return f"base/ only points to {name}; samples are drawn offline, from models inside the run folder."
    size = sum(file.stat().st_size for file in run.aligned.glob("*.safetensors"))
    if size > _WEIGHT_BYTES:
        return f"The aligned model has {size / 2**30:.0f} GiB of weights, too many to sample on a CPU for a report."
    return ""


def _apart(base: Completion, aligned: Completion) -> tuple[Continuation, Continuation]:
    """Mark the words in which two texts differ; fewer than three shared words in a row don't count as shared.

    >>> said = _apart(Completion(" I like tea in the morning", 6, False), Completion(" I like rain in the morning", 6, False))
    >>> [[s.text for s in side.spans if s.differs] for side in said]
    [[' tea'], [' rain']]
    """
    words = [re.findall(r"\s*\S+|\s+$", said.text) for said in (base, aligned)]
    whole = (len(words[0]), len(words[1]), 0)
    blocks = difflib.SequenceMatcher(None, words[0], words[1], autojunk=False).get_matching_blocks()
    shared = [b for b in blocks if b.size >= _SHARED_WORDS or (b.size and 0 in (b.a, b.b) and b.a == b.b)]
    return tuple(  # type: ignore[return-value]
        Continuation(_spans(words[k], [(b[k], b[k] + b[2]) for b in [*shared, whole]]), said.is_cut)
        for k, said in enumerate((base, aligned))
    )


def _spans(words: list[str], shared: list[tuple[int, int]]) -> tuple[Span, ...]:
    spans, done = [], 0
    for start, end in shared:
        spans += [Span("".join(words[done:start]), True), Span("".join(words[start:end]), False)]
        done = end
    return tuple(span for span in spans if span.text)
