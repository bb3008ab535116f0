"""Attention on a CPU in bfloat16, by matrix products over slices of the queries.

PyTorch's own kernel takes two to three times as long as the products that it is made of. While `QuickAttention()` is
entered, calls of `scaled_dot_product_attention` that can be served here are; all others go on as they are.

Scores are rounded to bfloat16. Keys are centred first: a shift of all keys shifts a query's scores alike, which softmax
does not see, and without what keys have in common scores are small and lose little (SageAttention, arXiv 2410.02367).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

SLICE = 256  # queries at once: their scores stay in the cache, and most of what causality hides is not computed


class QuickAttention(TorchFunctionMode):
    """While entered, serves what it can of `torch.nn.functional.scaled_dot_product_attention`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            found = _served(*args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


def _served(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    """The attention [batch, heads, queries, channels], or None where PyTorch's own has to do it."""
    tensors = (query, key, value)
    if any(t.dtype != torch.bfloat16 or t.device.type != "cpu" or t.dim() != 4 or not t.numel() for t in tensors):
        return None
    batch, heads, queries, _ = query.shape
    groups, keys = key.shape[1:3]
    alike = key.shape[0] == value.shape[0] == batch and value.shape[1:3] == (groups, keys)
    if dropout_p or not alike or heads % groups or (groups != heads and not enable_gqa):
        return None
    if is_causal and (attn_mask is not None or queries != keys):
        return None
    if attn_mask is not None and not _is_plain(attn_mask, (batch, heads, queries, keys)):
        return None
    layout = _Layout(batch, groups, heads // groups, queries, keys, is_causal)
    return _Attention.apply(query, key, value, attn_mask, layout, query.shape[-1] ** -0.5 if scale is None else scale)


def _is_plain(mask: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a mask is one for all batches or heads or each, needs no gradient, and hides no query's every key."""
    fits = mask.dim() == 4 and mask.shape[2:] == shape[2:]
    if not fits or mask.shape[0] not in (1, shape[0]) or mask.shape[1] not in (1, shape[1]) or mask.requires_grad:
        return False
    return bool(mask.any(-1).all()) if mask.dtype == torch.bool else mask.is_floating_point()


@dataclass(frozen=True)
class _Layout:
    """Sizes of a call. Heads that share keys are rows of one product: [batch · groups, heads of a group · queries]."""

    batch: int
    groups: int
    sharing: int
    queries: int
    keys: int
    causal: bool

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """(queries, keys that they may see)"""
        for begin in range(0, self.queries, SLICE):
            end = min(begin + SLICE, self.queries)
            yield slice(begin, end), slice(0, end if self.causal else self.keys)

    def rows(self, tensor: torch.Tensor, part: slice) -> torch.Tensor:
        """[batch, heads, queries, channels] → [batch · groups, sharing · part, channels]"""
        cut = tensor[:, :, part].reshape(self.batch * self.groups, self.sharing, -1, tensor.shape[-1])
        return cut.flatten(1, 2)

    def heads(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` undone: [batch, heads, part, channels]"""
        return rows.view(self.batch, self.groups * self.sharing, -1, rows.shape[-1])

    def probabilities(self, query, keys, mask, queries: slice, seen: slice, scale: float) -> torch.Tensor:
        """[batch · groups, sharing · queries, keys seen]"""
        scores = torch.bmm(self.rows(query, queries) * scale, keys[:, seen].transpose(1, 2))
        each = scores.view(self.batch, self.groups * self.sharing, -1, scores.shape[-1])
        if self.causal:
            count = each.shape[2]
            each[..., -count:] += torch.full((count, count), float("-inf"), dtype=each.dtype).triu_(1)
        elif mask is not None and mask.dtype == torch.bool:
            each.masked_fill_(~mask[:, :, queries], float("-inf"))
        elif mask is not None:
            each += mask[:, :, queries]
        return torch.softmax(scores, -1)


class _Attention(torch.autograd.Function):
    """softmax(scale · Q Kᵀ + mask) V; the backward computes the probabilities again instead of keeping them."""

    @staticmethod
    def forward(ctx, query, key, value, mask, layout, scale):
        keys, values = _centred(key), value.flatten(0, 1)
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        for queries, seen in layout.slices():
            p = layout.probabilities(query, keys, mask, queries, seen, scale)
            out[:, :, queries] = layout.heads(torch.bmm(p, values[:, seen]))
        ctx.save_for_backward(query, key, value, mask)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, mask = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        keys, values = _centred(key), value.flatten(0, 1)
        grad_query = torch.empty_like(query)
        grad_keys, grad_values = (torch.zeros(t.shape, dtype=torch.float32) for t in (keys, values))
        for queries, seen in layout.slices():
            p = layout.probabilities(query, keys, mask, queries, seen, scale)
            g = layout.rows(grad, queries)
            grad_values[:, seen] += torch.bmm(p.transpose(1, 2), g)
            grad_p = torch.bmm(g, values[:, seen].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_query[:, :, queries] = layout.heads(torch.bmm(grad_scores, keys[:, seen])).mul_(scale)
            # Each row of these gradients sums to zero, so the centring needs none of its own.
            grad_keys[:, seen] += torch.bmm(grad_scores.transpose(1, 2), layout.rows(query, queries)).mul_(scale)
        found = (t.view(like.shape).to(like.dtype) for t, like in ((grad_keys, key), (grad_values, value)))
        return grad_query, *found, None, None, None


def _centred(key: torch.Tensor) -> torch.Tensor:
    """[batch · groups, keys, channels] less the mean key."""
    flat = key.flatten(0, 1).float()
    return (flat - flat.mean(1, keepdim=True)).to(key.dtype)
