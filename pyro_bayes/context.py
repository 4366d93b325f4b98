"""What stands in the parameters' place while a context is open."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pyro_bayes import fused
from pyro_bayes.anchor import Anchor
from pyro_bayes.gaussian_tensor import GaussianTensor
from pyro_bayes.noise import ContextNoise, Estimator
from pyro_bayes.slopes import Kind

_KINDS: dict[Estimator, Kind] = {
    "weights": "draws",
    "flipout": "deviations",
    "local": "variances",
}


def of_posterior(
    posterior: Mapping[str, tuple[Tensor, Tensor]], noise: ContextNoise
) -> tuple[dict[str, GaussianTensor], Anchor | None]:
    r"""Returns the Gaussian tensors of a posterior, and an anchor for its divergence.

    Arguments:
        posterior: The means :math:`\mu` and :math:`\log \sigma^2` by name.
        noise: The noise of the context.
    """
    known: dict[str, dict[str, Tensor]] = {"draws": {}, "deviations": {}, "variances": {}}
    kind = _KINDS[noise.estimator]
    known[kind], anchor = fused.outputs_and_anchor(kind, posterior)
    draws, deviations, spreads = known.values()
    values = {
        name: GaussianTensor.of(
            *q,
            name,
            noise,
            draw=draws.get(name),
            deviation=deviations.get(name),
            spread=spreads.get(name),
        )
        for name, q in posterior.items()
    }
    return values, anchor
