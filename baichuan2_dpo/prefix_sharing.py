"""Both replies of a pair behind one copy of their prompt, in one row without padding, the head on reply tokens only.

A row is, pair by pair: what both sides have in common (the prompt, and the beginning of the replies where they begin
alike), the rest of the chosen reply, the rest of the rejected one, which doesn't see the chosen one and has its
positions. Source of the idea: Wang et al., "Accelerating Direct Preference Optimization with Prefix Sharing" (2024).
"""

from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from data import IGNORE_INDEX
from fast_path import FastPath, layers_attend_only


def attend(query, key, value, start: int, **settings) -> torch.Tensor:
    """Attention of queries that stand at the positions from `start`; their keys begin at position 0.

    query: (1, heads, queries, head_dim); key, value: (1, heads or fewer, start + queries, head_dim).
    """
    window, mask = settings.pop("window"), None
    length = key.shape[2]
    if start > 0 or (window is not None and length > window):
        mask = torch.ones(query.shape[2], length, dtype=torch.bool, device=query.device).tril(start)
        if window is not None:
            mask = mask.triu(start + 1 - window)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, **settings)


def prefix_shared_sdpa(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention in rows of `share_prefixes`.

    Args:
        query, key, value: shape (1, heads, tokens, head_dim); key and value may have fewer heads (GQA).
        kwargs: `segments`, a list of (common, chosen, rejected) tokens of each pair; `sliding_window` or None.

    Returns:
        Attention output of shape (1, tokens, heads, head_dim), and None for the weights.

    Raises:
        NotImplementedError: the model wants capped scores or attention sinks, which SDPA does not have.
    """
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise NotImplementedError("SDPA has neither capped scores nor attention sinks")
    settings = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1], "window": kwargs.get("sliding_window")}
    if torch.is_autocast_enabled(query.device.type):  # rotary positions have made fp32 of query and key
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    segments, outputs = kwargs["segments"], []
    # Split and not sliced: each slice's gradient would be as large as the row.
    sides = [tokens for common, chosen, rejected in segments for tokens in (common + chosen, rejected)]
    parts = zip(*(states.split(sides, dim=2) for states in (query, key, value)), strict=True)
    for common, _, rejected in segments:
        (q, k, v), (rejected_q, rejected_k, rejected_v) = next(parts), next(parts)
        outputs.append(attend(q, k, v, 0, **settings))
        if rejected:
            k, v = (torch.cat([k[:, :, :common], rejected_k], 2), torch.cat([v[:, :, :common], rejected_v], 2))
            outputs.append(attend(rejected_q, k, v, common, **settings))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register("prefix_shared_sdpa", prefix_shared_sdpa)


def share_prefixes(batch: dict) -> tuple[dict, torch.Tensor]:
    """Two rows a pair, padded -> one row for all pairs without padding.

    Returns:
        `input_ids`, `position_ids` of shape (1, tokens) and `segments`; and for each supervised token of `labels`, row
        by row, the place in the row from which it is predicted.
    """
    ids, positions, segments, places, start = [], [], [], [], 0
    lengths = batch["attention_mask"].sum(1).tolist()
    differs = (batch["input_ids"][::2] != batch["input_ids"][1::2]).cpu()
    supervised = (batch["labels"] != IGNORE_INDEX).cpu()
    for pair, (chosen_end, rejected_end) in enumerate(zip(lengths[::2], lengths[1::2], strict=True)):
        common = min(chosen_end, rejected_end) - 1  # a token at least of each reply is its own
        if differs[pair, :common].any():
            common = int(differs[pair].int().argmax())
        chosen, rejected = batch["input_ids"][2 * pair, :chosen_end], batch["input_ids"][2 * pair + 1, :rejected_end]
        ids += [chosen, rejected[common:]]
        positions += [torch.arange(chosen_end), torch.arange(common, rejected_end)]
        segments.append((common, chosen_end - common, rejected_end - common))
        before = positions[-2] + start  # the token at position p stands here
        of_rejected = torch.cat([before[:common], torch.arange(rejected_end - common) + start + chosen_end])
        for row, place in ((2 * pair, before), (2 * pair + 1, of_rejected)):
            targets = supervised[row, 1 : len(place)].nonzero()[:, 0]
            places.append(place[targets])
        start += chosen_end + rejected_end - common
    device = batch["input_ids"].device
    inputs = {"input_ids": torch.cat(ids)[None], "position_ids": torch.cat(positions)[None].to(device)}
    return inputs | {"segments": segments}, torch.cat(places).to(device)


class ReplyLogProbabilities(torch.autograd.Function):
    """Log-probabilities of given tokens by a linear head, some tokens at a time, forwards and backwards.

    The logits are computed again in the backward pass, so those of all tokens never exist at once.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, targets):
        """hidden_states: (tokens, hidden); weight: (vocabulary, hidden); targets, returned: (tokens,)."""
        if torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(hidden_states.device.type))
        head = weight.to(hidden_states.dtype)
        normalizers = torch.empty(len(targets), dtype=torch.float32, device=targets.device)
        log_probabilities = torch.empty_like(normalizers)
        for part in ReplyLogProbabilities.parts(head, targets):
            logits = (hidden_states[part] @ head.T).float()
            normalizers[part] = logits.logsumexp(1)
            log_probabilities[part] = logits.gather(1, targets[part, None])[:, 0] - normalizers[part]
        ctx.save_for_backward(hidden_states, targets, normalizers)
        ctx.weight = weight  # under ZeRO-3 an empty shell until the head's backward pass gathers it again
        return log_probabilities

    @staticmethod
    def parts(head: torch.Tensor, targets: torch.Tensor) -> list[slice]:
        logits_at_once = 1 << (21 if head.device.type == "cpu" else 27)
        size = max(64, logits_at_once // len(head))
        return [slice(start, start + size) for start in range(0, len(targets), size)]

    @staticmethod
    def backward(ctx, gradient):
        hidden_states, targets, normalizers = ctx.saved_tensors
        head = ctx.weight.to(hidden_states.dtype)
        hidden_gradient = torch.empty_like(hidden_states)
        weight_gradient = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for part in ReplyLogProbabilities.parts(head, targets):
            logits = (hidden_states[part] @ head.T).float()
            logits_gradient = logits.sub_(normalizers[part, None]).exp_().mul_(-gradient[part, None])
            logits_gradient.scatter_add_(1, targets[part, None], gradient[part, None])
            logits_gradient = logits_gradient.to(head.dtype)
            torch.mm(logits_gradient, head, out=hidden_gradient[part])
            if weight_gradient is not None:
                weight_gradient.addmm_(logits_gradient.T, hidden_states[part])
        return hidden_gradient, None if weight_gradient is None else weight_gradient.to(ctx.weight.dtype), None


class PrefixSharing(FastPath):
    """FastPath for pairs; its ways are tried on a few short pairs and left out where the loss is another."""

    def choose_ways(self) -> list[str]:
        notes = super().choose_ways()
        self.trainer.log_probabilities = self.log_probabilities
        self.undo.callback(delattr, self.trainer, "log_probabilities")
        return notes

    def summed_loss(self, model, batch: dict) -> torch.Tensor:
        """What DPOTrainer.summed_loss computes."""
        return -self.log_probabilities(model, batch).sum()

    def log_probabilities(self, model, batch: dict) -> torch.Tensor:
        """What DPOTrainer.log_probabilities computes: shape (rows,)."""
        supervised = batch["labels"][:, 1:] != IGNORE_INDEX
        rows, columns = supervised.nonzero().T
        if self.padding_free:
            inputs, self.places = share_prefixes(batch)
        else:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            self.places = rows * batch["labels"].shape[1] + columns
        reply_ids = batch["labels"][:, 1:][supervised]
        targets = torch.full_like(inputs["input_ids"], IGNORE_INDEX).flatten()
        targets[self.places] = 0
        self.targets, self.reply_ids = targets.view_as(inputs["input_ids"]), reply_ids
        try:
            output = model(**inputs, use_cache=False).logits
        finally:
            self.targets = None
        if not self.head_is_chunked:
            output = -F.cross_entropy(output.flatten(0, 1)[self.places].float(), reply_ids, reduction="none")
        return torch.zeros(len(supervised), device=output.device).index_add(0, rows, output)

    def short_examples(self) -> list[dict]:
        """A few pairs with the end of their prompt and the beginning of their replies."""
        rows, pairs = self.trainer.train_dataset.select_columns(self.trainer.batch_columns), []
        for row in rows.select(range(min(3, len(rows)))):
            prompt_length, chosen_length = min(row["prompt_length"], 32), min(row["chosen_length"], 24)
            start, end = row["prompt_length"], row["prompt_length"] + row["chosen_length"]
            kept = row["input_ids"][start - prompt_length : start + chosen_length] + row["input_ids"][end : end + 24]
            pairs.append(row | {"input_ids": kept, "prompt_length": prompt_length, "chosen_length": chosen_length})
        return pairs

    def chunk_head(self, undo: ExitStack) -> None:
        """The head returns log-probabilities: inside its forward alone ZeRO-3 has gathered its weight."""
        head = self.trainer.model.get_output_embeddings()
        if type(head) is not nn.Linear or head.bias is not None:
            raise ValueError("the head does more than a matrix product")

        def forward(hidden_states: torch.Tensor) -> torch.Tensor:
            if self.targets is None:
                return type(head).forward(head, hidden_states)
            return ReplyLogProbabilities.apply(hidden_states.flatten(0, 1)[self.places], head.weight, self.reply_ids)

        self.replace_forward(undo, head, forward)
        undo.callback(setattr, self, "head_is_chunked", False)
        self.head_is_chunked = True

    def keep_examples_apart(self, undo: ExitStack) -> None:
        """Rows without padding, in which both replies see the prompt and neither sees the other."""
        model = self.trainer.model
        if not layers_attend_only(model.config):
            raise ValueError("tokens of this model meet elsewhere than in attention")
        if not model.is_backend_compatible():
            raise ValueError("this model has attention code of its own")
        undo.callback(model.set_attn_implementation, model.config._attn_implementation)
        model.set_attn_implementation("prefix_shared_sdpa")
        undo.callback(setattr, self, "padding_free", False)
        self.padding_free = True

    def refuse_contamination(self) -> None:
        """Raises ValueError where a rejected reply has another log-probability behind another chosen one."""
        (pair, *_) = self.short_examples()
        start, end = pair["prompt_length"], pair["prompt_length"] + pair["chosen_length"]
        ids, found = pair["input_ids"], []
        for chosen in (ids[start:end], ids[start:end][::-1]):
            other = pair | {"input_ids": [*ids[:start], *chosen, *ids[end:]]}
            batch = self.trainer._prepare_inputs(self.trainer.data_collator([other]))
            with torch.no_grad(), self.trainer.compute_loss_context_manager():
                found.append(self.log_probabilities(self.trainer.model, batch)[1])
        if not torch.allclose(*found, rtol=1e-3 if self.trainer.args.bf16 or self.trainer.args.fp16 else 1e-5):
            raise ValueError("a rejected reply reads the chosen one")
