"""The Pyro front end: a base whose parameters are the sites of a Pyro model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from pyro.poutine.runtime import am_i_wrapped

from pyro_bayes.noise.context import context_noise
from pyro_bayes.noise.gaussian_tensor import GaussianTensor, drawn
from pyro_bayes.pyro_bridge import store
from pyro_bayes.pyro_bridge.exact_kl import ExactKL
from pyro_bayes.pyro_bridge.particles import LiftMessenger, Particles, stack
from pyro_bayes.pyro_bridge.prior import distinct_sites
from pyro_bayes.pyro_bridge.regularized import RegularizedModule


class LiftedModule(RegularizedModule):
    """A base, its prior and its guide, with the calls that a Pyro model needs."""

    @contextmanager
    def lift(self, *, event_dim: int | None = None) -> Iterator[Any]:
        """Makes the sample statements of a Pyro model, and holds the values in the base.

        There is one statement per included parameter, of its dotted name (behind the model's name
        and a dot, if it has one), and one `pyro.param` statement per deterministic parameter that
        trains. Open it once per run of the model, outside of plates, and call the network as often
        as needed. Inference and prediction use the guide's draws; a model that is simply called
        draws from the prior. Whatever the network computes lazily must be computed inside, except
        for the densities of :class:`pyro.contrib.zuko.ZukoToPyro` sites, which are.

        When Pyro vectorises over draws (`vectorize_particles=True`, or `parallel=True` in
        :class:`pyro.infer.Predictive`), calls of the network are batched by :func:`torch.vmap`, and
        its outputs get the particles' dimension to the left of the plates'.

        Arguments:
            event_dim: The number of dimensions on the right of an output that belong to no plate.
                By default, an output has a dimension for the model's plate, or is a scalar. It
                must be given to vectorise a model with nested plates.

        Yields:
            The base. When Pyro vectorises, a callable that stands for it.

        Raises:
            RuntimeError: If the model already made these statements.
            ValueError: If it is used inside a plate.

        Example:
            >>> import pyro.distributions as dist
            >>> from pyro.infer import SVI, Trace_ELBO
            >>> from pyro_bayes import BayesianModel
            >>> bnn = BayesianModel(nn.Linear(3, 1))
            >>> def model(x, y=None):
            ...     with bnn.lift() as net:
            ...         mean = net(x).squeeze(-1)
            ...     with pyro.plate("data", len(x)):
            ...         pyro.sample("y", dist.Normal(mean, 0.1), obs=y)
            >>> svi = SVI(model, bnn.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
            >>> loss = svi.step(torch.randn(5, 3), torch.randn(5))
        """
        with self.lock(), LiftMessenger(self._guide.sites) as messenger:
            self._keep_tied()
            with distinct_sites():
                values = self._prior()
            for site in messenger.observed:
                values[self._guide.sites[site]] = drawn(values[self._guide.sites[site]])
            for name, parameter in self._deterministic().items():
                values[name] = store.statement(self._store_key(name), parameter)
            values, batched = stack(values, self.swap.originals)
            if batched:
                yield Particles(
                    self._base, self.hold, values, batched, messenger.depth or 0, event_dim,
                    sites=[*self._guide.sites, *self._guide.scale_sites],
                    filters=messenger.filters, look=self._look,
                )  # fmt: skip
            else:
                kept = (v.noise for v in values.values() if isinstance(v, GaussianTensor))
                with self.hold(values, next(kept, None)) as base:
                    yield base

    def exact_kl(
        self,
        local_trick: bool | Literal["flipout"] = False,
        *,
        batch_dim: int = 0,
        check_examples: bool = True,
    ) -> ExactKL:
        r"""Returns a guide for SVI with which the ELBO has the exact KL divergence.

        With :class:`pyro.infer.Trace_ELBO`, the divergence is otherwise estimated by
        :math:`\log q(\theta) - \log p(\theta)` at the draw. The expected ELBO is the same, its
        variance is lower, and plates, scales and masks hold. The lifted base is one draw of the
        weights or, if asked, has local noise or flipout, as in :meth:`reparameterize`, with
        :class:`pyro.infer.TraceMeanField_ELBO` as well. It trains the parameters of `guide`.

        Where Pyro enumerates, the weights are drawn under each estimator, with a warning: outputs
        that share an enumerated variable need their joint distribution.

        Scale or mask the model and the guide alike, and let the model sample each site from its own
        prior: all else is refused. So are importance weights, as in :class:`pyro.infer.RenyiELBO`
        or :class:`pyro.infer.Importance`, which need densities of draws and hence `guide` itself.
        :class:`pyro.infer.Predictive` gets draws.

        Warning:
            What asks for the model's densities alone, such as the prior term of
            :class:`pyro.infer.EnergyDistance`, gets minus the divergence instead of
            :math:`\log p(\theta)`. So does a single weight that is never exponentiated.

        Arguments:
            local_trick: The estimator: `False`, `True` or `"flipout"`.
            batch_dim: The dimension of inputs that counts examples, 1 if they have time first.
            check_examples: Whether to look if examples meet, as in :meth:`reparameterize`.

        Returns:
            The guide, a function that takes any arguments.

        Raises:
            ValueError: If `local_trick` or `batch_dim` is none of the above.

        Example:
            >>> import pyro.distributions as dist
            >>> from pyro.infer import SVI, Trace_ELBO
            >>> from pyro_bayes import BayesianModel
            >>> bnn = BayesianModel(nn.Linear(3, 1))
            >>> def model(x, y=None):
            ...     with bnn.lift() as net, pyro.plate("data", len(x)):
            ...         pyro.sample("y", dist.Normal(net(x).squeeze(-1), 0.1), obs=y)
            >>> guide = bnn.exact_kl(local_trick=True)
            >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
            >>> loss = svi.step(torch.randn(5, 3), torch.randn(5))
        """
        return ExactKL(self._guide, context_noise(local_trick, batch_dim, check_examples))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Lifts the base and calls it, inside a Pyro model.

        Arguments:
            args: The positional arguments of the base.
            kwargs: The keyword arguments of the base.

        Returns:
            What the base returns.

        Raises:
            RuntimeError: If no Pyro handler is active.
        """
        if not am_i_wrapped():
            raise RuntimeError(
                "Expected a call inside a Pyro model; got one outside, where it is not said which"
                " parameters to use. Use `with bnn.reparameterize() as model:` to train or predict"
                " with one draw, `bnn.sample_model()` for a sampled copy, `bnn.sample_params()` for"
                " the draws alone, or `with bnn.lift() as net:` in a Pyro model"
                " (`bnn.kl_divergence()` is the divergence, `bnn.base` the posterior-mean network)."
            )
        with self.lift() as net:
            return net(*args, **kwargs)
