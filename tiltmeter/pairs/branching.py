"""Generation under many steering vectors at once: prompts are read once, each vector steers a branch of its own.

With ``tokens="new"`` only new tokens are steered: the hidden state at every generated token gets its branch's vector added,
prompts are read as they are. So the first new token, which the prompt's last token predicts, is the same in all branches. With
``tokens="predicting"`` the prompt's last token is steered, too: every hidden state that a new token is predicted from.
Completions are those of one run per vector, with the same random numbers.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from tiltmeter.models.branch_attention import BranchCache, run_branches, use_branch_attention
from tiltmeter.models.cpu_linear import fast_linear
from tiltmeter.models.generation import (
    Completion,
    Decoding,
    Job,
    cut_into_batches,
    end_ids,
    make_jobs,
    read_completion,
    ready_to_generate,
)
from tiltmeter.models.hooks import hook_site
from tiltmeter.models.layers import backbone, unembedding
from tiltmeter.models.sampling import GumbelSampling, refuse_nan
from tiltmeter.pairs.log_probs import default_chunk_tokens, scale_and_cap
from tiltmeter.steering.intervene import Intervention
from tiltmeter.steering.vector import check_site_and_width

BranchTokens = Literal["new", "predicting"]


@torch.no_grad()
def generate_branches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    site: str,
    shifts: Float[Tensor, "*prompt branch d_model"],
    keys: Sequence[str] | None = None,
    tokens: BranchTokens = "new",
    tokens_per_batch: int = 16384,
) -> list[list[list[Completion]]]:
    """Completions of token-id prompts while ``shifts[j]`` is added at a site to the hidden states of some tokens.

    Args:
        model: as for :func:`tiltmeter.models.generation.generate`; its attention is another one meanwhile.
        site: where (:mod:`tiltmeter.models.layers`).
        shifts: what is added in each branch, λ v, to all prompts or to each its own; zeros for the model as it is.
        keys: names of the prompts, which choose their random streams; None: their number.
        tokens: which; see the module's head.
        tokens_per_batch: rows × (prompt + branches × completion) that are held together, at most.

    Returns:
        For each branch what :func:`tiltmeter.models.generation.generate` returns: for each prompt its completions.

    Raises:
        UserError: as :func:`tiltmeter.models.generation.generate`; shifts of another width or not finite; a family whose attention
            can't be changed.
    """
    check_site_and_width(model, site, shifts.shape[-1])
    Intervention(site, shifts.flatten(0, -2), tokens="new")  # checks its arguments
    shifts = shifts.expand(len(prompts), *shifts.shape[-2:])
    n, n_branches = decoding.n_samples, shifts.shape[1]
    jobs = make_jobs(model, tokenizer, prompts, decoding, keys)
    held = replace(decoding, max_new_tokens=decoding.max_new_tokens * n_branches)
    ends = end_ids(model, tokenizer)
    found: dict[int, list[Completion]] = {}
    with ready_to_generate(model), fast_linear(model):
        for batch in cut_into_batches(jobs, held, tokens_per_batch, None):
            own = shifts[[job.place // n for job in batch]]
            said = _BatchOfBranches(model, batch, decoding, ends, site, own, tokens).complete()
            for job, branches in zip(batch, said.tolist(), strict=True):
                found[job.place] = [read_completion(ids, ends, tokenizer, decoding.stop) for ids in branches]
    return [
        [[found[prompt * n + sample][branch] for sample in range(n)] for prompt in range(len(prompts))]
        for branch in range(n_branches)
    ]


class _BatchOfBranches:
    """Prompts that are completed together, and which rows and branches are still at it.

    Rows (prompts) and branches that have nothing left to say are dropped; tensors below are about those that remain.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        jobs: Sequence[Job],
        decoding: Decoding,
        ends: Sequence[int],
        site: str,
        shifts: Float[Tensor, "row branch d_model"],
        tokens: BranchTokens,
    ) -> None:
        self.model, self.jobs, self.decoding, self.site = model, jobs, decoding, site
        self.n_branched = 1 if tokens == "predicting" else 0
        """Tokens at the end of a prompt that every branch reads by itself."""
        self.head = unembedding(model)
        self.shifts = shifts.to(model.device, torch.promote_types(model.dtype, torch.float32))
        self.ends = torch.tensor(ends, device=model.device)
        self.samplers = [GumbelSampling([job.stream], decoding.temperature, decoding.top_p) for job in jobs]
        self.rows = torch.arange(len(jobs), device=model.device)
        self.branches = torch.arange(shifts.shape[1], device=model.device)
        self.ended = torch.zeros(len(jobs), shifts.shape[1], dtype=torch.bool, device=model.device)

    def complete(self) -> Int[Tensor, "row branch token"]:
        """The tokens that every branch says; behind an end token, end tokens."""
        n_new = self.decoding.max_new_tokens
        said = self.ends[0].repeat(len(self.rows), len(self.branches), n_new)
        last, cache = self._read_prompts()
        tokens = last.expand(-1, len(self.branches))
        with use_branch_attention(self.model), ExitStack() as stack:
            stack.callback(hook_site(self.model, self.site, self._shifted).remove)
            for step in range(n_new):
                if step or self.n_branched:
                    hidden = run_branches(self.model, tokens, cache)
                    tokens = self._choose(hidden)
                said[self.rows[:, None], self.branches, step] = tokens.where(~self.ended, self.ends[0])
                self.ended |= torch.isin(tokens, self.ends)
                if self.ended.all():
                    break
                tokens = self._drop_what_ended(tokens, cache)
        return said

    def _read_prompts(self) -> tuple[Int[Tensor, "row 1"], BranchCache]:
        """The first new token of each prompt, or the last one of it where branches read that themselves, and the cache.

        Padding is on the right, where nothing that matters sees it.
        """
        lengths = [len(job.ids) - self.n_branched for job in self.jobs]
        width = max(1, *lengths)  # a prompt of one token that branches read themselves leaves padding alone
        padded = [(job.ids[:n] + job.ids[-1:] * width)[:width] for job, n in zip(self.jobs, lengths, strict=True)]
        ids = torch.tensor(padded, device=self.model.device)
        # without the model's configuration, so that layers with a sliding window keep all tokens
        prompt = DynamicCache()
        out = backbone(self.model)(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=prompt, use_cache=True
        )
        read = torch.tensor(lengths, device=self.model.device)
        n_steps = self.decoding.max_new_tokens - 1 + self.n_branched
        cache = BranchCache(prompt, read, len(self.branches), n_steps)
        if self.n_branched:
            return torch.tensor([job.ids[-1:] for job in self.jobs], device=self.model.device), cache
        return self._choose(out.last_hidden_state[self.rows, read - 1][:, None]), cache

    def _choose(self, hidden: Float[Tensor, "row branch d_model"]) -> Int[Tensor, "row branch"]:
        """The next tokens, with the logits of a few rows at a time."""
        at_a_time = max(1, default_chunk_tokens(len(self.head.weight)) // hidden.shape[1])
        chosen = []
        for start in range(0, len(hidden), at_a_time):
            raw = self.model.get_output_embeddings()(hidden[start : start + at_a_time])
            logits = scale_and_cap(raw, self.head).to(torch.float32)  # as transformers does, whatever the model's dtype
            if self.decoding.temperature > 0:  # one stream a row: the same noise in all of its branches
                samplers = self.samplers[start : start + at_a_time]
                logits = torch.stack([by.perturbed(row) for by, row in zip(samplers, logits, strict=True)])
            ids = logits.argmax(-1, keepdim=True)
            refuse_nan(logits.gather(-1, ids))  # NaN is larger than any number
            chosen.append(ids[..., 0])
        return torch.cat(chosen)

    def _drop_what_ended(
        self, tokens: Int[Tensor, "row branch"], cache: BranchCache
    ) -> Int[Tensor, "kept_row kept_branch"]:
        rows, branches = (~self.ended).any(1).nonzero()[:, 0], (~self.ended).any(0).nonzero()[:, 0]
        if len(rows) == len(self.rows) and len(branches) == len(self.branches):
            return tokens
        cache.select(rows, branches)
        self.rows, self.branches = self.rows[rows], self.branches[branches]
        self.ended, self.shifts = self.ended[rows][:, branches], self.shifts[rows][:, branches]
        self.samplers = [self.samplers[row] for row in rows.tolist()]
        return tokens[rows][:, branches]

    def _shifted(self, hidden: Float[Tensor, "row branch d_model"]) -> Float[Tensor, "row branch d_model"]:
        return (hidden + self.shifts).to(hidden.dtype)
