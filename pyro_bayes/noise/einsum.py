"""The rule of `torch.einsum` with one Gaussian operand."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

import torch
from torch import Tensor

from pyro_bayes.noise.estimator import draw_linear, handed
from pyro_bayes.noise.gaussian_tensor import GaussianTensor, rule
from pyro_bayes.noise.local import LinearOperator


@rule(torch.einsum)
def _einsum(equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    which = [i for i, operand in enumerate(operands) if isinstance(operand, GaussianTensor)]
    indices = _indices(equation, operands) if isinstance(equation, str) else None
    if len(which) != 1 or len(operands) < 2 or indices is None:
        return NotImplemented
    (place,), (terms, output) = which, indices
    weight, own = operands[place], terms[place]
    others = [(o, t) for i, (o, t) in enumerate(zip(operands, terms, strict=True)) if i != place]
    sizes = _sizes(*zip(*others, strict=True))
    letters = [c for c in sizes if c in own or c in output]
    fits = all(sizes.get(c, n) == n for c, n in zip(own, weight.shape, strict=True))
    known = all(c in letters or c in output for c in own)
    if not (fits and known) or len(set(own)) < len(own) or not output:
        return NotImplemented

    # The examples come first. What neither the weight nor the output has is summed before: an
    # element of the weight must not be in one element of the output twice.
    example = _example(weight.noise, others[0][1], [c for c in output if c not in own], sizes)
    inner = "".join(sorted(letters, key=lambda c: c != example))
    outer = "".join(sorted(output, key=lambda c: c != example))
    factors = [handed("einsum", operand) for operand, _ in others]
    x = torch.einsum(f"{','.join(t for _, t in others)}->{inner}", *factors)
    into = {d: (0, inner.index(c) - len(inner)) for d, c in enumerate(own) if c not in output}
    out = {d: outer.index(c) - len(outer) for d, c in enumerate(own) if c in output}
    canonical = f"{inner},{own}->{outer}"

    def apply(x: Tensor, w: Tensor, _: Tensor | None) -> Tensor:
        return torch.einsum(canonical, x, w)

    product = LinearOperator(f"einsum {canonical}", apply, into, out)
    drawn = draw_linear(product, (x,), weight, example=None if example is None else 0)
    return drawn.permute([outer.index(c) for c in output])


def _indices(equation: str, operands: Sequence[Any]) -> tuple[list[str], str] | None:
    """Returns the indices of each operand and of the output, with letters for an ellipsis."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    free = [c for c in ascii_uppercase if c not in equation]
    terms, longest = left.split(","), ""
    if len(terms) != len(operands):
        return None
    for i, (term, operand) in enumerate(zip(terms, operands, strict=True)):
        count = operand.dim() - len(term.replace("...", ""))
        if count < 0 or count > len(free) or (count > 0 and "..." not in term):
            return None
        rest = "".join(free[len(free) - count :])
        longest = max(longest, rest, key=len)
        terms[i] = term.replace("...", rest)
    if not arrow:
        every = "".join(terms)
        once = sorted(c for c in set(every) if every.count(c) == 1 and c not in longest)
        return terms, longest + "".join(once)
    return terms, right.replace("...", longest)


def _sizes(operands: Sequence[Any], terms: Sequence[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for operand, term in zip(operands, terms, strict=True):
        for letter, size in zip(term, operand.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return sizes


def _example(noise: Any, term: str, candidates: Sequence[str], sizes: Any) -> str | None:
    """Returns the index that counts examples, if there is one."""
    alike = [c for c in candidates if c in term and sizes.get(c) == noise.batch_size]
    if alike:
        return alike[0]
    first = term[noise.batch_dim : noise.batch_dim + 1]
    return first if first in candidates and first else None
