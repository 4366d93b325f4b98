"""What stands in the parameters' place while a context is open."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pyro_bayes.noise.context import ContextNoise, Estimator
from pyro_bayes.noise.gaussian_tensor import GaussianTensor, Moment
from pyro_bayes.posterior import fused
from pyro_bayes.posterior.anchor import Anchor, Serves
from pyro_bayes.posterior.slopes import Kind

_KINDS: dict[Estimator, tuple[Kind, Moment]] = {
    "weights": ("draws", "draw"),
    "flipout": ("deviations", "change"),
    "local": ("variances", "variance"),
}


def of_posterior(
    posterior: Mapping[str, tuple[Tensor, Tensor]], noise: ContextNoise, serves: Serves = "all"
) -> tuple[dict[str, GaussianTensor], Anchor | None]:
    r"""Returns the Gaussian tensors of a posterior, and an anchor for its divergence.

    Arguments:
        posterior: The means :math:`\mu` and :math:`\log \sigma^2` by name.
        noise: The noise of the context.
        serves: Whether the anchor serves the divergence of all parameters or that of each.
    """
    kind, moment = _KINDS[noise.estimator]
    found, anchor = fused.outputs_and_anchor(kind, posterior, serves)
    values = {
        name: GaussianTensor.of(*q, name, noise, {moment: found[name]} if name in found else None)
        for name, q in posterior.items()
    }
    return values, anchor
