"""The facade: a base, its prior and its guide, behind a few calls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn

from pyro_bayes import gaussian, store
from pyro_bayes.guide import MeanField
from pyro_bayes.lift import LiftMessenger, Particles, stack
from pyro_bayes.local import GaussianTensor, LocalNoise
from pyro_bayes.prior import GaussianPrior, distinct_sites
from pyro_bayes.selection import select
from pyro_bayes.summary import Row, Summary
from pyro_bayes.tied import TiedModule


class BayesianModel(TiedModule):
    r"""Makes a module Bayesian: a mean-field Gaussian posterior over its parameters.

    .. math:: q(\theta) = \prod_i \mathcal{N}(\theta_i \mid \mu_i, \sigma_i^2), \qquad
              p(\theta) = \prod_i \mathcal{N}(\theta_i \mid 0, \sigma_p^2)

    The means :math:`\mu_i` start at the base's own parameters, and :math:`\log \sigma_i^2` at
    `init_logvar`. Both are learned, by maximising the evidence lower bound (ELBO)

    .. math:: \mathcal{L} = \mathbb{E}_{q(\theta)}[\log p(y \mid x, \theta)]
              - D_{KL}(q(\theta) \,\|\, p(\theta)),

    through :meth:`lift` and Pyro's SVI, or through :meth:`reparameterize` and a plain PyTorch
    loop. Both train the same parameters; give the optimiser `bnn.parameters()`. The base keeps its
    class and structure; its included parameters share their storage with the means, so that `base`
    is the posterior-mean network whenever no context is open. Attributes that are not found here
    are looked up in the base.

    Arguments:
        base: The module. Its parameters must have been initialised.
        init_logvar: The initial value of :math:`\log \sigma_i^2`. It moves by about the learning
            rate at each step of Adam, so that a posterior as wide as the prior is thousands of
            steps away from the default, a deviation of 0.011; -5 is nearer.
        include_params: Patterns of parameter names to include. A pattern matches the names that
            start with it; in it, `*` stands for `[A-Za-z0-9_]+` and `**` for `[A-Za-z0-9_.]+`. A
            `-` in a name is matched by a literal `-`. By default, all parameters are included.
        exclude_params: Patterns of parameter names to exclude. These stay deterministic.
        prior_var: The variance :math:`\sigma_p^2` of the prior. Of the order of one over the number
            of inputs of a layer, it keeps what the network computes under the prior of order one.
        name: What stands in front of the names of the sites, and of the parameters in Pyro's param
            store, where a name that another living model has gets a number. Two models in one
            Pyro model need names. By default, sites bear the parameters' own names, and the store
            knows the model by its class.

    Attributes:
        base: The module.
        prior: The prior, a Pyro module with one sample site per included parameter.
        guide: The posterior, a Pyro guide.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, or a pattern matches nothing.

    References:
        | Weight Uncertainty in Neural Networks (Blundell et al., 2015)
        | https://arxiv.org/abs/1505.05424

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> bnn = BayesianModel(net, init_logvar=-9.0)
        >>> x, y, dataset_size = torch.randn(5, 3), torch.randn(5, 1), 100
        >>> with bnn.reparameterize() as model:
        ...     nll = nn.functional.mse_loss(model(x), y)
        >>> loss = nll + bnn.kl_divergence() / dataset_size
        >>> loss.backward()
    """

    def __init__(
        self,
        base: nn.Module,
        init_logvar: float = -9.0,
        include_params: str | Sequence[str] = ("",),
        exclude_params: str | Sequence[str] = (),
        *,
        prior_var: float = 1.0,
        name: str | None = None,
    ) -> None:
        _check_base(base)
        if not _is_number(init_logvar) or not math.isfinite(init_logvar):
            raise ValueError(f"Expected init_logvar to be a finite number; got {init_logvar!r}.")
        _check_prior_var(prior_var)
        if name is not None and not (isinstance(name, str) and name):
            raise ValueError(f"Expected name to be a non-empty string or None; got {name!r}.")

        choices = select(base, include_params, exclude_params)
        parameters = dict(base.named_parameters())
        included = {c.name: parameters[c.name] for c in choices if c.included}
        prior = GaussianPrior(included, variance=float(prior_var), site_prefix=name or "")
        guide = MeanField(
            prior,
            included,
            init_logvar=float(init_logvar),
            store_name=name or type(self).__name__,
            site_prefix=name or "",
        )
        super().__init__(base, prior, guide, choices)
        self._prior_var = float(prior_var)

    # Draws

    def sample_params(self) -> dict[str, Tensor]:
        r"""Returns model parameters sampled from the posterior.

        .. math:: \theta_i = \mu_i + \sigma_i \epsilon_i, \quad \epsilon_i \sim \mathcal{N}(0, 1)

        Gradients flow to the posterior's parameters.

        Returns:
            The draws by parameter name, of the parameters' shapes.

        Example:
            >>> bnn = BayesianModel(nn.Linear(3, 1))
            >>> {name: tuple(draw.shape) for name, draw in bnn.sample_params().items()}
            {'weight': (1, 3), 'bias': (1,)}
        """
        posterior = self._guide.posterior()
        return {name: gaussian.draw(*q) for name, q in posterior.items()}

    def sample_model(self) -> nn.Module:
        """Returns a standalone copy of the base with parameters sampled from the posterior.

        The copy can be used like the base, and all its included parameters train.

        Warning:
            Gradients do not flow from the copy to the posterior. Use :meth:`reparameterize` for
            training.

        Returns:
            The sampled model.

        Example:
            >>> bnn = BayesianModel(nn.Linear(3, 1))
            >>> bnn.sample_model()
            Linear(in_features=3, out_features=1, bias=True)
        """
        with self._lock(), torch.no_grad():
            draws = self.sample_params()
            model = self._swap.copy()
            parameters = dict(model.named_parameters())
            for name, draw in draws.items():
                parameters[name].copy_(draw)
                parameters[name].requires_grad_()
        return model

    @contextmanager
    def reparameterize(self, local_trick: bool = False) -> Iterator[nn.Module]:
        """Reparameterizes the base from the posterior while the context is open.

        Within the context, the base behaves deterministically: the same inputs give the same
        outputs, and gradients flow to the posterior's parameters. The base is given back on the way
        out, also by exception. Contexts of one model nest; the innermost counts. Threads wait for
        each other.

        Warning:
            Call the network inside. After the context, it is the posterior-mean network, and passes
            no gradient. A flow computes its density with the network, so `flow(c).log_prob(x)` must
            be inside as well. What needs outputs only, as a loss and the backward pass, may come
            after, unless the base computes again in the backward pass (activation checkpointing,
            some flows).

        Arguments:
            local_trick: Whether linear layers sample their outputs from the distribution that the
                posterior induces, instead of their weights, which lowers the variance of
                gradients. Operators without a rule for it use one draw of their parameters. The
                noise belongs to the position of an example in the batch, so that it is independent
                between the examples, and between the positions of a sequence.

        Yields:
            The reparameterized base.

        Raises:
            TypeError: If `local_trick` is neither `True` nor `False`.
            RuntimeError: If the base has lost or replaced one of its parameters.

        References:
            | Variational Dropout and the Local Reparameterization Trick (Kingma et al., 2015)
            | https://arxiv.org/abs/1506.02557

        Example:
            >>> bnn, x = BayesianModel(nn.Linear(3, 1)), torch.randn(5, 3)
            >>> with bnn.reparameterize(local_trick=True) as model:
            ...     bool((model(x) == model(x)).all())
            True
        """
        if not isinstance(local_trick, bool):
            raise TypeError(f"Expected local_trick to be True or False; got {local_trick!r}.")
        with self._lock():
            values: Mapping[str, Tensor]
            if local_trick:
                noise = LocalNoise()
                posterior = self._guide.posterior()
                values = {n: GaussianTensor.of(*q, n, noise) for n, q in posterior.items()}
            else:
                values = self.sample_params()
            with self._hold(values) as base:
                yield base

    def kl_divergence(self, prior_var: float | None = None) -> Tensor:
        r"""Computes the KL divergence between the posterior and the prior in closed form.

        .. math:: D_{KL}(q(\theta) \,\|\, p(\theta)) = \frac{1}{2} \sum_i \left[
                  \frac{\sigma_i^2 + \mu_i^2}{\sigma_p^2} - 1
                  - \log \frac{\sigma_i^2}{\sigma_p^2} \right]

        It is a sum over all included parameters, to be added to the negative log-likelihood of a
        whole dataset of N points, or divided by N and added to the mean over points. N is the size
        of the dataset also with minibatches.

        Arguments:
            prior_var: The variance :math:`\sigma_p^2` of the prior, that of the model by default.

        Returns:
            The divergence in nats, a 0-dim tensor.

        Raises:
            ValueError: If `prior_var` is not positive.

        Example:
            >>> bnn = BayesianModel(nn.Linear(3, 1), init_logvar=0.0)
            >>> nn.init.zeros_(bnn.base.weight), nn.init.zeros_(bnn.base.bias)
            (...)
            >>> bnn.kl_divergence()
            tensor(0., grad_fn=<...>)
        """
        if prior_var is None:
            prior_var = self._prior_var
        _check_prior_var(prior_var)
        posterior = self._guide.posterior().values()
        terms = [gaussian.kl_divergence(*q, prior_var=float(prior_var)) for q in posterior]
        kl = terms[0]
        for term in terms[1:]:
            kl = kl + term.to(kl.device)
        dtypes = {mean.dtype for mean, _ in posterior}
        return kl.to(dtypes.pop()) if len(dtypes) == 1 else kl

    # Pyro

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
            >>> bnn = BayesianModel(nn.Linear(3, 1))
            >>> def model(x, y=None):
            ...     with bnn.lift() as net:
            ...         mean = net(x).squeeze(-1)
            ...     with pyro.plate("data", len(x)):
            ...         pyro.sample("y", dist.Normal(mean, 0.1), obs=y)
            >>> svi = SVI(model, bnn.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
            >>> loss = svi.step(torch.randn(5, 3), torch.randn(5))
        """
        with self._lock(), LiftMessenger(self._guide.sites) as messenger:
            with distinct_sites():
                values = self._prior()
            for name, parameter in self._deterministic().items():
                values[name] = store.statement(self._store_key(name), parameter)
            values, batched = stack(values, self._swap.originals)
            if batched:
                depth = messenger.depth or 0
                yield Particles(self._base, self._swap, values, batched, depth, event_dim)
            else:
                with self._hold(values) as base:
                    yield base

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

    def summary(self) -> Summary:
        r"""Prints a table of the parameters.

        Its columns are the name, the shape, whether the parameter is included and by which
        pattern, the prior, and the current mean of :math:`|\mu| / \sigma`.

        Returns:
            The table; its `rows` can be read.

        Raises:
            ImportError: If the extra `rich` is not installed.

        Example:
            >>> rows = BayesianModel(nn.Linear(3, 1), exclude_params="bias").summary().rows
            <BLANKLINE>
            ...
            >>> [row.parameter for row in rows if row.included]
            ['weight']
        """
        posterior = self.guide.posterior()
        rows = []
        for choice in self._choices:
            signal = None
            parameter = self._swap.originals[choice.name]
            prior = "none, trains" if parameter.requires_grad else "none, fixed"
            if choice.included:
                mean, logvar = (p.detach() for p in posterior[choice.name])
                signal = (mean.abs() * (-0.5 * logvar).exp()).mean().item()
                prior = f"N(0, {self._prior_var:g})"
            name = " = ".join((choice.name, *choice.aliases))
            rows.append(
                Row(name, tuple(parameter.shape), choice.included, choice.reason, prior, signal)
            )
        count = sum(math.prod(row.shape) for row in rows if row.included)
        summary = Summary(
            f"{type(self).__name__} of {type(self._base).__name__}:"
            f" {count} Bayesian parameters, '{self._guide.store_name}' in the param store",
            rows,
        )
        summary.print()
        return summary


def _check_base(base: Any) -> None:
    if not isinstance(base, nn.Module):
        raise TypeError(f"Expected base to be an nn.Module; got {type(base).__name__}.")
    for name, module in base.named_modules():
        where = f"'{name}' in it" if name else "it"
        if isinstance(module, TiedModule):
            raise TypeError(
                f"Expected a base whose parameters are not Bayesian yet; got {where}, a"
                f" {type(module).__name__}. Wrap its own base, or use the two side by side."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"Expected a base in Python; got {where}, a {type(module).__name__}, whose"
                " parameters TorchScript has fixed. Wrap the module before scripting it."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_prior_var(prior_var: Any) -> None:
    if not _is_number(prior_var) or not 0 < prior_var < math.inf:
        raise ValueError(f"Expected prior_var to be a positive, finite number; got {prior_var!r}.")
