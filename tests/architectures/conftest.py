"""Lets timm be imported where the operators of torchvision, which it does not use, do not load."""

import re
import sys

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")


def _import_torchvision() -> None:
    for _ in range(20):
        try:
            import torchvision  # noqa: F401
        except ImportError:
            return
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                return
            _library.define(f"{missing[1]}() -> Tensor")
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            return


_import_torchvision()
