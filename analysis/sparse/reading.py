"""Features at every token of responses: how often, how much, in which texts; what a steering adds to them and DPO changes."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis.open.checkpoints import Checkpoints
from analysis.open.models import LoadedModel
from analysis.open.pair_log_probs import batches_by_length, longer_row
from analysis.open.probe_pairs import ProbePair
from analysis.report.coloured import ColouredPair, coloured_text, token_texts
from analysis.sparse.bridge import ROWS_AT_A_TIME, Change
from analysis.sparse.classes import FeatureClasses
from tiltmeter.geometry.traces import logit_lens
from tiltmeter.models.cpu_linear import fast_linear
from tiltmeter.models.layers import FINAL_POST_NORM, final_norm, unembedding
from tiltmeter.pairs.batch import CHOSEN, collate_pairs
from tiltmeter.sparse.autoencoder import SparseAutoencoder
from tiltmeter.sparse.feature_sets import FeatureMeans
from tiltmeter.sparse.steering import SparseSteering, effective_steering
from tiltmeter.states.capture import HiddenStates, ReadPoint, join_hidden_states, read_hidden_states

_N_TEXTS = 3
"""Texts that a feature is shown on."""
_TOKENS_SHOWN = 10
"""Tokens at either end of a feature's logit lens."""


class FeatureReading:
    """States of all response tokens, streamed through an autoencoder.

    Args:
        checkpoints: base, and the pairs whose responses are read.
        sae: whose features.
        steering: a trained one, which adds to them; None: there is none.
        dpo: models whose change of the same states is told; None: there are none.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        sae: SparseAutoencoder,
        steering: SparseSteering | None,
        dpo: Checkpoints | None,
    ) -> None:
        self.checkpoints, self.sae, self.steering = checkpoints, sae, steering
        pairs, width = checkpoints.pairs, sae.width
        self.states = _states(checkpoints.base, pairs, sae.site)
        after = None if dpo is None else _states(dpo.aligned, pairs, sae.site).rows
        self.change = None if after is None else Change(self.states.rows, after, self.states.pair_index)
        self.texts = 2 * self.states.pair_index + (self.states.sides != CHOSEN).long()
        """Response of each token: chosen and rejected of each pair in turn."""
        self.base, self.steered, self.effective, self.moved = (FeatureMeans(width) for _ in range(4))
        self.means = torch.zeros(2 * len(pairs), width)
        """Mean activation in each response."""
        self.most = torch.zeros(2 * len(pairs), width)
        """Largest activation in each response."""
        for at in torch.arange(len(self.states.rows)).split(ROWS_AT_A_TIME):
            self._add(at, after)
        self.means /= torch.bincount(self.texts, minlength=len(self.means)).clamp(min=1)[:, None]

    @torch.no_grad()
    def _add(self, at: Int[Tensor, " token"], after: Tensor | None) -> None:
        """Add some tokens."""
        rows = self._rows(self.states.rows[at])
        features = self.sae.encode(rows)
        self.base.update(features)
        on_cpu = features.float().cpu()
        self.means.index_add_(0, self.texts[at], on_cpu)
        self.most.scatter_reduce_(0, self.texts[at][:, None].expand_as(on_cpu), on_cpu, "amax")
        if self.steering is not None:
            s = self.steering.steering(rows)
            self.steered.update(s)
            self.effective.update(effective_steering(features, s))
        if after is not None:
            self.moved.update(self.sae.encode(self._rows(after[at])) - features)

    def _rows(self, rows: Tensor) -> Tensor:
        return rows.to(self.sae.encoder_weight.device, self.sae.encoder_weight.dtype)

    @property
    def usage(self) -> Float[Tensor, " width"]:
        """Mean |ReLU(f + s) − f| of each feature over response tokens; without a steering, mean |Δf| of DPO."""
        return self.effective.size if self.steering is not None else self.moved.size

    def table(self, classes: FeatureClasses) -> pd.DataFrame:
        """A row for each feature: its class, how active it is, and how much each method moves it, in units of features a token."""
        table = pd.DataFrame(
            {"index": range(self.sae.width), "label": classes.labels, "explanation": classes.explanations}
        )
        table["density"], table["activation"] = self.base.frequency.numpy(), self.base.size.numpy()
        if self.steering is not None:
            table["steering"] = self.steered.size.numpy()
            table["effective_steering"] = self.effective.size.numpy()
            table["effective_density"] = self.effective.frequency.numpy()
        if self.change is not None:
            table["dpo_change"] = self.moved.size.numpy()
        return table

    def _texts_of(self, feature: int) -> list[tuple[list[str], Tensor]]:
        """The responses that a feature is most active in: their tokens and its activation at each."""
        found = []
        order = self.most[:, feature].argsort(descending=True, stable=True)[:_N_TEXTS].tolist()
        for text in (t for t in order if float(self.most[t, feature]) > 0):
            pair = self.checkpoints.pairs[text // 2].ids
            ids = pair.rejected_ids if text % 2 else pair.chosen_ids
            rows = self._rows(self.states.rows[self.texts == text])
            values = self.sae.encode(rows)[:, feature].float().cpu()
            found.append((token_texts(self.checkpoints.base.tokenizer, ids), values))
        return found

    def examples(self, feature: int) -> list[str]:
        """The same texts, their tokens more than half as active as the most active one between « and »."""
        return [
            "".join(
                f"«{word}»" if a > float(values.max()) / 2 else word
                for word, a in zip(words, values.tolist(), strict=True)
            )
            for words, values in self._texts_of(feature)
        ]

    def coloured(self, n: int, classes: FeatureClasses) -> list[ColouredPair]:
        """Texts of the features used most, coloured by tenths of their largest activation; and their decoder rows' tokens."""
        found = []
        for feature in self.usage.argsort(descending=True)[: min(n, int((self.usage > 0).sum()))].tolist():
            texts = self._texts_of(feature)
            most = max((float(values.max()) for _, values in texts), default=1.0)
            why = classes.explanations[feature]
            title = f"Feature {feature}: {classes.labels[feature]}{f', {why}' if why else ''}"
            said = f"{self._used(feature)}. Its decoder row makes likelier: {self._lens(feature)}"
            rows = [
                coloured_text(f"Largest activation {float(values.max()):.2f}", words, (10 * values / most).tolist())
                for words, values in texts
            ]
            found.append(ColouredPair(title, said, rows))
        return found

    def _used(self, feature: int) -> str:
        """Line on how much each method uses a feature."""
        said = [f"Active at {float(self.base.frequency[feature]):.1%} of response tokens"]
        for of, words in ((self.effective, "of the steering"), (self.moved, "of DPO’s change")):
            if float(of.size.sum()) > 0:
                said.append(f"{float(of.size[feature] / of.size.sum()):.1%} {words}")
        return ", ".join(said)

    def _lens(self, feature: int) -> str:
        """Tokens that a feature's decoder row points to."""
        model, tokenizer = self.checkpoints.base.model, self.checkpoints.base.tokenizer
        norm = None if self.sae.site == FINAL_POST_NORM else final_norm(model)
        head = unembedding(model)
        row = self.sae.decoder_weight[feature].to(head.weight.device)
        found = logit_lens(row, head, norm=norm, n_tokens=min(_TOKENS_SHOWN, len(head.weight)))
        words = [str(tokenizer.decode([i])).replace(" ", "␣").replace("\n", "↵") for i in found.up.tolist()]
        return " ".join(word or "(nothing)" for word in words)


def _states(opened: LoadedModel, pairs: Sequence[ProbePair], site: str) -> HiddenStates:
    """States of every response token at a site: by pair, chosen before rejected, by token; on the CPU."""
    parts = []
    with fast_linear(opened.model):
        for rows in batches_by_length([longer_row(pair.ids) for pair in pairs]):
            batch = collate_pairs([pairs[row].ids for row in rows], pair_index=rows, layout="concatenated")
            batch = batch.to(opened.model.device)
            found = read_hidden_states(opened.model, batch, sites=[site], positions=["response_all"])
            parts.append({point: HiddenStates(*(x.cpu() for x in of)) for point, of in found.items()})
    return join_hidden_states(parts)[ReadPoint(site, "response_all")]
