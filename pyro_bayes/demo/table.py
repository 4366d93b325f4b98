"""A table of numbers with one column to predict, and how it is read from a CSV file."""

from __future__ import annotations

import csv
import difflib
import math
import reprlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

_MIN_ROWS = 20
_LARGEST = torch.finfo(torch.float32).max

_repr = reprlib.Repr()
_repr.maxstring = 60


class InputError(ValueError):
    """An input of the user that cannot be used; its message is one line."""


@dataclass(frozen=True)
class Table:
    """Rows of features and a target, in double precision.

    Arguments:
        features: The features, of shape :math:`(N, D)`.
        target: The target, of shape :math:`(N,)`.
        columns: What the features are called.
        name: What the target is called.
    """

    features: Tensor
    target: Tensor
    columns: Sequence[str]
    name: str

    def sample(self, count: int, seed: int) -> Table:
        """Returns so many rows at random, or the table if it has no more.

        Arguments:
            count: The number of rows.
            seed: The seed of the choice.
        """
        if len(self.target) <= count:
            return self
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(self.target), generator=generator)[:count]
        return replace(self, features=self.features[rows], target=self.target[rows])


def read(path: Path, target: str) -> Table:
    """Reads a CSV file in UTF-8, whose first line names the columns.

    Arguments:
        path: The file.
        target: The column to predict. All others are features.

    Returns:
        The table.

    Raises:
        InputError: If the file cannot be read, is not a table of at least 20 rows of finite
            numbers, lacks the column, or has no other.
    """
    rows = _rows(path)
    if not rows:
        raise InputError(f"Expected a line of column names in '{path}'; got an empty file.")
    columns = [_words(name) for name in rows.pop(0)[1]]
    target = _words(target)
    _check_columns(columns, target)
    values = [_numbers(line, row, columns) for line, row in rows]
    if len(values) < _MIN_ROWS:
        raise InputError(f"Expected at least {_MIN_ROWS} rows in '{path}'; got {len(values)}.")
    table = torch.tensor(values, dtype=torch.float64)
    place = columns.index(target)
    features = [i for i in range(len(columns)) if i != place]
    return Table(table[:, features], table[:, place], [columns[i] for i in features], target)


def _words(name: str) -> str:
    return " ".join(name.split())


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """Returns the lines that are not blank, each with its number in the file."""
    try:
        # With a byte order mark, as spreadsheets write it, or without.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                return [(reader.line_num, row) for row in reader if row]
            except csv.Error as error:
                raise InputError(
                    f"Expected comma-separated values in '{path}'; got an error in line"
                    f" {reader.line_num}: {error}."
                ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"Expected text in UTF-8 in '{path}'; got the byte 0x{error.object[error.start]:02x}."
        ) from error
    except OSError as error:
        raise InputError(
            f"Expected --data to be a file to read; got '{path}' ({error.strerror})."
        ) from error


def _check_columns(columns: list[str], target: str) -> None:
    if target not in columns:
        close = difflib.get_close_matches(target, columns, n=3, cutoff=0.0)
        raise InputError(
            f"Expected --target to be a column of the table, such as"
            f" {', '.join(map(_repr.repr, close))}; got {_repr.repr(target)}."
        )
    name, count = Counter(columns).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"Expected columns with different names; got {_repr.repr(name)} {count} times."
        )
    if len(columns) == 1:
        raise InputError(
            f"Expected a column of features beside {_repr.repr(target)}; got none. Columns are"
            " separated by commas."
        )


def _numbers(line: int, row: list[str], columns: list[str]) -> list[float]:
    if len(row) != len(columns):
        raise InputError(f"Expected {len(columns)} cells in line {line}; got {len(row)}.")
    return [_number(cell, line, name) for cell, name in zip(row, columns, strict=True)]


def _number(cell: str, line: int, column: str) -> float:
    try:
        # To Python, 1_000 is a number.
        value = float(cell.replace("_", "?"))
    except ValueError:
        kind = "a number"
    else:
        # The net computes in single precision.
        if math.isfinite(value) and abs(value) <= _LARGEST:
            return value
        kind = "a finite number"
    raise InputError(
        f"Expected {kind} in column {_repr.repr(column)}, line {line}; got {_repr.repr(cell)}."
    )
