"""OpenAssistant conversation trees: ranked replies to one message become preference pairs.

Source: Köpf et al. 2023, "OpenAssistant Conversations"; data set ``OpenAssistant/oasst1``, tree export; rank 0 is best.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

from datamodules.files.jsonl import hub_file, hub_location, list_files, read_rows
from datamodules.files.malformed import Malformed, MalformedRows, check_policy
from datamodules.records import LoadReport, Message, PreferencePair, Role, transcript
from tiltmeter.errors import UserError

REPO = "OpenAssistant/oasst1"
HUB_FILE = "2023-04-12_oasst_ready.trees.jsonl.gz"
PairChoice = Literal["all", "adjacent", "best_worst"]

_TREE_KEYS = ("message_tree_id", "tree_state", "prompt")
_ROLES: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}

Node = dict[str, Any]


@dataclass(frozen=True)
class _Thread:
    """A path from the root to a prompter message, with the tree it belongs to."""

    tree_id: str
    state: str
    group: str
    messages: tuple[Node, ...]


class OASST1:
    """OASST1 (or OASST2) from local tree exports or from the Hugging Face hub.

    Two replies to the same message make a pair when both carry a rank and the ranks differ. Trees that are not
    ``ready_for_export``, threads and replies that are deleted, synthetic or failed review, and roots or replies in
    other languages are left out and counted, pair by pair.

    Args:
        path: A ``.jsonl`` / ``.jsonl.gz`` tree export or a folder of them. None reads from the hub.
        pairs: ``all`` ordered pairs of the replies to a message, ``adjacent`` (neighbouring ranks among the replies
            that passed the filters) or ``best_worst`` (their best against their worst).
        languages: Languages to keep, as in the export (``en``, ``pt-BR``).
        revision: Branch, tag or commit on the hub; only without ``path``.
        malformed: What to do with trees that aren't what is expected: ``strict`` refuses the first, ``skip`` leaves up to
            1 % of a file out and says so.

    Raises:
        UserError: An unknown ``pairs`` or policy, no languages, ``revision`` together with ``path``.
    """

    name = "oasst1"

    def __init__(
        self,
        path: str | None = None,
        pairs: PairChoice = "all",
        languages: Sequence[str] = ("en",),
        revision: str | None = None,
        malformed: Malformed = "strict",
    ) -> None:
        check_policy(malformed)
        if pairs not in get_args(PairChoice):
            raise UserError(f"data.pairs: expected all, adjacent or best_worst, got {pairs!r}")
        if isinstance(languages, str) or not list(languages):
            raise UserError(f"data.languages: expected a list of languages such as [en], got {languages!r}")
        if path is not None and revision is not None:
            raise UserError("data.revision: only for data from the hub; leave it out together with data.path")
        self.path = path
        self.pairs = pairs
        self.languages = tuple(languages)
        self.revision = revision
        self.malformed: Malformed = malformed

    def load(self) -> tuple[list[PreferencePair], list[LoadReport]]:
        """All pairs in file order, one report per file; a report counts pairs of ranked replies, not trees.

        Raises:
            UserError: Missing or malformed files, another format than the tree export, or no pair left.
        """
        if self.path is None:
            file = hub_file(REPO, HUB_FILE, self.revision, "data.path")
            files = [(file, f"{hub_location(REPO, file, self.revision)}/{HUB_FILE}")]
        else:
            files = [(file, str(file)) for file in list_files(self.path)]
        pairs: list[PreferencePair] = []
        reports: list[LoadReport] = []
        groups: dict[str, str] = {}
        seen: set[str] = set()
        for path, location in files:
            kept, report = self._load_file(path, location, groups, seen)
            pairs += kept
            reports.append(report)
        if not pairs:
            reasons = ", ".join(f"{n} {reason}" for r in reports for reason, n in r.dropped.most_common())
            reasons = reasons or "no two ranked replies to one message"
            raise UserError(
                f"data.path: no usable pair in {self.path or REPO}: {reasons} (data.languages={list(self.languages)})"
            )
        return pairs, reports

    def _load_file(
        self, path: Path, location: str, groups: dict[str, str], seen: set[str]
    ) -> tuple[list[PreferencePair], LoadReport]:
        """Read the pairs of one file; ``groups`` (root text to group) and ``seen`` (tree ids) are shared by all files of a load."""
        report = LoadReport(source=self.name, location=location)
        pairs: list[PreferencePair] = []
        trees: Counter[str] = Counter()
        malformed = MalformedRows(self.malformed)
        for line_number, tree in read_rows(path, malformed):
            where = f"{path}:{line_number}"
            try:
                _check_tree(tree, where)
                state = "repeated" if tree["message_tree_id"] in seen else str(tree["tree_state"])
                threads = list(_threads(tree, state, groups, where))  # the whole tree is checked before any use
            except UserError as error:
                malformed(error)
                continue
            seen.add(tree["message_tree_id"])
            trees[state] += 1
            for thread in threads:
                pairs += self._pairs_of(thread, report)
        report.n_kept = len(pairs)
        malformed.settle(report, trees.total())
        report.notes["trees"] = ", ".join(f"{n} {state}" for state, n in trees.most_common())
        return pairs, report

    def _pairs_of(self, thread: _Thread, report: LoadReport) -> Iterator[PreferencePair]:
        """Pairs of the replies to the last message of a thread; every pair of ranked replies is kept or counted."""
        ranked = [node for node in _replies(thread.messages[-1]) if node.get("rank") is not None]
        ranked.sort(key=lambda node: node["rank"])
        refused = self._refuse_thread(thread)
        refusals = [refused or self._refuse_reply(node) for node in ranked]
        levels = sorted({node["rank"] for node, refusal in zip(ranked, refusals, strict=True) if refusal is None})
        n_ranked = refusals.count(None)
        for i, j in combinations(range(len(ranked)), 2):
            report.n_rows += 1
            better, worse = ranked[i], ranked[j]
            reason = refusals[i] or refusals[j] or self._refuse_pair(better, worse, levels)
            if reason is None:
                yield _pair(self.name, thread, better, worse, n_ranked)
            else:
                report.dropped[reason] += 1

    def _refuse_thread(self, thread: _Thread) -> str | None:
        if thread.state == "repeated":
            return "tree was read before"
        if thread.state != "ready_for_export":
            return "tree is not ready for export"
        if thread.messages[0].get("lang") not in self.languages:
            return "other language"
        flaws = [flaw for flaw in map(_flaw, thread.messages) if flaw is not None]
        return f"{flaws[0]} message in the thread" if flaws else None

    def _refuse_reply(self, reply: Node) -> str | None:
        flaw = _flaw(reply)
        if flaw is not None:
            return f"{flaw} reply"
        return None if reply.get("lang") in self.languages else "other language"

    def _refuse_pair(self, better: Node, worse: Node, levels: list[int]) -> str | None:
        if better["rank"] == worse["rank"]:
            return "equal ranks"
        if better["text"].strip() == worse["text"].strip():
            return "identical responses"
        span = levels.index(worse["rank"]) - levels.index(better["rank"])
        wanted = {"all": span, "adjacent": 1, "best_worst": len(levels) - 1}[self.pairs]
        return None if span == wanted else f"not asked for by pairs={self.pairs}"


def _threads(tree: Node, state: str, groups: dict[str, str], where: str) -> Iterator[_Thread]:
    """Every thread that ends in a prompter message, depth first; checks each message on the way."""
    root = tree["prompt"]
    _check_message(root, where)
    root_text = " ".join(root["text"].lower().split())
    group = groups.setdefault(root_text, tree["message_tree_id"])  # trees with one root text stay together
    stack: list[tuple[Node, ...]] = [(root,)]
    while stack:
        messages = stack.pop()
        if messages[-1]["role"] == "prompter":
            yield _Thread(tree["message_tree_id"], state, group, messages)
        for reply in reversed(_replies(messages[-1])):
            _check_message(reply, where)
            if reply["role"] == messages[-1]["role"]:
                raise UserError(f"{where}: message {reply.get('message_id')}: two {reply['role']} messages in a row")
            stack.append((*messages, reply))


def _replies(node: Node) -> list[Node]:
    return node.get("replies") or []


def _flaw(node: Node) -> str | None:
    """Why a message may not be used; a missing key counts as unobjectionable."""
    if node.get("deleted"):
        return "deleted"
    if node.get("synthetic"):
        return "synthetic"
    if node.get("review_result") is False:
        return "badly reviewed"
    return None if node["text"].strip() else "empty"


def _pair(source: str, thread: _Thread, better: Node, worse: Node, n_ranked: int) -> PreferencePair:
    prompt = tuple(Message(_ROLES[node["role"]], node["text"].strip()) for node in thread.messages)
    chosen, rejected = better["text"].strip(), worse["text"].strip()
    prompt_text, chosen_text = transcript(prompt, chosen)
    return PreferencePair(
        pair_id=f"{source}/{better['message_id']}/{worse['message_id']}",
        source=source,
        group=thread.group,
        prompt=prompt,
        chosen=Message("assistant", chosen),
        rejected=Message("assistant", rejected),
        prompt_text=prompt_text,
        chosen_text=chosen_text,
        rejected_text=transcript(prompt, rejected)[1],
        attributes={"rank_gap": worse["rank"] - better["rank"], "tree_id": thread.tree_id, "n_ranked": n_ranked},
    )


def _check_tree(tree: Node, where: str) -> None:
    missing = [key for key in _TREE_KEYS if key not in tree]
    if missing or not isinstance(tree["prompt"], dict) or not isinstance(tree["message_tree_id"], str):
        got = ", ".join(sorted(map(str, tree))[:8]) or "none"
        raise UserError(
            f"{where}: not an OASST tree: expected the keys {', '.join(_TREE_KEYS)} with prompt an object, got {got}; "
            f"use a tree export such as {HUB_FILE}"
        )


def _check_message(node: Node, where: str) -> None:
    name = node.get("message_id") if isinstance(node, dict) else None
    if not isinstance(name, str):
        raise UserError(f"{where}: not an OASST message: expected an object with message_id, got {str(node)[:40]!r}")
    if not isinstance(node.get("text"), str):
        raise UserError(f"{where}: message {name}: text: expected a string, got {node.get('text')!r}")
    if node.get("role") not in _ROLES:
        raise UserError(f"{where}: message {name}: role: expected prompter or assistant, got {node.get('role')!r}")
    if not isinstance(node.get("replies", []), list | None):
        raise UserError(f"{where}: message {name}: replies: expected a list, got {type(node['replies']).__name__}")
    rank = node.get("rank")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool)):
        raise UserError(f"{where}: message {name}: rank: expected a whole number or null, got {rank!r}")
