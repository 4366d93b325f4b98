"""Optional dependencies."""

from __future__ import annotations

import importlib


def require(package: str, *, extra: str) -> None:
    """Checks that an optional dependency is there.

    Arguments:
        package: The name under which it is imported.
        extra: The extra of this project that brings it.

    Raises:
        ImportError: If it is missing, naming the extra.
    """
    try:
        importlib.import_module(package)
    except ImportError:
        raise ImportError(
            f"Expected the package '{package}' to be installed; got none. Install it with"
            f" `pip install 'pyro_bayes[{extra}]'`."
        ) from None
