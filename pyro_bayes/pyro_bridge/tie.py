"""The memory that a base's parameters share with the posterior means."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_bayes.base import ownership
from pyro_bayes.base.swap import Swap
from pyro_bayes.pyro_bridge.guide import MeanField


class Tie:
    """Keeps the included parameters of a base in the memory of the means, as their owner.

    Arguments:
        swap: The places of the base's parameters.
        guide: The posterior, their owner.
    """

    def __init__(self, swap: Swap, guide: MeanField) -> None:
        self._swap, self._guide = swap, guide
        self._tied: list[tuple[str, nn.Parameter, int]] = []
        self._addresses: dict[str, int] = {}

    def make(self) -> None:
        """Lets the parameters share the memory of the means, whatever they held."""
        memory = self._guide.memory
        memory.show()
        self._tied, self._addresses = [], memory.addresses
        for name, address in memory.addresses.items():
            parameter = self._swap.originals[name]
            if ownership.is_owner(self._guide, parameter):
                if parameter.data_ptr() != address:
                    parameter.data = memory.mean(name)
                self._tied.append((name, parameter, parameter.data_ptr()))

    def keep(self) -> None:
        """Takes over what was assigned to the `data` of parameters, and follows the means.

        Raises:
            RuntimeError: If what was assigned is of another shape, dtype or device.
        """
        if torch.compiler.is_compiling():
            return
        memory = self._guide.memory
        memory.show()
        moved = [(name, p) for name, p, address in self._tied if p.data_ptr() != address]
        if self._addresses is memory.addresses:
            if not moved:
                return
            for name, parameter in moved:
                if ownership.is_owner(self._guide, parameter):
                    self._take(name, parameter.data, memory.mean(name))
        self.make()

    def _take(self, name: str, values: Tensor, mean: Tensor) -> None:
        present, expected = (f"{tuple(t.shape)}, {t.dtype} on {t.device}" for t in (values, mean))
        if present != expected:
            raise RuntimeError(
                f"Expected the base's parameter '{name}' to stay of shape {expected}, as in the"
                f" posterior; got {present}. Convert the model, as in bnn.double(), not the base"
                " alone. If layers were resized, wrap the base in a new BayesianModel."
            )
        with torch.inference_mode(False), torch.no_grad():
            mean.copy_(values)
