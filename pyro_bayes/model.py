"""The facade: a base, its prior and its guide, behind a few calls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from pyro_bayes.base.checks import check_base, is_number
from pyro_bayes.base.fixed import FixedElements
from pyro_bayes.base.selection import select
from pyro_bayes.noise.context import ContextNoise, context_noise
from pyro_bayes.noise.tensors import held_values
from pyro_bayes.posterior.memory import Leaves
from pyro_bayes.prediction.inspection import InspectedModule
from pyro_bayes.prediction.module import PredictingModule
from pyro_bayes.priors.choice import PriorLike, PriorVar, choose_priors
from pyro_bayes.priors.priors import total
from pyro_bayes.pyro_bridge.guide import MeanField
from pyro_bayes.pyro_bridge.prior import PriorModule


class BayesianModel(InspectedModule):
    r"""Makes a module Bayesian: a mean-field Gaussian posterior over its parameters.

    .. math:: q(\theta) = \prod_i \mathcal{N}(\theta_i \mid \mu_i, \sigma_i^2), \qquad
              p(\theta) = \prod_i \mathcal{N}(\theta_i \mid 0, \sigma_p^2) \;\text{or any other}

    The means :math:`\mu_i` start at the base's own parameters, and :math:`\log \sigma_i^2` at
    `init_logvar`. Both are learned, by maximising the evidence lower bound (ELBO)

    .. math:: \mathcal{L} = \mathbb{E}_{q(\theta)}[\log p(y \mid x, \theta)]
              - D_{KL}(q(\theta) \,\|\, p(\theta)),

    through :meth:`lift` and Pyro's SVI, or through :meth:`reparameterize` and a plain PyTorch
    loop. Both train the same parameters; give the optimiser `bnn.parameters()`. The base keeps its
    class and structure; its included parameters share their memory with the means, so that `base`
    is the posterior-mean network whenever no context is open. Attributes that are not found here
    are looked up in the base.

    Parameters in half precision have a posterior in single, and the base has draws and means in its
    own dtype and memory: `base` shows the means rounded, and takes over what you write to it. A
    reference that you kept to the network is as new as the last context or the last look at `base`.
    `bnn.half()` converts the base alone.

    Arguments:
        base: The module. Its parameters must have been initialised.
        init_logvar: The initial value of :math:`\log \sigma_i^2`. It moves by about the learning
            rate at each step of Adam, so that a posterior as wide as the prior is thousands of
            steps away from the default, a deviation of 0.011; -5 is nearer.
        include_params: Patterns of parameter names to include. A pattern matches the names that
            start with it; in it, `*` stands for `[A-Za-z0-9_]+` and `**` for `[A-Za-z0-9_.]+`. A
            `-` in a name is matched by a literal `-`. By default, all parameters that train are
            included. A frozen parameter (`requires_grad=False`) is included if a pattern other
            than `""` matches it. Included ones are frozen while their model lives: freezing them in
            the base later has no effect. Freeze those of `means` and `logvars` with named `leaves`,
            or exclude them from a new model.
        exclude_params: Patterns of parameter names to exclude. These stay deterministic.
        prior_var: The variance :math:`\sigma_p^2` of a Gaussian prior around 0, 1 by default. One
            over the number of inputs of a layer is too small for most networks. `"empirical"` is
            for each tensor the variance, 0.3 or larger, that maximises the ELBO at every moment,
            see :class:`pyro_bayes.priors.Empirical`. In a mapping from patterns to any of
            these, as `{"0.*": 0.1, "": "empirical"}`, the first pattern that matches counts.
        prior: Any other prior: a Pyro distribution of one element, as `dist.Laplace(0.0, 0.1)`; a
            function of name and parameter that returns one, also of the parameter's shape; one of
            :mod:`pyro_bayes.priors`; a former posterior, see :meth:`as_prior`; or a mapping from
            patterns to these, likewise. It takes the place of `prior_var`.
        name: The prefix of the names of the sites, and of the parameters in Pyro's param store,
            where a name that another living model has gets a number. Two models in one Pyro model
            need names. By default, sites have none, and the store knows the model by its class.
        leaves: What optimisers see. `"flat"`: all means as one parameter, all log-variances as
            another, which is fastest. `"named"`: one pair per parameter of the base, to freeze by
            name, and for hooks, optimisers that look at shapes, and Pyro's per-name arguments.
            `means` and `logvars` have the parameters' names in either case.

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
        prior_var: PriorVar | None = None,
        prior: PriorLike | None = None,
        name: str | None = None,
        leaves: Leaves = "flat",
    ) -> None:
        """Makes the model, whose class describes the arguments."""
        check_base(base, PredictingModule)
        if not is_number(init_logvar) or not math.isfinite(init_logvar):
            raise ValueError(f"Expected init_logvar to be a finite number; got {init_logvar!r}.")
        if name is not None and not (isinstance(name, str) and name):
            raise ValueError(f"Expected name to be a non-empty string or None; got {name!r}.")
        if leaves not in ("flat", "named"):
            raise ValueError(f"Expected leaves to be 'flat' or 'named'; got {leaves!r}.")

        choices = select(base, include_params, exclude_params)
        parameters = dict(base.named_parameters())
        included = {c.name: parameters[c.name] for c in choices if c.included}
        fixed = FixedElements(base, {c.name: (c.name, *c.aliases) for c in choices if c.included})
        priors = choose_priors(prior, prior_var, choices, included)
        prior_module = PriorModule(included, priors, site_prefix=name or "")
        guide = MeanField(
            prior_module,
            included,
            priors=priors,
            init_logvar=float(init_logvar),
            store_name=name or type(self).__name__,
            site_prefix=name or "",
            leaves=leaves,
            fixed=fixed,
        )
        super().__init__(base, prior_module, guide, choices)
        fixed_of = guide.memory.fixed.mask if guide.memory.fixed else None
        priors.follow(guide.posterior, fixed_of, guide.prior_scales.by_name)
        self.init_logvar = float(init_logvar)

    # Draws

    def sample_params(self) -> dict[str, Tensor]:
        r"""Returns model parameters sampled from the posterior.

        .. math:: \theta_i = \mu_i + \sigma_i \epsilon_i, \quad \epsilon_i \sim \mathcal{N}(0, 1)

        Returns:
            The draws by parameter name, of the parameters' shapes and dtypes. Gradients flow to the
            posterior's parameters.

        Example:
            >>> bnn = BayesianModel(nn.Linear(3, 1))
            >>> {name: tuple(draw.shape) for name, draw in bnn.sample_params().items()}
            {'weight': (1, 3), 'bias': (1,)}
        """
        draws, _ = held_values(self._flats(), ContextNoise("weights"))
        return dict(self.as_held(draws))

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
        with torch.no_grad(), self.lock():
            draws = self.sample_params()
            model = self.swap.copy()
            parameters = dict(model.named_parameters())
            for name, draw in draws.items():
                parameters[name].copy_(draw)
                parameters[name].requires_grad_()
        return model

    @contextmanager
    def reparameterize(
        self,
        local_trick: bool | Literal["flipout"] = False,
        *,
        batch_dim: int = 0,
        check_examples: bool = True,
    ) -> Iterator[nn.Module]:
        r"""Reparameterizes the base from the posterior while the context is open.

        Within the context, the base behaves deterministically: the same inputs give the same
        outputs, and gradients flow to the posterior's parameters. The base is given back on the way
        out, also by exception. Contexts of one model nest; the innermost counts. Threads wait for
        each other.

        Three estimators of the ELBO's gradient have the same expectation where they are exact:

        - `False`: one draw of the weights, the same for all examples. It is exact for all networks.
        - `True`, local noise: operators draw their outputs from the distribution that the posterior
          induces, with noise of its own for each example, which lowers the variance of gradients
          most. The moments of each output are exact, but the outputs that one example meets the
          same weights in (positions of a convolution or a sequence, repeated calls) are correlated
          under the posterior, and that is lost.
        - `"flipout"`: one perturbation of the weights, and random signs for each example. Every
          example has the same weights at all positions and in all calls, so it is exact for
          convolutions and sequences too. Examples share the perturbation's size, so the variance of
          gradients is between the two others'.

        The latter two take the examples of a batch to be independent. The first call of the base
        sees to that: it calls the base a few more times with other noise for some examples. If the
        outputs of others change, as they do in graph layers, attention over the batch, pooling of
        sets, and batch norm in training mode, the parameters behind it become one draw, with a
        warning. So do, without one, operators whose input is the same for all examples, as position
        embeddings or weights computed of others, and parameters that some operator needs as one
        draw. What a flow computes after the call, :class:`pyro_bayes.ELBO` sees.

        The latter two cost a second product per operator. They reach linear and bilinear maps,
        products with matrices, convolutions, embeddings, attention, the affine part of
        normalisations, sums and products; :meth:`summary` tells what they reached. Any other
        operator, as a recurrent layer, uses one draw of its parameters. So does every operator once
        the network has changed a parameter in place or read its `requires_grad`, as flows do that
        differentiate inside.

        Warning:
            Call the network inside. After the context, it is the posterior-mean network, and passes
            no gradient. A flow computes its density with the network, so `flow(c).log_prob(x)` must
            be inside as well. What needs outputs only, as a loss and the backward pass, may come
            after. What computes again there, as activation checkpointing, has the context again.

        Arguments:
            local_trick: The estimator: `False`, `True` or `"flipout"`.
            batch_dim: The dimension of inputs that counts examples where the layout does not say:
                1 for networks that have time first. Noise and signs belong to the position of an
                example in the batch. It does not matter to draws of weights.
            check_examples: Whether to look, once for each estimator and mode, if examples meet. It
                takes about the time of one forward and backward pass.

        Yields:
            The reparameterized base.

        Raises:
            ValueError: If an argument is none of the above.
            RuntimeError: If the base has lost or replaced one of its parameters.

        Warns:
            UserWarning: If examples meet, the first time.

        References:
            | Variational Dropout and the Local Reparameterization Trick (Kingma et al., 2015)
            | https://arxiv.org/abs/1506.02557

            | Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches
              (Wen et al., 2018)
            | https://arxiv.org/abs/1803.04386

        Example:
            >>> bnn, x = BayesianModel(nn.Linear(3, 1)), torch.randn(5, 3)
            >>> with bnn.reparameterize(local_trick=True) as model:
            ...     bool((model(x) == model(x)).all())
            True
        """
        noise = context_noise(local_trick, batch_dim, check_examples)
        with self.lock():
            values, _ = self.values(noise)
            with self.hold(values, noise) as base:
                yield base

    @contextmanager
    def reparameterize_with_kl(
        self,
        local_trick: bool | Literal["flipout"] = False,
        *,
        batch_dim: int = 0,
        check_examples: bool = True,
    ) -> Iterator[tuple[nn.Module, Tensor]]:
        """Reparameterizes the base, and computes the KL divergence in the same pass.

        It is :meth:`reparameterize` and :meth:`kl_divergence` in one call, which takes less time.

        Arguments:
            local_trick: The estimator, as in :meth:`reparameterize`.
            batch_dim: The dimension of inputs that counts examples, likewise.
            check_examples: Whether to look if examples meet, likewise.

        Yields:
            The reparameterized base, and the divergence from the model's prior in nats.

        Raises:
            ValueError: As in :meth:`reparameterize`.
            RuntimeError: As in :meth:`reparameterize`.

        Example:
            >>> bnn, x, y, dataset_size = BayesianModel(nn.Linear(3, 1)), *torch.randn(2, 5, 3), 100
            >>> with bnn.reparameterize_with_kl() as (model, kl):
            ...     nll = nn.functional.mse_loss(model(x), y[:, :1])
            >>> loss = nll + kl / dataset_size
        """
        noise = context_noise(local_trick, batch_dim, check_examples)
        with self.lock():
            values, numbers = self.values(noise, self._guide.priors)
            with self.hold(values, noise) as base:
                yield base, total(numbers)
