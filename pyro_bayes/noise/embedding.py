"""Rules of embeddings, which look rows of a table up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bayes.noise.estimator import as_usable, example_dim, handed, noisy
from pyro_bayes.noise.gaussian_tensor import (
    GaussianTensor,
    mean_of,
    perturbation_of,
    rule,
    variance_of,
)
from pyro_bayes.posterior.rounding import wide


@rule(F.embedding)
def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    weight = as_usable("embedding", weight)
    if max_norm is not None or not isinstance(weight, GaussianTensor):
        return NotImplemented
    options = (padding_idx, None, norm_type, scale_grad_by_freq)
    mean = F.embedding(input, mean_of(weight), *options)
    example = example_dim((weight,), input, input.dim())

    def perturbation(count: int | None) -> Tensor:
        product = F.embedding(input, perturbation_of(weight), *options)
        if count is None:
            return product
        each = input.numel() // max(count, 1)
        indices = (input if example is None else input.movedim(example, 0)).reshape(count, each)
        rows, columns = weight.signs(0, count), weight.signs(1, count)
        turned = product if example is None else product.movedim(example, 0)
        signed = turned.reshape(count, each, product.shape[-1])
        if rows is not None:
            signed = signed * rows.gather(1, indices).unsqueeze(-1)
        if columns is not None:
            signed = signed * columns.unsqueeze(1)
        signed = signed.view(turned.shape)
        return signed if example is None else signed.movedim(0, example)

    output = noisy(
        "embedding",
        mean,
        [weight],
        inputs=[input],
        variance=lambda: F.embedding(input, variance_of(weight), *options),
        perturbation=perturbation,
        example=example,
    )
    if padding_idx is None or weight.noise.estimator == "flipout":
        return output
    # A variance of 0 stands for a small one in the noise, and a padding row is to be exact.
    padding = padding_idx % len(mean_of(weight))
    still = (input == padding).unsqueeze(-1) & (variance_of(weight)[padding] == 0)
    return torch.where(still, mean, output)


@rule(F.embedding_bag)
def _embedding_bag(
    input: Any,
    weight: Any,
    offsets: Any = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    weight = as_usable("embedding_bag", weight)
    if max_norm is not None or mode == "max" or not isinstance(weight, GaussianTensor):
        return NotImplemented
    per_sample_weights = handed("embedding_bag", per_sample_weights)
    if offsets is None:
        bags = torch.arange(len(input), device=input.device).repeat_interleave(input.shape[1])
        offsets = torch.arange(0, input.numel(), input.shape[1], device=input.device)
        count = len(input)
    else:
        starts = offsets[:-1] if include_last_offset else offsets
        count, offsets = len(starts), starts
        positions = torch.arange(len(input), device=input.device)
        bags = torch.searchsorted(starts, positions, right=True) - 1
    indices, first = input.reshape(-1), mean_of(weight)
    share = per_sample_weights
    share = first.new_ones(indices.shape) if share is None else share.reshape(-1)
    share = share.to(wide(share.dtype))  # half precision counts to 256, or to 2048
    if padding_idx is not None:
        share = share * (indices != padding_idx % len(first))
    if mode == "mean":
        share = share / share.new_zeros(count).index_add(0, bags, share).clamp_min(1)[bags]

    def total(table: Tensor, weights: Tensor) -> Tensor:
        weights = weights.to(table.dtype)
        return F.embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=weights)

    def variance() -> Tensor:
        # A row that is in a bag twice is one random number there, not two.
        pairs, where = torch.unique(bags * len(first) + indices, return_inverse=True)
        together = share.new_zeros(len(pairs)).index_add(0, where, share)[where]
        return total(variance_of(weight), share * together)

    def perturbation(count: int | None) -> Tensor:
        if count is None:
            return total(perturbation_of(weight), share)
        rows, columns = weight.signs(0, count), weight.signs(1, count)
        signed = total(
            perturbation_of(weight), share if rows is None else share * rows[bags, indices]
        )
        return signed if columns is None else signed * columns

    mean = total(first, share)
    output = noisy(
        "embedding_bag",
        mean,
        [weight],
        inputs=[indices, share],
        variance=variance,
        perturbation=perturbation,
        example=0,
    )
    # As above, for bags of nothing but padding.
    used = share.new_zeros(count).index_add(0, bags, share.detach().abs()) > 0
    return torch.where(used.unsqueeze(-1), output, mean)
