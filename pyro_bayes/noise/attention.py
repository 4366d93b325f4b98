"""The rule of multi-head attention, an operator with linear maps inside."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bayes.noise.estimator import handed, spread
from pyro_bayes.noise.gaussian_tensor import rule
from pyro_bayes.noise.linear import linear


@rule(F.multi_head_attention_forward)
def _attention(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Attends with projections that have their own rule; sequences come first, examples second."""
    if query.dim() not in (2, 3) or (is_causal and attn_mask is None):
        return NotImplemented
    batched = query.dim() == 3
    if not batched:
        same = key is query, value is key
        query = query.unsqueeze(1)
        key = query if same[0] else key.unsqueeze(1)
        value = key if same[1] else value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, count, width = query.shape

    if use_separate_proj_weight:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (
            linear(x, w, b, example=1)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
    elif query is key and key is value:
        q, k, v = linear(query, in_proj_weight, in_proj_bias, example=1).chunk(3, dim=-1)
    else:
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (
            linear(x, w, b, example=1)
            for x, w, b in zip((query, key, value), in_proj_weight.chunk(3), biases, strict=True)
        )

    causal = is_causal and key_padding_mask is None and not need_weights
    attn_mask = None if causal else _added(attn_mask, q)
    key_padding_mask = _added(key_padding_mask, q)
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.view(count, num_heads, *attn_mask.shape[1:])
    if bias_k is not None:
        k = torch.cat([k, spread("attention", bias_k, k.new_zeros(1, *k.shape[1:]), 1, [k])])
        v = torch.cat([v, spread("attention", bias_v, v.new_zeros(1, *v.shape[1:]), 1, [v])])
    q, k, v = (x.view(len(x), count, num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))
    k = (
        k
        if static_k is None
        else handed("attention", static_k).view(count, num_heads, *static_k.shape[1:])
    )
    v = (
        v
        if static_v is None
        else handed("attention", static_v).view(count, num_heads, *static_v.shape[1:])
    )
    if add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], dim=2) for x in (k, v))
    added = k.shape[2] - (0 if attn_mask is None else attn_mask.shape[-1])
    mask = None if attn_mask is None else F.pad(attn_mask, (0, added))
    if key_padding_mask is not None:
        added = k.shape[2] - key_padding_mask.shape[-1]
        padding = F.pad(key_padding_mask, (0, added))[:, None, None]
        mask = padding if mask is None else mask + padding

    dropout = dropout_p if training else 0.0
    shares = None
    if need_weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        shares = (scores if mask is None else scores + mask).softmax(-1)
        shares = F.dropout(shares, dropout) if dropout else shares
        attended = shares @ v
        shares = shares.mean(1) if average_attn_weights else shares
        shares = shares if batched else shares.squeeze(0)
    else:
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    attended = attended.permute(2, 0, 1, 3).reshape(length, count, width)
    output = linear(attended, out_proj_weight, out_proj_bias, example=1)
    return (output if batched else output.squeeze(1)), shares


def _added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Returns a mask as a term of the scores: a boolean one is -∞ where it is true."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
