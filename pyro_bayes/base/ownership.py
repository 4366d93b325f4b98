"""Which posterior the parameters of a base belong to: one at a time, until it dies."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from pyro_bayes.base.torch_private import outside_transforms


class Claim:
    """That a parameter of a base belongs to an owner, and what that changed.

    Arguments:
        parameter: The parameter.
        owner: The owner.
        shares: Whether the parameter shares its memory with the owner's means.
        trained: Whether it trained before, and does not any more.
    """

    def __init__(self, parameter: nn.Parameter, owner: Any, shares: bool, trained: bool) -> None:
        self.key = id(parameter)
        self.parameter = weakref.ref(parameter, partial(_forget, self.key))
        self.owner, self.shares, self.trained = weakref.ref(owner), shares, trained

    def release(self) -> None:
        """Lets the parameter train again if it did, for as long as nobody else has claimed it."""
        parameter = self.parameter()
        if _claims.get(self.key) is not self:
            return
        del _claims[self.key]
        if parameter is not None and self.trained and not parameter.is_inference():
            with outside_transforms():  # an owner may die at any time
                parameter.requires_grad_()


_claims: dict[int, Claim] = {}
_former: weakref.WeakSet[Any] = weakref.WeakSet()


def claim(owner: Any, parameters: Iterable[tuple[nn.Parameter, bool, bool]]) -> list[nn.Parameter]:
    """Makes an owner the one that parameters belong to, in the place of any former one.

    Parameters that share their memory with the owner are frozen until the owner dies.

    Arguments:
        owner: The owner.
        parameters: The parameters, with whether each shares its memory with the owner, and whether
            it trained before the owner's first claim, if it does not now.

    Returns:
        Those that train, or did.
    """
    claims: list[Claim] = []
    trained: list[nn.Parameter] = []
    for parameter, shares, trains in parameters:
        if is_owner(owner, parameter):
            continue
        former = _claims.get(id(parameter))
        if former is not None:
            former.release()
            if former.owner() is not None:
                _former.add(former.owner())
            if former.shares:
                parameter.data = parameter.data.clone()
        if parameter.requires_grad or trains:
            trained.append(parameter)
        own = Claim(parameter, owner, shares, shares and (parameter.requires_grad or trains))
        claims.append(own)
        _claims[id(parameter)] = own
        if shares:
            parameter.requires_grad_(False)
    _former.discard(owner)
    if claims:
        weakref.finalize(owner, _release, claims).atexit = False
    return trained


def trained(parameters: Sequence[nn.Parameter]) -> list[bool]:
    """Tells which parameters of a base train, or did before an owner that is alive froze them.

    A base that is a copy of another, with the same values, trains as that one did.

    Arguments:
        parameters: All parameters of the base.
    """
    own = [_claims.get(id(parameter)) for parameter in parameters]
    trains = [
        p.requires_grad or (c is not None and c.trained)
        for p, c in zip(parameters, own, strict=True)
    ]
    if all(trains) or any(own):
        return trains
    owners: dict[int, list[Claim]] = {}
    for claim in _claims.values():
        owners.setdefault(id(claim.owner()), []).append(claim)
    for claims in owners.values():
        same = len(claims) == len(parameters)
        if same and all([_is_copy(*pair) for pair in zip(parameters, claims, strict=True)]):
            return [p.requires_grad or c.trained for p, c in zip(parameters, claims, strict=True)]
    return trains


def _is_copy(parameter: nn.Parameter, claim: Claim) -> bool:
    original = claim.parameter()
    if original is None or parameter.requires_grad != original.requires_grad:
        return False
    if (parameter.dtype, parameter.device) != (original.dtype, original.device):
        return False
    return not parameter.is_meta and torch.equal(parameter, original)


def is_owner(owner: Any, parameter: nn.Parameter) -> bool:
    """Tells whether a parameter belongs to an owner.

    Arguments:
        owner: The owner.
        parameter: The parameter.
    """
    present = _claims.get(id(parameter))
    return present is not None and present.owner() is owner


def owners(parameters: Iterable[nn.Parameter]) -> list[Any]:
    """Returns the living owners of parameters.

    Arguments:
        parameters: The parameters.
    """
    claims = (_claims.get(id(parameter)) for parameter in parameters)
    found = (own.owner() for own in claims if own is not None)
    return list({id(owner): owner for owner in found if owner is not None}.values())


def is_former(owner: Any) -> bool:
    """Tells whether another owner has claimed a parameter that belonged to this one.

    Arguments:
        owner: The owner.
    """
    return owner in _former


def _release(claims: Sequence[Claim]) -> None:
    for own in claims:
        own.release()


def _forget(key: int, reference: Any) -> None:
    present = _claims.get(key)
    if present is not None and present.parameter is reference:
        del _claims[key]
