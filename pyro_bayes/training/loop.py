"""Training an objective, by one call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_bayes.base import processes
from pyro_bayes.base.checks import check_count
from pyro_bayes.base.state import preserve_modes
from pyro_bayes.posterior.leaves import NamedView, whole_leaves
from pyro_bayes.prediction.batches import Batches
from pyro_bayes.training.diagnostics import warn_if_unmoved
from pyro_bayes.training.history import History
from pyro_bayes.training.objective import ELBO
from pyro_bayes.training.run import Callback, Run


def fit(
    objective: ELBO,
    loader: Iterable[Any],
    epochs: int,
    *,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    validation: Iterable[Any] | None = None,
    validation_samples: int = 10,
    patience: int | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    resume: bool = False,
    device: torch.device | str | None = None,
    precision: torch.dtype | None = None,
    progress: bool = True,
) -> History:
    r"""Trains an objective with minibatches.

    Each step minimises the negative ELBO per datum of one batch,

    .. math:: \frac{1}{B} \sum_{i \in \text{batch}} -\log p(y_i \mid x_i, \theta)
              + \frac{w}{N} D_{KL}(q(\theta) \,\|\, p(\theta)), \qquad \theta \sim q(\theta)

    and the schedules of the learning rate and of :math:`w` go one step on. What cannot train is
    refused before the first step: that goes for all data that are in memory, in a list of batches
    or a `TensorDataset`, and for the first batches of others. What is wrong with later ones is
    found when they come, and the steps before stay. A step whose loss or gradient is not finite is
    not taken.

    **Checkpoints.** With `checkpoint`, all that training depends on is written at ends of epochs:
    parameters, buffers, the optimiser, both schedules, the history, and the states of the random
    numbers of torch, Python and NumPy, of the loaders' and their samplers' own generators, and of
    each process. A kill at any moment leaves a whole file. The same call with `resume=True`
    continues from it, bit for bit as if nothing had happened; an epoch that was cut off starts
    again. What the file holds, as the learning rate, counts for more than what the
    optimiser was made with. Not in the file are the random numbers that persistent workers of a
    loader keep from epoch to epoch, and what callbacks remember.

    **Many processes.** If :mod:`torch.distributed` is initialised, as in a script run by
    `torchrun`, `fit` wraps the objective in :class:`torch.nn.parallel.DistributedDataParallel`, and
    all processes end with the same parameters. Give each its share of the data, by a
    :class:`torch.utils.data.DistributedSampler`; :math:`N` stays the size of the whole training
    set. Seed each process differently, so that each draws its own noise:
    `torch.manual_seed(seed + rank)`. History and validation are of all processes. Process 0 writes
    checkpoints, where all must be able to read them.

    Arguments:
        objective: The objective. It is trained in training mode; modes are as before in the end.
        loader: Gives batches (x, y), as a `DataLoader`: x a tensor, a tuple of positional arguments
            or a dictionary of keyword arguments of the base, y the target. Batches weigh the same,
            so `drop_last=True` is best.
        epochs: How often to go through the loader, with the epochs of a checkpoint counted in.
        optimizer: The optimiser of `objective.parameters()`, those of the likelihood included. Its
            `weight_decay` must be 0 for those of the posterior, which AdamW's is not by default.
        scheduler: The scheduler of the learning rate. It advances with each step of the optimiser,
            so that its periods are numbers of steps. A `ReduceLROnPlateau` is given the validation
            loss after each epoch, or the loss without validation.
        validation: Gives batches as `loader` does. After each epoch, their mean negative
            log-density under the mixture over draws of the weights is computed,
            :math:`-\log \frac{1}{S} \sum_s p(y_i \mid x_i, \theta_s)`, as predictions have it, in
            evaluation mode, with the same noise each time.
        validation_samples: The number :math:`S` of these draws, each of which costs a forward pass
            of all validation batches. Fewer are quicker, and overestimate the loss.
        patience: After how many epochs in a row without a lower validation loss to stop. If given,
            the objective has the state of the best epoch in the end.
        callbacks: Functions of a :class:`~pyro_bayes.training.State`, called after each epoch. What
            returns `True` stops the training, for good: the checkpoint knows, and does not
            continue.
        checkpoint: The file to write checkpoints to.
        checkpoint_every: After how many epochs to write one, beside the last.
        resume: Whether to continue from the checkpoint if there is one. Otherwise, a file that
            exists is an error.
        device: Where to train; by default, where the objective is.
        precision: `torch.bfloat16` to compute the network with :func:`torch.autocast`. Parameters,
            the divergence and the optimiser keep their dtype. By default, all is in that.
        progress: Whether to show a progress bar once it has taken a second.

    Returns:
        The losses by epoch.

    Raises:
        TypeError: If an argument is of the wrong type, or batches are no pairs.
        ValueError: If an argument is out of range, the optimiser has not the objective's
            parameters, the loader is empty, data are not finite or do not fit the likelihood, a
            batch has more than :math:`N` examples, or a checkpoint is corrupt, of another model, or
            there without `resume`.
        FloatingPointError: If the loss, a gradient or a parameter is not finite, naming the first.

    Warns:
        UserWarning: If :math:`N` is not the length of the loader's dataset, if the optimiser decays
            parameters of the posterior, if processes draw the same noise, if the posterior of a
            weight collapses to noise, or if most deviations are still at their initial value in the
            end.

    References:
        | Auto-Encoding Variational Bayes (Kingma and Welling, 2014)
        | https://arxiv.org/abs/1312.6114

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from pyro_bayes import BayesianModel, likelihoods
        >>> x = torch.linspace(-1, 1, 64).unsqueeze(-1)
        >>> loader = DataLoader(TensorDataset(x, 2 * x), batch_size=16, shuffle=True)
        >>> bnn = BayesianModel(nn.Linear(1, 1), init_logvar=-5.0)
        >>> objective = ELBO(bnn, likelihoods.Gaussian(0.1), num_data=64, local_trick=True)
        >>> optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
        >>> history = fit(objective, loader, 50, optimizer=optimizer)
        >>> len(history), bool((bnn.base.weight - 2).abs() < 0.1)
        (50, True)
    """
    _check(objective, optimizer, scheduler)
    check_count("validation_samples", validation_samples)
    _check_options(epochs, validation, patience, callbacks, checkpoint_every, precision)
    file = _file(checkpoint, resume=resume)
    place = next(objective.parameters()).device if device is None else torch.device(device)
    batches = Batches(loader, name="loader", num_data=objective.num_data, device=place)
    held_out = None
    if validation is not None:
        held_out = Batches(validation, name="validation", num_data=None, device=place)
    run = Run(
        objective,
        batches,
        optimizer=optimizer,
        scheduler=scheduler,
        held_out=held_out,
        validation_samples=validation_samples,
        patience=patience,
        callbacks=tuple(callbacks),
        file=file,
        every=checkpoint_every,
        device=place,
        precision=precision,
    )
    with preserve_modes(objective):
        try:
            objective.to(place).train()
            run.start()
            _warn_of_decay(objective, optimizer)
            run.train(epochs, progress=progress and processes.rank() == 0)
        finally:
            optimizer.zero_grad()
    warn_if_unmoved(objective.model, len(run.history))
    return run.history


def _check(objective: Any, optimizer: Any, scheduler: Any) -> None:
    if not isinstance(objective, ELBO):
        wrapped = isinstance(objective, nn.parallel.DistributedDataParallel)
        advice = " fit() wraps the objective itself: pass what is inside." if wrapped else ""
        raise TypeError(
            f"Expected objective to be an ELBO; got {type(objective).__name__}.{advice}"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"Expected optimizer to be a torch optimiser; got {type(optimizer).__name__}. Write"
            " torch.optim.Adam(objective.parameters(), lr=1e-2)."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "Expected optimizer to take one gradient per step; got LBFGS, which evaluates the loss"
            " several times, each with another noise. Use torch.optim.Adam."
        )
    if not isinstance(scheduler, LRScheduler | ReduceLROnPlateau | None):
        raise TypeError(
            f"Expected scheduler to be a torch scheduler or None; got {type(scheduler).__name__}."
        )
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError("Expected scheduler to be one of this optimizer; got one of another.")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    held = {id(p) for p in (*params, *whole_leaves(params))}
    trains = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    missing = [name for name, p in trains.items() if id(p) not in held]
    if missing:
        raise ValueError(
            "Expected optimizer to have the objective's parameters, objective.parameters(); got"
            f" one without {missing}. What is not to train is to say so:"
            " parameter.requires_grad_(False)."
        )
    if not trains:
        raise ValueError("Expected objective to have parameters that train; got none.")


def _warn_of_decay(objective: ELBO, optimizer: Optimizer) -> None:
    """Warns if a posterior would be pulled elsewhere than to the prior."""
    guide = objective.model.guide
    names = {id(p): f"guide.{name}" for name, p in guide.named_parameters() if p.requires_grad}
    decays: dict[str, float] = {}
    for group in optimizer.param_groups:
        leaves = [p.leaf if isinstance(p, NamedView) else p for p in group["params"]]
        decay = float(group.get("weight_decay") or 0)
        if isinstance(optimizer, torch.optim.ASGD):
            decay = decay or float(group.get("lambd") or 0)
        if decay:
            decays.update({names[id(leaf)]: decay for leaf in leaves if id(leaf) in names})
    if decays:
        warnings.warn(
            f"Expected no weight decay on the posterior; got {max(decays.values()):g} for"
            f" {list(decays)}. It pulls log σ² towards 0, so that deviations are too wide, and acts"
            " beside the prior, which regularises already. Pass weight_decay=0 to the optimiser"
            " (and lambd=0 to ASGD),"
            ' or at least to the group {"params": bnn.guide.parameters(), "weight_decay": 0.0}.',
            UserWarning,
            stacklevel=3,
        )


def _check_options(
    epochs: Any, validation: Any, patience: Any, callbacks: Any, every: Any, precision: Any
) -> None:
    check_count("epochs", epochs)
    check_count("checkpoint_every", every)
    if patience is not None:
        check_count("patience", patience)
        if validation is None:
            raise ValueError("Expected validation, whose loss patience watches; got None.")
    if precision not in (None, torch.bfloat16):
        raise ValueError(
            "Expected precision to be torch.bfloat16 or None (float16 would need its losses"
            f" scaled); got {precision!r}."
        )
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise TypeError(f"Expected callbacks to be a list of functions; got {callbacks!r}.")


def _file(checkpoint: Any, *, resume: bool) -> Path | None:
    if checkpoint is None:
        if resume:
            raise ValueError("Expected a checkpoint to resume from; got checkpoint=None.")
        return None
    file = Path(checkpoint)
    if not file.parent.is_dir() or file.is_dir():
        raise ValueError(f"Expected checkpoint to be a file in a folder that exists; got '{file}'.")
    if file.exists() and not resume:
        raise ValueError(
            f"Expected no file at '{file}' yet; got one. Pass resume=True to continue from it, or"
            " delete it to start anew."
        )
    return file
