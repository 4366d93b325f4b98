"""Runs the tests of the kernels where there is no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, which runs them itself")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_by_the_interpreter():
    tests = Path(__file__).with_name("test_kernels.py")
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    result = subprocess.run(
        run, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        check=False, cwd=tests.parents[2],
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert " passed" in result.stdout
