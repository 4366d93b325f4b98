"""A file that training continues from: whole or not there, and of the same model."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.optim import Optimizer

from pyro_bayes.training.objective import ELBO

FORMAT = "pyro_bayes checkpoint, version 1"
PARTS = (
    *("identity", "objective", "optimizer", "scheduler"),
    *("history", "best", "stopped", "randomness"),
)
"""What a checkpoint consists of."""


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a checkpoint, so that a kill at any moment leaves the former file or the new one.

    It is written beside its place, under the name with `.part` behind it, flushed to the disk, and
    then renamed. A link stays one, and a file keeps its permissions.

    Arguments:
        path: The file.
        content: What to write: tensors, numbers, strings, and containers of them.

    Raises:
        OSError: If it cannot be written. The former file is as it was.
    """
    path = path.resolve()
    _write(path, content).replace(path)
    if os.name == "posix":  # the new name is on the disk once its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def rehearse(path: Path, content: Mapping[str, Any]) -> None:
    """Raises what :func:`save` would, and leaves no file.

    Arguments:
        path: The file.
        content: What to write.

    Raises:
        OSError: If it cannot be written.
        TypeError: If it could not be read back without running code.
    """
    part = _write(path.resolve(), content)
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(part)
    finally:
        part.unlink()
    if unsafe:
        raise TypeError(
            "Expected the state of the objective, the optimiser and the scheduler to be tensors and"
            f" plain numbers, which are read without running code; got {unsafe}. NumPy's numbers"
            " become plain by float(value)."
        )


def _write(path: Path, content: Mapping[str, Any]) -> Path:
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            if path.exists():
                part.chmod(path.stat().st_mode & 0o7777)
            _save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return part


def _save(content: Mapping[str, Any], file: BinaryIO) -> None:
    """Raises the file's own errors, in whose place torch puts one of its own, as of a full disk."""
    writer = _Writer(file)
    try:
        torch.save(content, writer)  # type: ignore[arg-type]
    except Exception:
        if writer.error is not None:
            raise writer.error from None
        raise


class _Writer:
    """A file that remembers the first error of writing."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is not None:
            return len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        if self.error is None:
            self._file.flush()


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint, whose tensors are then on the CPU. No code in it is run.

    Arguments:
        path: The file.

    Returns:
        What was written.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is corrupt, or is no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()  # torch does not check the sums itself
        if broken is not None:
            raise zipfile.BadZipFile(f"the part '{broken}' does not fit its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # any byte may be wrong, so anything may be raised
        reason = str(error).splitlines()[0].partition(". ")[0] if str(error) else repr(error)
        raise ValueError(
            f"Expected '{path}' to be a whole checkpoint; got a corrupt file ({reason}). Delete it"
            " to start anew, or restore an older copy."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        kind = content.get("format", "none") if isinstance(content, dict) else "none"
        raise ValueError(
            f"Expected '{path}' to be a checkpoint of fit() ({FORMAT}); got a file of the format"
            f" {kind!r}."
        )
    missing = [part for part in PARTS if part not in content]
    if missing:
        raise ValueError(f"Expected '{path}' to be a whole checkpoint; got one without {missing}.")
    return content


def identity(
    objective: ELBO, optimizer: Optimizer, scheduler: Any, others: Mapping[str, Any]
) -> dict[str, str]:
    """Describes what a checkpoint belongs to: each part by its name, in words.

    Arguments:
        objective: The objective.
        optimizer: The optimiser.
        scheduler: The scheduler of the learning rate, or `None`.
        others: What else must be the same, by name.

    Returns:
        The descriptions by name.
    """
    groups = [len(group["params"]) for group in optimizer.param_groups]
    return {
        **{
            name: f"{tuple(value.shape)} of {value.dtype}"
            for name, value in objective.state_dict().items()
        },
        "base": type(objective.model.base).__name__,
        "likelihood": type(objective.likelihood).__name__,
        "num_data": str(objective.num_data),
        "prior": str(objective.model.guide.priors),
        "optimizer": f"{type(optimizer).__name__} of {groups} parameters",
        "scheduler": type(scheduler).__name__,
        **{name: str(value) for name, value in others.items()},
    }


def check_identity(path: Path, saved: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises a `ValueError` that names what differs, unless a checkpoint belongs to a model.

    Arguments:
        path: The file.
        saved: What the file belongs to.
        here: What is to continue from it.
    """
    names = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
    if names:
        shown = [
            f"  {name}: {saved.get(name, 'nothing')} in the file, {here.get(name, 'nothing')} here"
            for name in names[:8]
        ]
        more = [f"  and {len(names) - 8} more"] if len(names) > 8 else []
        raise ValueError(
            f"Expected '{path}' to be a checkpoint of this training; got one that differs:\n"
            + "\n".join(shown + more)
        )
