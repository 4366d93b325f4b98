"""The objective: the evidence lower bound, for plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyro_bayes.base.checks import check_batch, check_count, is_count, is_number
from pyro_bayes.base.recomputation import any_applied, is_foreign, nodes, reopening
from pyro_bayes.likelihoods import Likelihood
from pyro_bayes.model import BayesianModel
from pyro_bayes.noise.context import context_noise
from pyro_bayes.prediction.batches import arguments, called
from pyro_bayes.training.schedule import Schedule

if TYPE_CHECKING:
    from typing_extensions import Self

_LOSSES = {
    "mse": "Gaussian(scale)",
    "l1": "StudentT(scale)",
    "huber": "StudentT(scale)",
    "gaussian": "HeteroscedasticGaussian()",
    "binary": "Bernoulli()",
    "bce": "Bernoulli()",
    "poisson": "Poisson()",
    "cross": "Categorical()",
    "nll": "Categorical()",
}
"""Parts of the names of torch's losses, and the likelihoods to use instead."""


class Terms(NamedTuple):
    """The two terms of the negative ELBO per datum, 0-dim tensors in nats.

    Arguments:
        nll: The negative log-likelihood, its mean over examples and draws.
        kl: The KL divergence divided by the size of the dataset, before any weight.
    """

    nll: Tensor
    kl: Tensor


class ELBO(nn.Module):
    r"""The negative evidence lower bound of a model per datum, a loss to minimise.

    .. math:: \mathcal{L}(x, y) = -\frac{1}{S B} \sum_{s, i} \log p(y_i \mid f_{\theta_s}(x_i))
              + \frac{w}{N} D_{KL}(q(\theta) \,\|\, p(\theta)), \qquad \theta_s \sim q(\theta)

    The first sum is over the :math:`B` examples of a minibatch, and :math:`N` is the size of the
    whole training set: the expectation over minibatches is the negative ELBO of all data, divided
    by :math:`N`. Its parameters are those of the posterior, the deterministic ones of the base that
    train, and what the likelihood learns. Give the optimiser `objective.parameters()`.

    Arguments:
        bnn: The model.
        likelihood: The likelihood, one of :mod:`pyro_bayes.likelihoods`.
        num_data: The number :math:`N` of examples in the whole training set, not in a batch.
        local_trick: The estimator, `False`, `True` or `"flipout"`, as in
            :meth:`pyro_bayes.BayesianModel.reparameterize`.
        batch_dim: The dimension of inputs that counts examples, 1 if they have time first. The
            output and the target have them first.
        check_examples: Whether to look if examples meet, as in
            :meth:`pyro_bayes.BayesianModel.reparameterize`, at the first batch.
        num_samples: The number :math:`S` of draws. More lower the variance of the gradient, in
            proportion to the time. A divergence that is estimated has as many draws of its own.
        kl_weight: The weight :math:`w`, a number or a schedule, as
            :class:`pyro_bayes.training.schedule.LinearWarmup`. With a weight other than 1, it is no
            ELBO.

    Attributes:
        model: The model.
        likelihood: The likelihood.
        num_data: The number :math:`N`.

    Raises:
        TypeError: If an argument is of the wrong type, as a loss function instead of a likelihood.
        ValueError: If an argument is out of range.

    References:
        | Weight Uncertainty in Neural Networks (Blundell et al., 2015)
        | https://arxiv.org/abs/1505.05424

    Example:
        >>> from pyro_bayes.likelihoods import Gaussian
        >>> bnn = BayesianModel(nn.Linear(3, 1))
        >>> objective = ELBO(bnn, Gaussian(0.1, learn=True), num_data=100, local_trick=True)
        >>> optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
        >>> x, y = torch.randn(20, 3), torch.randn(20, 1)  # a minibatch
        >>> loss = objective(x, y)
        >>> loss.backward()
        >>> optimizer.step()
    """

    model: BayesianModel
    likelihood: Likelihood

    def __init__(
        self,
        bnn: BayesianModel,
        likelihood: Likelihood,
        num_data: int,
        *,
        local_trick: bool | Literal["flipout"] = False,
        batch_dim: int = 0,
        check_examples: bool = True,
        num_samples: int = 1,
        kl_weight: float | Schedule = 1.0,
    ) -> None:
        """Makes the objective, whose class describes the arguments."""
        super().__init__()
        check_parts(bnn, likelihood, num_data)
        context_noise(local_trick, batch_dim, check_examples)
        check_count("num_samples", num_samples)
        if not isinstance(kl_weight, Schedule) and not (
            is_number(kl_weight) and 0 <= kl_weight < math.inf
        ):
            raise ValueError(
                "Expected kl_weight to be a finite number of at least 0 or a schedule, as"
                f" LinearWarmup(steps); got {kl_weight!r}."
            )
        self.model = bnn
        self.likelihood = likelihood
        self.num_data = int(num_data)
        self.num_samples = int(num_samples)
        self.local_trick: bool | Literal["flipout"] = local_trick
        self.batch_dim = batch_dim
        self.check_examples = check_examples
        self.kl_weight = kl_weight
        self._computes_again: bool | None = None

    @property
    def weight(self) -> float | Tensor:
        """The weight of the divergence at the present step."""
        return self.kl_weight.weight if isinstance(self.kl_weight, Schedule) else self.kl_weight

    def step(self) -> None:
        """Advances the schedule of the weight, if there is one: once per step of the optimiser."""
        if isinstance(self.kl_weight, Schedule):
            self.kl_weight.step()

    def terms(self, x: Any, y: Tensor) -> Terms:
        """Computes the two terms of the loss apart.

        Arguments:
            x: A tensor, a tuple (or a list, as loaders make them) of positional arguments or a
                mapping of keyword arguments of the base.
            y: The targets.

        Returns:
            The terms; the loss is `nll + weight * kl`.

        Raises:
            TypeError: If the output or `y` is of the wrong type.
            ValueError: If the output or `y` does not fit the likelihood, or, in training mode, a
                batch has more examples than `num_data`.
        """
        args, kwargs = arguments(x)
        kind: dict[str, Any] = {"local_trick": self.local_trick, "batch_dim": self.batch_dim}
        if self.local_trick and self.check_examples:
            self.model.look_at_examples(self._log_probs(y), *args, **kind, **kwargs)
        nlls, kls = [], []
        for _ in range(self.num_samples):
            with self.model.reparameterize_with_kl(**kind, check_examples=self.check_examples) as (
                net,
                kl,
            ):
                # Inside the context, because flows compute their density with the network.
                log_probs = self.likelihood.log_prob(called(net, args, kwargs), y)
                if log_probs.shape != y.shape[:1]:
                    raise ValueError(
                        f"Expected the distribution of {type(self.likelihood).__name__} to have one"
                        f" log-probability per example, the shape {tuple(y.shape[:1])}; got"
                        f" {tuple(log_probs.shape)}. It must not be reduced over examples."
                    )
                nll = -log_probs.mean()
                applied = any_applied()
                if self._computes_again is None and self._is_trained():
                    self._computes_again = applied or self._find_out(nll)
                if (self._computes_again or applied) and nll.requires_grad:
                    nll = reopening(nll, self.model.again())
            nlls.append(nll)
            kls.append(kl)
        if self.training:
            check_batch(len(y), self.num_data)
        if self.model.guide.priors.is_exact:  # all are the same
            del kls[1:]
        nll, kl = (torch.stack(v).mean() if len(v) > 1 else v[0] for v in (nlls, kls))
        return Terms(nll, kl / self.num_data)

    def _log_probs(self, y: Tensor) -> Callable[..., Tensor]:
        """Returns the log-probability of targets as a function of the network and its inputs."""
        return lambda net, *args, **kwargs: self.likelihood.log_prob(called(net, args, kwargs), y)

    def _is_trained(self) -> bool:
        compiled = torch.compiler.is_compiling()
        return self.training and torch.is_grad_enabled() and not compiled

    def _find_out(self, nll: Tensor) -> bool:
        """Tells whether the backward pass computes again, and checks that it trains the model."""
        found = [*nodes(nll)]
        if any(map(is_foreign, found)):
            return True
        leaves = [p for p in self.model.guide.parameters() if p.requires_grad]
        reached = {id(node.variable) for node in found if hasattr(node, "variable")}
        if leaves and not any(id(leaf) in reached for leaf in leaves):
            raise RuntimeError(
                "Expected the log-likelihood to have a gradient with respect to the posterior; got"
                " none, so that only the divergence would train. Does the network detach its"
                " output, switch gradients off, or use torch.utils.checkpoint with"
                " use_reentrant=True, which needs an input that requires a gradient? Choose"
                " use_reentrant=False."
            )
        return False

    def train(self, mode: bool = True) -> Self:
        """Sets the mode, and finds out anew whether the backward pass computes again.

        Arguments:
            mode: Whether to train.
        """
        self._computes_again = None
        return super().train(mode)

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Computes the loss.

        Arguments:
            x: A tensor, a tuple (or a list, as loaders make them) of positional arguments or a
                mapping of keyword arguments of the base.
            y: The targets.

        Returns:
            The loss in nats per datum, a 0-dim tensor.

        Raises:
            TypeError: If the output or `y` is of the wrong type.
            ValueError: If the output or `y` does not fit, as in :meth:`terms`.
        """
        nll, kl = self.terms(x, y)
        return nll + self.weight * kl

    def parts(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Splits a tensor of the shape of a parameter, such as its gradient.

        Arguments:
            name: The name of the parameter, as in :meth:`named_parameters`.
            value: The tensor.

        Returns:
            The parts of a flat parameter by the names of the parameters that it consists of, and
            of any other the tensor itself.
        """
        prefix, key = "model.guide.", name.removeprefix("model.guide.")
        if key == name:
            return {name: value}
        parts = self.model.guide.memory.parts(key, value)
        return {prefix + own: part for own, part in parts.items()}

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Returns the parameters that may train, those of the model and of the likelihood.

        Arguments:
            prefix: What stands in front of the names.
            recurse: Whether to include those of submodules, which all of them are.
            remove_duplicate: Whether a shared parameter is named once.

        Yields:
            Pairs of name and parameter.
        """
        # The default would name the base's included parameters too, which never train.
        for name, part in self.named_children() if recurse else ():
            stem = f"{prefix}.{name}" if prefix else name
            yield from part.named_parameters(stem, recurse, remove_duplicate)


def check_parts(bnn: Any, likelihood: Any, num_data: Any) -> None:
    """Raises an error unless arguments are what an objective consists of.

    The model keeps in mind what the likelihood learns, for whoever loads its state alone.

    Arguments:
        bnn: What should be a model.
        likelihood: What should be a likelihood.
        num_data: What should be a number of examples.

    Raises:
        TypeError: If the model or the likelihood is something else, as a loss function, or the
            likelihood has two definitions.
        ValueError: If the number is not a positive integer.
    """
    if not isinstance(bnn, BayesianModel):
        raise TypeError(
            f"Expected bnn to be a BayesianModel; got {type(bnn).__name__}. Wrap the network first:"
            " BayesianModel(net)."
        )
    if not isinstance(likelihood, Likelihood):
        name = getattr(likelihood, "__name__", type(likelihood).__name__)
        if isinstance(likelihood, type) and issubclass(likelihood, Likelihood):
            fix = f"Make one: {name}(…)."
        else:
            uses = (use for part, use in _LOSSES.items() if part in name.lower())
            fix = f"Use pyro_bayes.likelihoods.{next(uses, 'Gaussian(scale), or another')}."
        raise TypeError(
            "Expected likelihood to be a likelihood, which has the log-probability of each"
            f" example, and not a loss, which may be reduced or scaled; got {name}. {fix}"
        )
    likelihood.check_definition()
    if not is_count(num_data):
        raise ValueError(
            "Expected num_data to be the number of examples in the whole training set, an integer"
            f" of at least 1; got {num_data!r}."
        )
    names = tuple(name for name, p in likelihood.named_parameters() if p.requires_grad)
    bnn.learned_beside = names
