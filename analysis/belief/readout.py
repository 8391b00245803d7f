"""Labels that can still be read off hidden states, and by the same linear map, before and after training.

A text's state is the mean over its tokens. Readouts are fitted on the base and applied to held-out texts of the base, the aligned
model, and the aligned model less its mean change; and fitted anew on the aligned model.
"""

import math
from collections.abc import Sequence

import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor

from analysis.belief.labelled_texts import LabelledTexts, of_file, of_responses, of_truthfulqa
from analysis.contract import Cost
from analysis.open.checkpoints import Checkpoints
from analysis.open.models import LoadedModel
from analysis.open.observations import site_name
from analysis.open.pair_log_probs import batches_by_length
from analysis.report.page import Headline, Section
from analysis.report.site_axes import Panel, as_text, draw_panels
from analysis.report.style import COLOURS
from analysis.steering.sweep import check_options, swept_sites
from tiltmeter.errors import Unsupported
from tiltmeter.geometry.readout import APPLIED, LEAST_TEXTS, MARGIN, UNCHANGED, Readout, readout
from tiltmeter.models.causal_lm import DTYPES
from tiltmeter.pairs.batch import TokenizedPair, collate_pairs
from tiltmeter.states.capture import ReadPoint, join_hidden_states, read_hidden_states

NAME = "readout"
_LOOKS = {"base": ("base", "o"), "policy": ("policy", "s"), "retrained": ("policy_dark", "D")}
_CALLED = {"base": "base", "policy": "aligned", "retrained": "fitted anew", "policy_less_shift": "less mean change"}
"""Readouts → what the figure calls them."""


class Readouts:
    """Options of the readout analysis.

    Args:
        labelled: CSV file of texts with a label of two values, such as toxic or not; null: none.
        text_column, label_column: of that file.
        truthfulqa: file of TruthfulQA's questions, whose true and false answers are told apart; null: not asked.
        n_texts: of each label's texts, drawn at random; null: all.
        sites: a site, several, or ``all``; null: after the middle block, and before and after the final norm.
        n_permutations: random labellings that the base's readout is held against.
        margin: difference of AUC within which a readout is called unchanged.
        seed: of draws, folds and permutations.
        dtype, device: of the models; device null: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        labelled: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        truthfulqa: str | None = None,
        n_texts: int | None = 400,
        sites: str | Sequence[str] | None = None,
        n_permutations: int = 19,
        margin: float = MARGIN,
        seed: int = 0,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        least = {"n_texts": (n_texts, LEAST_TEXTS), "n_permutations": (n_permutations, 1), "seed": (seed, 0)}
        check_options(NAME, least, {"dtype": (dtype, DTYPES)})
        self.labelled, self.text_column, self.label_column = labelled, text_column, label_column
        self.truthfulqa, self.n_texts, self.sites = truthfulqa, n_texts, sites
        self.n_permutations, self.margin, self.seed = n_permutations, margin, seed
        self.dtype, self.device = dtype, device

    def costs(self, checkpoints: Checkpoints) -> list[Cost]:
        """One pass of either model over the texts; those of a run's own responses are read once."""
        swept_sites(self.sites, checkpoints.base.model.config.num_hidden_layers)
        n_tokens = sum(len(before) + len(text) for before, text in _distinct(self._texts(checkpoints)))
        return [Cost("texts", 2.0, 2 * n_tokens)]

    @torch.no_grad()
    def table(self, checkpoints: Checkpoints) -> pd.DataFrame:
        """``readout``: a row for each label and site.

        Raises:
            UserError: an unknown site, or a file that can't be read.
            Unsupported: too few responses, and no file.
        """
        sites = swept_sites(self.sites, checkpoints.base.model.config.num_hidden_layers)
        asked = self._texts(checkpoints)
        if not asked:
            raise Unsupported(
                f"{NAME}: expected at least {LEAST_TEXTS} responses to read labels off, got {2 * len(checkpoints.pairs)}; "
                f"ask about more "
                f"pairs, or give {NAME}.labelled=FILE.csv"
            )
        texts = _distinct(asked)
        place = {_key(text): i for i, text in enumerate(texts)}
        pairs = [TokenizedPair(before, text, text[:1]) for before, text in texts]
        base, aligned = (_states(opened, pairs, sites) for opened in (checkpoints.base, checkpoints.aligned))
        rows = []
        for of in asked:
            where = [place[_key(text)] for text in of.texts]
            labels = torch.tensor(of.labels)
            for site in sites:
                found = readout(
                    base[site][where],
                    aligned[site][where],
                    labels,
                    of.groups,
                    n_permutations=self.n_permutations,
                    margin=self.margin,
                    seed=self.seed,
                )
                rows.append({"label": of.name, "site": site, **_row(found), "n": len(of.labels), "meaning": of.meaning})
        return pd.DataFrame(rows).assign(margin=self.margin)

    def _texts(self, checkpoints: Checkpoints) -> list[LabelledTexts]:
        """All that has enough texts; what was asked for by a file has, or is refused."""
        pairs = checkpoints.pairs[: None if self.n_texts is None else self.n_texts // 2]
        found = [of for of in of_responses(pairs) if of.is_enough]
        if self.truthfulqa is not None:
            found.append(of_truthfulqa(self.truthfulqa, checkpoints.base).drawn(self.n_texts, self.seed))
        if self.labelled is not None:
            columns = {"text_column": self.text_column, "label_column": self.label_column}
            found.append(of_file(self.labelled, **columns, opened=checkpoints.base).drawn(self.n_texts, self.seed))
        return found


def _key(text: tuple[list[int], list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, text))


def _distinct(asked: Sequence[LabelledTexts]) -> list[tuple[list[int], list[int]]]:
    """Every text once: a run's own responses have several labels."""
    return list({_key(text): text for of in asked for text in of.texts}.values())


def _states(opened: LoadedModel, pairs: Sequence[TokenizedPair], sites: Sequence[str]) -> dict[str, Tensor]:
    """Mean state of each text's tokens at every site, in the order of the texts."""
    parts = []
    lengths = [len(pair.prompt_ids) + len(pair.chosen_ids) for pair in pairs]
    for rows in batches_by_length(lengths, rows_each=1):
        batch = collate_pairs([pairs[row] for row in rows], pair_index=rows, layout="chosen_only").to(
            opened.model.device
        )
        found = read_hidden_states(opened.model, batch, sites=sites, positions=["response_mean"])
        parts.append({point: of._replace(rows=of.rows.float().cpu()) for point, of in found.items()})
    whole = join_hidden_states(parts)
    return {site: whole[ReadPoint(site, "response_mean")].rows for site in sites}


def _row(found: Readout) -> dict[str, object]:
    """Columns of one label and site."""
    row: dict[str, object] = {}
    for end, quality in (("", found.quality), ("_means", found.by_means)):
        for applied in APPLIED:
            row |= quality.auc[applied].named(f"auc_{applied}{end}")
            row |= quality.accuracy[applied].named(f"accuracy_{applied}{end}")
        for applied in ("policy", "retrained"):
            row |= quality.difference[applied].named(f"auc_change_{applied}{end}")
            row[f"verdict_{applied}{end}"] = quality.verdict[applied]
    return row | {
        "cosine": found.cosine,
        "degrees": math.degrees(math.acos(max(-1.0, min(1.0, found.cosine)))),
        "cosine_means": found.cosine_by_means,
        "cosine_of_halves": found.cosine_of_halves,
        "null_mean": found.null.value,
        "null_least": found.null.low,
        "null_largest": found.null.high,
        "p_value": found.p_value,
    }


def readout_section(table: pd.DataFrame) -> Section:
    """The section ``readout``."""
    sites = list(dict.fromkeys(table["site"]))
    panels: list[Panel] = [lambda axes, rows: _draw_auc(axes, rows, sites[-1])]
    panels.append(lambda axes, rows: _draw_accuracy(axes, rows, sites[-1]))
    n_labels = table["label"].nunique()
    figure, sentences = draw_panels(panels, table, panel_height_cm=2.2 + 0.5 * n_labels)
    kept, moved = (int((table[f"verdict_{applied}"] == UNCHANGED).sum()) for applied in ("retrained", "policy"))
    margin = float(table["margin"].iloc[0])
    return Section(
        name=NAME,
        question="What can still be read off hidden states, and by the same linear map?",
        claim="D-STEER: DPO leaves knowledge and representations as they were. Then what the base’s states told can be told "
        "after it, and by the same readout.",
        sentences=sentences,
        interval="95\u00a0%, over prompts, by the jackknife on log-odds; of the texts and not of the fits. Unchanged: the "
        f"90\u00a0% interval of the change of AUC lies within ±{margin:g}.",
        limits=[
            "That a model uses what can be read off it.",
            "Readouts that are not linear, and of single tokens: a text’s state is the mean over its tokens.",
            "How well a label could be read with more texts.",
        ],
        figure=figure,
        table=table,
        reading=[
            "AUC: how often a text with the label scores higher than one without, out of fold. Grey circle: on the base. Blue "
            "square: the base’s readout on the aligned model. Dark diamond: fitted anew there. Cross: the best of permuted labels.",
            "A constant shift changes no AUC. It moves scores over the base’s threshold: accuracy (the mean over both labels) "
            "falls, and comes back when the mean change of other texts is taken off (triangle).",
            "Cosine: of the logistic weights on the base and on the aligned model; of two halves of the base’s texts beside it, "
            "since weights also differ by sample. Columns that end in means: the difference of the labels’ means in their place.",
        ],
        headlines=[
            Headline(
                f"{kept} of {len(table)}",
                "labels and sites that can be read as well after training, by a readout fitted anew",
                f"by the base’s own readout: {moved}. AUC within ±{margin:g} of the base’s; {NAME}.csv, column verdict_retrained.",
            )
        ],
        shown=_shown(table),
        caption="AUC by label and site, with 95 % intervals over prompts",
    )


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    said = [
        (
            row["label"],
            site_name(row["site"]),
            *(_with_ends(row, f"auc_{applied}", ".2f") for applied in ("base", "policy", "retrained")),
            as_text(row["cosine"], ".2f"),
            as_text(row["cosine_of_halves"], ".2f"),
            row["verdict_policy"],
            row["verdict_retrained"],
        )
        for _, row in table.iterrows()
    ]
    columns = ["label", "site", "on base", "base’s on aligned", "fitted anew", "cosine", "cosine of halves"]
    return pd.DataFrame(said, columns=[*columns, "the base’s", "knowledge"])


def _with_ends(row: pd.Series, name: str, form: str) -> str:
    return f"{as_text(row[name], form)} ({as_text(row[f'{name}_low'], form)} to {as_text(row[f'{name}_high'], form)})"


def _draw_marks(axes: Axes, rows: pd.DataFrame, figure: str, looks: dict[str, tuple[str, str]]) -> None:
    """Values of each label side by side, a line a label."""
    for i, (applied, (colour, mark)) in enumerate(looks.items()):
        at = [place + 0.18 * (1 - i) for place in range(len(rows))]
        name = f"{figure}_{applied}"
        axes.hlines(at, rows[f"{name}_low"], rows[f"{name}_high"], colors=COLOURS[colour], linewidth=0.8)
        label = _CALLED[applied]
        axes.plot(rows[name], at, color=COLOURS[colour], marker=mark, markersize=3, linestyle="", label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=len(looks), frameon=False, handletextpad=0.1)
    axes.set_yticks(range(len(rows)), rows["label"])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(0.5, color=COLOURS["mark"], linewidth=0.8, linestyle=(0, (4, 3)))
    axes.grid(visible=False, axis="y")


def _draw_auc(axes: Axes, table: pd.DataFrame, site: str) -> str:
    rows = table[table["site"] == site].reset_index(drop=True)
    _draw_marks(axes, rows, "auc", _LOOKS)
    axes.plot(rows["null_largest"], range(len(rows)), color=COLOURS["null"], marker="x", markersize=3, linestyle="")
    axes.set_xlabel(f"AUC, {site_name(site)}")
    n, kept = len(rows), int((rows["verdict_retrained"] == UNCHANGED).sum())
    same = int((rows["verdict_policy"] == UNCHANGED).sum())
    return f"Of {n} labels {kept} can be read as well after training by a readout fitted anew, {same} by the base’s own"


def _draw_accuracy(axes: Axes, table: pd.DataFrame, site: str) -> str:
    rows = table[table["site"] == site].reset_index(drop=True)
    looks = {"base": ("base", "o"), "policy": ("policy", "s"), "policy_less_shift": ("policy_light", "^")}
    _draw_marks(axes, rows, "accuracy", looks)
    axes.set_xlabel(f"balanced accuracy, {site_name(site)}")
    means = [as_text(float(rows[f"accuracy_{applied}"].mean()), ".2f") for applied in looks]
    return "The base’s readouts are right in {} of cases on the base, {} on the aligned model, {} less its mean change".format(
        *means
    )
