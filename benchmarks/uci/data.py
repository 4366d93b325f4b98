"""The datasets, and their standard splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SHAPES = {
    "boston": (506, 13),
    "concrete": (1030, 8),
    "energy": (768, 8),
    "kin8nm": (8192, 8),
    "power": (9568, 4),
    "wine": (1599, 11),
    "yacht": (308, 6),
}
OPENML = {
    "boston": 531,
    "concrete": 44959,
    "energy": 44960,
    "kin8nm": 44980,
    "wine": 44972,
    "yacht": 42370,
}
"""Numbers in OpenML's catalogue; it is not known to have `power`."""


class Missing(Exception):  # noqa: N818
    """Says where a dataset is not."""


def load(name: str, folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Loads a dataset from a folder, or from OpenML.

    Arguments:
        name: The name of the dataset.
        folder: Where `NAME.npz` is, with the arrays `X` and `y`; OpenML if it is `None`.

    Returns:
        The inputs, of shape `(N, D)`, and the targets, of shape `(N,)`, in original units.

    Raises:
        Missing: If the folder has no such file, or OpenML does not have the dataset or cannot be
            reached.
        ValueError: If the splits that the file says it has are not the standard ones.
    """
    if folder is None:
        x, y = _fetch(name)
    else:
        path = folder / f"{name}.npz"
        if not path.exists():
            raise Missing(f"Expected {path}, with the arrays X (N, D) and y (N,); got none.")
        with np.load(path) as file:
            x, y = file["X"].astype(float), file["y"].astype(float).reshape(-1)
            if "perm" in file and not np.array_equal(file["perm"], permutations(len(x))):
                raise ValueError(f"Expected the standard splits in {path}; got others.")
    return x, y


def permutations(size: int, count: int = 20) -> np.ndarray:
    """Returns the order of the rows in each standard split, of shape `(count, size)`."""
    random = np.random.RandomState(1)
    return np.stack([random.permutation(size) for _ in range(count)])


@dataclass(frozen=True)
class Splits:
    """K splits of one dataset, standardised with the training part of each.

    Arguments:
        x: The training inputs, of shape `(N, K, D)`.
        y: The training targets, of shape `(N, K)`.
        x_test: The inputs to predict for, of shape `(M, K, D)`.
        y_test: The targets to predict, of shape `(M, K)`.
        scale: The deviations of the targets that they were divided by, of shape `(K)`.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    scale: Tensor


def split(x: np.ndarray, y: np.ndarray, *, validation: bool, count: int = 20) -> Splits:
    """Makes the standard splits: the first `round(0.9 N)` rows of a permutation train.

    Arguments:
        x: The inputs.
        y: The targets.
        validation: Whether to predict for the last ninth of the training part instead of the test
            part, which is then left alone, and to train with the rest.
        count: The number of splits.
    """
    size = round(0.9 * len(x))
    end = len(x)
    if validation:
        size, end = size - size // 9, size
    parts = []
    for order in permutations(len(x), count):
        train, test = order[:size], order[size:end]
        x_mean, x_scale = x[train].mean(0), x[train].std(0)
        x_scale[x_scale == 0] = 1.0
        y_mean, y_scale = y[train].mean(), y[train].std()
        xs = ((x[rows] - x_mean) / x_scale for rows in (train, test))
        ys = ((y[rows] - y_mean) / y_scale for rows in (train, test))
        parts.append((*xs, *ys, y_scale))
    x_train, x_test, y_train, y_test, scale = (
        torch.tensor(np.stack(part), dtype=torch.float32) for part in zip(*parts, strict=True)
    )
    return Splits(x_train.transpose(0, 1), y_train.T, x_test.transpose(0, 1), y_test.T, scale)


def _fetch(name: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import fetch_openml

    advice = f"Name a folder that has {name}.npz: make uci DATA=folder."
    if name not in OPENML:
        raise Missing(f"Expected a dataset that OpenML is known to have; got {name}. {advice}")
    try:
        x, y = fetch_openml(data_id=OPENML[name], return_X_y=True, as_frame=True, parser="auto")
    except OSError as error:
        raise Missing(f"Expected OpenML within reach; got: {error}. {advice}") from error
    x, y = x.to_numpy(dtype=float), y.to_numpy(dtype=float)
    if x.shape != SHAPES[name]:
        raise Missing(
            f"Expected {name} of shape {SHAPES[name]}; got {x.shape} from OpenML. {advice}"
        )
    return x, y
