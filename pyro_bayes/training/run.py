"""One run of training, which can be cut off anywhere and continued."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_bayes.base import processes
from pyro_bayes.base.state import (
    Buffers,
    evaluating,
    random_state,
    restore_random_state,
    seeded,
)
from pyro_bayes.likelihoods import Likelihood
from pyro_bayes.likelihoods.targets import check_labels
from pyro_bayes.prediction.batches import Batch, Batches, arguments, called, generators
from pyro_bayes.training import checkpoint, finite
from pyro_bayes.training.diagnostics import silent, warn_if_silenced
from pyro_bayes.training.history import History
from pyro_bayes.training.objective import ELBO

_DELAY = 1.0  # seconds until the progress bar appears
_SEED = 0  # validation meets the same noise after every epoch


@dataclass(frozen=True)
class State:
    """What a callback is given after an epoch.

    Arguments:
        epoch: The number of epochs done.
        epochs: The number of epochs to do.
        objective: The objective.
        optimizer: The optimiser.
        history: The losses so far.
    """

    epoch: int
    epochs: int
    objective: ELBO
    optimizer: Optimizer
    history: History


Callback: TypeAlias = Callable[[State], bool | None]


class _Loss(nn.Module):
    """The loss and its terms, as one module that processes can share."""

    def __init__(self, objective: ELBO) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nll, kl = self.objective.terms(x, y)
        return nll + self.objective.weight * kl, nll, kl


class Run:
    """One run of training: what it consists of, and how far it is.

    Its arguments are those of :func:`pyro_bayes.fit`, checked.
    """

    def __init__(
        self,
        objective: ELBO,
        batches: Batches,
        *,
        optimizer: Optimizer,
        scheduler: Any,
        held_out: Batches | None,
        validation_samples: int,
        patience: int | None,
        callbacks: Sequence[Callback],
        file: Path | None,
        every: int,
        device: torch.device,
        precision: torch.dtype | None,
    ) -> None:
        self.history = History()
        self._objective, self._batches, self._held_out = objective, batches, held_out
        self._optimizer, self._scheduler = optimizer, scheduler
        self._validation_samples = validation_samples
        self._patience, self._callbacks = patience, callbacks
        self._file, self._every = file, every
        self._device, self._precision = device, precision
        self._generators = generators([b.loader for b in (batches, held_out) if b is not None])
        self._best: dict[str, Tensor] | None = None
        self._stopped = False
        self._unchecked = True
        self._silent: set[str] = set()
        self._silenced = False

    def start(self) -> None:
        """Continues from the checkpoint if there is one, or else sees that one can be written."""
        there = self._file is not None and self._file.exists()
        self._check_processes(there)
        self._identity = checkpoint.identity(
            self._objective,
            self._optimizer,
            self._scheduler,
            {
                "processes": processes.count(),
                "generators of the loaders": len(self._generators),
                "validation": self._held_out is not None and self._validation_samples,
                "patience": self._patience is not None,
            },
        )
        if there and self._file is not None:
            saved = checkpoint.load(self._file)
            checkpoint.check_identity(self._file, saved["identity"], self._identity)
            self._restore(saved)
        finite.check_parameters(self._objective, "before the first step")
        self._rehearse()
        self._silent = set(silent(self._objective.model))
        self._module = processes.together(_Loss(self._objective))
        if not there:
            self._save(checkpoint.rehearse)

    def train(self, epochs: int, *, progress: bool) -> None:
        """Trains until so many epochs are done, or one thing says to stop."""
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        count, done = self._batches.count, len(self.history)
        with tqdm(
            total=None if count is None else epochs * count,
            initial=done * (count or 0),
            unit="step",
            delay=_DELAY,
            disable=not progress,
        ) as bar:
            while len(self.history) < epochs and not self._stopped:
                self._epoch(bar)
                self._stopped = self._is_enough(epochs)
                done = len(self.history)
                if done & (done - 1) == 0:  # few looks cost little
                    self._watch()
                if self._stopped or done == epochs or done % self._every == 0:
                    self._save()
        if self._best is not None:
            self._objective.load_state_dict(self._best)
        self._watch()

    def _epoch(self, bar: Any) -> None:
        epoch = len(self.history)
        bar.set_description(f"epoch {epoch + 1}", refresh=False)
        self._batches.set_epoch(epoch)
        # Callbacks may freeze parameters, or free them.
        self._trained = [(n, p) for n, p in self._objective.named_parameters() if p.requires_grad]
        self._modules = list(self._objective.model.base.modules())
        sums = _Sums()
        for number, batch in enumerate(self._batches):
            numbers = self._step(batch, f"at step {number} of epoch {epoch}")
            sums = sums.plus(*numbers, len(batch.y))
            bar.set_postfix_str(sums.shown(), refresh=False)
            bar.update()
        finite.check_parameters(self._objective, f"after epoch {epoch}", self._advice())
        processes.share_buffers(self._objective.model.base)
        sums = _Sums(*processes.total(sums, self._device))
        self._note(sums, self._validation())

    def _watch(self) -> None:
        """Warns, once, if weights have fallen silent."""
        names = silent(self._objective.model)
        fallen = [name for name in names if name not in self._silent]
        if fallen and not self._silenced:
            self._silenced = True
            warn_if_silenced(fallen, len(self.history))
        self._silent &= set(names)

    def _note(self, sums: _Sums, validation: float | None) -> None:
        """Adds an epoch to the history, and tells the scheduler that waits for it."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(sums.loss / sums.steps if validation is None else validation)
        history = self.history
        history.loss.append(sums.loss / sums.steps)
        history.nll.append(sums.nll / sums.examples)
        history.kl.append(sums.kl / sums.steps)
        history.learning_rate.append(float(self._optimizer.param_groups[0]["lr"]))
        if validation is not None:
            history.validation.append(validation)
            if self._patience is not None and history.best == len(history) - 1:
                state = self._objective.state_dict()
                self._best = {name: value.detach().clone() for name, value in state.items()}

    def _step(self, batch: Batch, when: str) -> tuple[float, float, float]:
        """Takes one step, and returns the loss and its terms; an error leaves all as it was."""
        buffers = Buffers(self._modules)
        try:
            self._optimizer.zero_grad()
            with self._cast(), self._looking() as distributions:
                loss, nll, kl = self._module(*batch)
            self._check_labels(distributions)
            loss.backward()
            numbers = float(loss.detach()), float(nll.detach()), float(kl.detach())
            gradients = [p.grad for _, p in self._trained if p.grad is not None]
            finite.check_step(self._objective, numbers[0], gradients, when, self._advice())
            self._check_shared(len(gradients))
        except BaseException as error:
            buffers.restore()
            if isinstance(error, ValueError):
                # What the likelihood refused may be what a parameter became.
                finite.check_parameters(self._objective, when, self._advice())
            raise
        self._optimizer.step()
        if self._scheduler is not None and not isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step()
        self._objective.step()
        return numbers

    def _rehearse(self) -> None:
        """Sees that validation will work, by its first batch, and draws no random numbers."""
        states = random_state(self._device, self._generators)
        try:
            self._validation(count=1)
        finally:
            restore_random_state(states, self._device, self._generators)

    def _validation(self, count: int | None = None) -> float | None:
        """Returns the mean negative log-density of a validation example over all processes."""
        if self._held_out is None:
            return None
        nll = examples = 0.0
        with evaluating(self._objective), seeded(_SEED), self._cast():
            for batch in islice(self._held_out, count):
                nll -= float(self._log_densities(batch).sum())
                examples += len(batch.y)
        nll, examples = processes.total((nll, examples), self._device)
        return nll / examples

    def _log_densities(self, batch: Batch) -> Tensor:
        """Returns the log-densities of targets under the mixture over draws of the weights."""
        model, likelihood, log_probs = self._objective.model, self._objective.likelihood, []
        for _ in range(self._validation_samples):
            with model.reparameterize() as net:
                log_probs.append(likelihood.log_prob(called(net, *arguments(batch.x)), batch.y))
        return torch.stack(log_probs).logsumexp(0) - math.log(len(log_probs))

    def _is_enough(self, epochs: int) -> bool:
        history = self.history
        state = State(len(history), epochs, self._objective, self._optimizer, history)
        stop = any([callback(state) is True for callback in self._callbacks])  # each is called
        if self._patience is not None and history.best is not None:
            stop |= len(history) - 1 - history.best >= self._patience
        return any(processes.gather(stop, self._device))

    def _cast(self) -> Any:
        kind = self._precision
        return torch.autocast(self._device.type, dtype=kind, enabled=kind is not None)

    def _check_processes(self, there: bool) -> None:
        """Checks that processes can work together."""
        gathered = processes.gather(
            (self._batches.count, there, torch.get_rng_state().tolist()), self._device
        )
        counts, files, states = zip(*gathered, strict=True)
        if len(set(counts)) > 1:
            raise ValueError(
                f"Expected each process to have as many batches; got {list(counts)}. Give the"
                " loaders a DistributedSampler, or drop_last=True."
            )
        if len(set(files)) > 1:
            raise ValueError(
                f"Expected all processes to see the checkpoint '{self._file}', or none; got"
                f" {list(files)}. Use a folder that they share."
            )
        if len(states) > 1 and any(state == states[0] for state in states[1:]):
            warnings.warn(
                "Expected each process to draw its own noise; got processes whose random numbers"
                " are the same, as after one seed for all. Their average is no better than one of"
                " them: call torch.manual_seed(seed + rank) before fit().",
                UserWarning,
                stacklevel=4,
            )

    def _looking(self) -> AbstractContextManager[list[Distribution]]:
        likelihood = self._objective.likelihood
        return _noted(likelihood) if self._unchecked else nullcontext([])

    def _check_labels(self, distributions: Sequence[Distribution]) -> None:
        """Checks, before the first step, the targets that later ones will meet."""
        for batches in (self._batches, self._held_out) if distributions else ():
            for name, y in batches.targets if batches is not None else ():
                check_labels(name, y, distributions[0])
        self._unchecked = False

    def _check_shared(self, gradients: int) -> None:
        # The wrapper has not averaged what it still waits for.
        if processes.count() > 1 and gradients < len(self._trained):
            idle = [name for name, p in self._trained if p.grad is None]
            raise ValueError(
                f"Expected each parameter that trains to be part of the loss; got {idle}, which are"
                " not, and for which processes would wait. Freeze them:"
                " parameter.requires_grad_(False)."
            )

    def _save(self, write: Callable[[Path, dict[str, Any]], None] = checkpoint.save) -> None:
        if self._file is None:
            return
        states = processes.gather(random_state(self._device, self._generators), self._device)
        if processes.rank() == 0:
            content = {
                "identity": self._identity,
                "objective": self._objective.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
                "history": asdict(self.history),
                "best": self._best,
                "stopped": self._stopped,
                "randomness": states,
            }
            write(self._file, content)
        processes.wait(self._device)

    def _restore(self, saved: dict[str, Any]) -> None:
        self._objective.load_state_dict(saved["objective"])
        self._optimizer.load_state_dict(saved["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(saved["scheduler"])
        self.history = History(**saved["history"])
        self._best, self._stopped = saved["best"], saved["stopped"]
        own = saved["randomness"][processes.rank()]
        restore_random_state(own, self._device, self._generators)

    def _advice(self) -> str:
        if self._file is None:
            return ""
        return f" The checkpoint '{self._file}' holds the state after an earlier epoch."


class _Sums(NamedTuple):
    """Sums over the steps of an epoch."""

    loss: float = 0.0
    nll: float = 0.0
    kl: float = 0.0
    steps: float = 0.0
    examples: float = 0.0

    def plus(self, loss: float, nll: float, kl: float, size: int) -> _Sums:
        return _Sums(
            self.loss + loss,
            self.nll + nll * size,
            self.kl + kl,
            self.steps + 1,
            self.examples + size,
        )

    def shown(self) -> str:
        nll, kl = self.nll / self.examples, self.kl / self.steps
        return f"ELBO {-nll - kl:.4g}, NLL {nll:.4g}, KL {kl:.4g}"


@contextmanager
def _noted(likelihood: Likelihood) -> Iterator[list[Distribution]]:
    """Notes the distributions that a likelihood makes while the context is open."""
    distributions: list[Distribution] = []
    make = likelihood.distribution

    def distribution(*args: Any, **kwargs: Any) -> Distribution:
        distributions.append(make(*args, **kwargs))
        return distributions[-1]

    vars(likelihood)["distribution"] = distribution
    try:
        yield distributions
    finally:
        del vars(likelihood)["distribution"]
