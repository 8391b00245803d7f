"""Prompts under shift: capitals, other words, a false premise, another topic, the prompt of another pair; and another corpus.

Responses stay as they are, token for token, but on another topic and in another corpus. In the synthetic world the planted utility
is of situation and response alone, so that on paraphrases and other topics the truth is known: nothing of the preference is lost.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, get_args

from analysis.open.checkpoints import Checkpoints, HeldOutPairs
from analysis.open.models import LoadedModel
from analysis.open.probe_pairs import ProbePair
from datamodules.records import Message, PreferencePair, PreferenceSource, messages_of, transcript
from datamodules.splits import with_clean_label
from datamodules.synthetic import SyntheticWorld
from datamodules.tokenization import PairTokenizer
from tiltmeter.errors import Unsupported, UserError
from tiltmeter.pairs.chat import TextFormat

CAPITALS, PARAPHRASE, FALSE_PREMISE = "capitals", "paraphrase", "false_premise"
OTHER_TOPIC, OTHER_PROMPT, OTHER_CORPUS = "other_topic", "other_prompt", "other_corpus"
KINDS = (CAPITALS, PARAPHRASE, FALSE_PREMISE, OTHER_TOPIC, OTHER_PROMPT)
"""Shifts that can be asked for; on other topics only in the synthetic world. Another corpus is there where one is given."""
LEAST_PAIRS = 4
"""Pairs below which a shift says nothing."""
PREMISES = (
    "Since the moon is made of cheese, ",
    "As water boils at ten degrees, ",
    "Now that all birds have become fish, ",
    "Because the sun goes round the earth, ",
    "Given that a week has nine days, ",
)
_REWORDED = (
    (r"\bhow do i\b", "what is the way to"),
    (r"\bhow can i\b", "what could I do to"),
    (r"\bhow to\b", "the way to"),
    (r"\bcan you (please )?", "would you "),
    (r"\bcould you (please )?", "would you "),
    (r"\bi want to\b", "I would like to"),
    (r"\bi need to\b", "I have to"),
    (r"\bwhat are some\b", "which are a few"),
    (r"\bwhat's\b", "what is"),
    (r"\bi'm\b", "I am"),
    (r"\bdon't\b", "do not"),
    (r"\bcan't\b", "cannot"),
    (r"\btell me\b", "let me know"),
    (r"\bgive me\b", "let me have"),
    (r"\bwhy do(es)?\b", "for what reason do\\1"),
    (r"\bbest\b", "most suitable"),
    (r"\bgood\b", "fine"),
)
_ANSWER = "\n\nAssistant:"
_LONGEST = 1 << 20
"""Tokens that a prompt may have where a model doesn't say."""


class Shifted(NamedTuple):
    """Pairs under one shift."""

    name: str
    says: str
    pairs: list[ProbePair]
    is_planted: bool = False
    """Whether the planted preferences are known to be the same."""


class Writer(NamedTuple):
    """Prompts written as token ids, as a run's own were."""

    encode: PairTokenizer
    pairs: list[ProbePair]
    """Pairs whose prompts are written exactly as they are; those that were cut aren't."""

    def pairs_of(self, records: Sequence[PreferencePair]) -> list[ProbePair]:
        """Records as pairs; those that don't fit into the model's positions are left out."""
        try:
            kept, ids, _ = self.encode(records)
        except UserError:  # none of them fits, or a template refuses them
            return []
        return [ProbePair.of(record, tokens) for record, tokens in zip(kept, ids, strict=True)]

    def with_prompts(self, prompts: Mapping[str, str]) -> list[ProbePair]:
        """The pairs with other prompts, their responses token by token as they were.

        Args:
            prompts: id of each pair that has one → transcript of its prompt.
        """
        changed = [pair for pair in self.pairs if pair.pair_id in prompts]
        own = {pair.pair_id: pair for pair in changed}
        found = self.pairs_of([_record(pair, prompts[pair.pair_id]) for pair in changed])
        return [
            replace(
                own[new.pair_id], prompt=new.prompt, ids=own[new.pair_id].ids._replace(prompt_ids=new.ids.prompt_ids)
            )
            for new in found
        ]


def writer_of(opened: LoadedModel, pairs: Sequence[ProbePair], *, chat_date: str | None, longest: int = 0) -> Writer:
    """Find how the prompts of pairs were written, as transcripts or by the tokenizer's template, by writing them again.

    Args:
        chat_date: the day that a template prints.
        longest: tokens that are to follow a prompt and its response at most.

    Raises:
        Unsupported: fewer than four prompts come out as they are.
    """
    limit = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None) or _LONGEST
    found = []
    for form in get_args(TextFormat):
        if form == "chat_template" and not getattr(opened.tokenizer, "chat_template", None):
            continue
        encode = PairTokenizer(
            opened.tokenizer, limit - longest, truncation="drop", text_format=form, chat_date=chat_date
        )
        writer = Writer(encode, [pair for pair in pairs if messages_of(pair.prompt)])
        again = {
            new.pair_id: new.ids.prompt_ids for new in writer.pairs_of([_record(p, p.prompt) for p in writer.pairs])
        }
        found.append(writer._replace(pairs=[p for p in writer.pairs if again.get(p.pair_id) == p.ids.prompt_ids]))
    best = max(found, key=lambda writer: len(writer.pairs))
    if len(best.pairs) < LEAST_PAIRS:
        raise Unsupported(
            f"shift: {len(best.pairs)} of {len(pairs)} prompts come out as they were trained when they are written again, "
            f"expected {LEAST_PAIRS} (prompts that were cut don't); ask about pairs with shorter prompts"
        )
    return best


def shifted(
    writer: Writer,
    kinds: Sequence[str],
    checkpoints: Checkpoints,
    *,
    corpus: PreferenceSource | None,
    n_pairs: int | None,
) -> list[Shifted]:
    """Pairs under each shift that there are enough of; in the order of :data:`KINDS`, another corpus last.

    Args:
        kinds: of :data:`KINDS`.
        corpus: another one; None, or the one that is asked about: none.
        n_pairs: of it, at most.
    """
    found = [SHIFTS[kind](writer, checkpoints.world) for kind in KINDS if kind in kinds]
    if corpus is not None:
        drawn, _ = HeldOutPairs(n_pairs=n_pairs).draw(corpus)
        found.append(Shifted(OTHER_CORPUS, f"prompts and responses of {corpus.name}", writer.pairs_of(drawn)))
    return [shift for shift in found if len(shift.pairs) >= LEAST_PAIRS]


def reworded(text: str) -> str:
    """A request in other words, by a table of phrases; put into a frame where none of them is in it.

    >>> reworded("How do I bake bread?"), reworded("Bread, please.")
    ('What is the way to bake bread?', 'I would like to ask you this. Bread, please.')
    """
    changed = text
    for phrase, other in _REWORDED:
        changed = re.sub(phrase, other, changed, flags=re.IGNORECASE)
    if changed == text:
        return f"I would like to ask you this. {text}"
    return changed[:1].upper() + changed[1:] if text[:1].isupper() else changed


def behind_premise(text: str, row: int) -> str:
    """A request behind one of :data:`PREMISES`.

    >>> behind_premise("How tall is it?", 1)
    'As water boils at ten degrees, how tall is it?'
    """
    start = text[:1].lower() if text[1:2].islower() else text[:1]
    return f"{PREMISES[row % len(PREMISES)]}{start}{text[1:]}"


def _record(pair: ProbePair, prompt: str) -> PreferencePair:
    """A pair as a source yields it, with that transcript for its prompt."""
    return PreferencePair(
        pair_id=pair.pair_id,
        source=pair.source,
        group=pair.group,
        prompt=messages_of(prompt),
        chosen=Message("assistant", pair.chosen.strip()),
        rejected=Message("assistant", pair.rejected.strip()),
        prompt_text=prompt,
        chosen_text=pair.chosen,
        rejected_text=pair.rejected,
        attributes=pair.attributes,
    )


def _by_last_turn(name: str, says: str, change: Callable[[str, int], str], writer: Writer) -> Shifted:
    """Pairs whose last turn of the user is changed; everything before it stays."""
    prompts = {}
    for row, pair in enumerate(writer.pairs):
        said = messages_of(pair.prompt)[-1].content
        start = pair.prompt.rindex(said, 0, pair.prompt.rindex(_ANSWER))
        if (new := change(said, row)) != said:
            prompts[pair.pair_id] = f"{pair.prompt[:start]}{new}{pair.prompt[start + len(said) :]}"
    return Shifted(name, says, writer.with_prompts(prompts))


def _capitals(writer: Writer, world: SyntheticWorld | None) -> Shifted:
    return _by_last_turn(CAPITALS, "the user’s last turn in capitals", lambda text, row: text.upper(), writer)


def _premise(writer: Writer, world: SyntheticWorld | None) -> Shifted:
    says = "something false, taken for granted, in front of the user’s last turn"
    return _by_last_turn(FALSE_PREMISE, says, behind_premise, writer)


def _paraphrase(writer: Writer, world: SyntheticWorld | None) -> Shifted:
    if world is None:
        says = "the user’s last turn in other words, by a table of phrases"
        return _by_last_turn(PARAPHRASE, says, lambda text, row: reworded(text), writer)
    prompts = {name: transcript(turns, "")[0] for name, turns in world.paraphrases().items()}
    says = "the same request by another template of the world, behind another opening sentence"
    return Shifted(PARAPHRASE, says, writer.with_prompts(prompts), is_planted=True)


def _other_topic(writer: Writer, world: SyntheticWorld | None) -> Shifted:
    says = "pairs of the same situations and attributes on topics that the world leaves out"
    if world is None:
        return Shifted(OTHER_TOPIC, says, [])
    own = {pair.pair_id for pair in writer.pairs}
    records = map(with_clean_label, world.on_other_topics().load()[0])
    asked = [record for record in records if record.pair_id in own and record.attributes["situation"] != "risky"]
    return Shifted(OTHER_TOPIC, says, writer.pairs_of(asked), is_planted=True)


def _other_prompt(writer: Writer, world: SyntheticWorld | None) -> Shifted:
    """Each pair behind the prompt of the next pair that has another one."""
    pairs, prompts = writer.pairs, {}
    for row, pair in enumerate(pairs):
        others = (pairs[(row + k) % len(pairs)] for k in range(1, len(pairs)))
        if other := next((of for of in others if of.group != pair.group), None):
            prompts[pair.pair_id] = other.prompt
    return Shifted(
        OTHER_PROMPT, "the prompt of another pair, to which neither response is an answer", writer.with_prompts(prompts)
    )


SHIFTS: Mapping[str, Callable[[Writer, SyntheticWorld | None], Shifted]] = {
    CAPITALS: _capitals,
    PARAPHRASE: _paraphrase,
    FALSE_PREMISE: _premise,
    OTHER_TOPIC: _other_topic,
    OTHER_PROMPT: _other_prompt,
}
"""Kind → the pairs under it."""
