"""The error of a statistic, from what it becomes when its data are drawn again, and again."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor


class Bootstrap:
    r"""Views of :math:`n` elements: each once, and :math:`R` times as many, drawn again.

    The deviation of a statistic over the latter is its standard error, itself accurate to about
    :math:`1 / \sqrt{2 R}` of it, also where the statistic is not smooth, as an accuracy.

    Arguments:
        size: The number :math:`n` of elements, at least 2.
        replicates: The number :math:`R` of views beside the first.
        seed: The seed of their choice.

    References:
        | Bootstrap Methods: Another Look at the Jackknife (Efron, 1979)
        | https://doi.org/10.1214/aos/1176344552

    Example:
        >>> x = torch.arange(100.0)
        >>> bootstrap = Bootstrap(100, replicates=1000, seed=0)
        >>> error = bootstrap.error(bootstrap.means(x))
        >>> bool((error / (x.std() / 10) - 1).abs() < 0.1)
        True
    """

    def __init__(self, size: int, *, replicates: int, seed: int) -> None:
        self.size, self.views = size, 1 + replicates
        self._seed = seed

    def indices(self, view: int) -> Tensor:
        """Returns the elements of a view, of shape :math:`(n)`.

        Arguments:
            view: The number of the view, 0 for each element once.
        """
        if view == 0:
            return torch.arange(self.size)
        generator = torch.Generator().manual_seed(self._seed + view)
        return torch.randint(self.size, (self.size,), generator=generator)

    def weights(self, like: Tensor) -> Tensor:
        """Returns the share of each element in each view, of shape :math:`(1 + R, n)`.

        Arguments:
            like: A tensor of the dtype and the device.
        """
        return self._counts.to(like) / self.size

    def means(self, x: Tensor) -> Tensor:
        """Computes the mean of each view.

        Arguments:
            x: Finite numbers, of shape :math:`(n, *)`.

        Returns:
            The means, of shape :math:`(1 + R, *)`.
        """
        # Relative to the first element: what does not vary is returned without rounding.
        moves: Tensor = torch.tensordot(self.weights(x), x - x[0], 1)
        return x[0] + moves

    def log_means(self, x: Tensor) -> Tensor:
        """Computes the logarithm of the mean exponential of each view.

        Arguments:
            x: Logarithms, of shape :math:`(n, *)`.

        Returns:
            The logarithms of the means, of shape :math:`(1 + R, *)`.
        """
        logs = self.weights(x).log().view(self.views, self.size, *[1] * (x.dim() - 1))
        return torch.stack([(x + log).logsumexp(0) for log in logs])

    def pair_means(self, kernel: Callable[..., Tensor], *x: Tensor) -> Tensor:
        """Computes the mean over all pairs of each view, of an element and itself included.

        Arguments:
            kernel: A function of two elements, elementwise in the other dimensions: of `(a, b)` for
                one tensor, of `(a, c, b, d)` for two.
            x: Tensors of shape :math:`(n, *)` that make up the elements.

        Returns:
            The means, of shape :math:`(1 + R, *)`.
        """
        weights, means = self.weights(x[0]), x[0].new_zeros(self.views, *x[0].shape[1:])
        for weight, *element in zip(weights.T, *x, strict=True):
            rows = torch.tensordot(weights, kernel(*x, *element), 1)
            means += weight.view(-1, *[1] * (means.dim() - 1)) * rows
        return means

    @staticmethod
    def error(statistic: Tensor) -> Tensor:
        """Computes the standard error of a statistic.

        Arguments:
            statistic: Its value of each view, of shape :math:`(1 + R, *)`.

        Returns:
            The error, of shape :math:`(*)`.
        """
        return statistic[1:].std(0)

    @cached_property
    def _counts(self) -> Tensor:
        views = map(self.indices, range(self.views))
        return torch.stack([view.bincount(minlength=self.size) for view in views])
