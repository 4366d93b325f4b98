"""The peak memory of training: on a CPU, that of a process of its own.

python benchmarks/memory.py mlp weights
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyro
import torch
from contenders import CONTENDERS
from nets import PROBLEMS, Problem
from timing import reason

STEPS = 5


def high_water() -> int:
    """Returns the largest resident memory that the process has had, in bytes.

    Linux only. `resource.getrusage` would include what the parent process had.

    Raises:
        OSError: If the system does not tell.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("no VmHWM")


def growth(problem: str, contender: str) -> int:
    """Returns by how many bytes the peak grows as a network is built and trained.

    Libraries are imported, and what they start with is in place, by training a small net first.

    Arguments:
        problem: The name of the network.
        contender: The name of the contender.
    """
    for name, steps in (("small", 2), (problem, STEPS)):
        pyro.clear_param_store()
        before = high_water()
        running = CONTENDERS[contender](PROBLEMS[name])
        for _ in range(steps):
            running.step()
    return high_water() - before


def allocated(problem: Problem, contender: str) -> int:
    """Returns the largest sum of bytes that tensors have on a GPU as a network is trained."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    running = CONTENDERS[contender](problem)
    for _ in range(STEPS):
        running.step()
    return torch.cuda.max_memory_allocated() - before


def measure(problem: str, contender: str, device: str) -> str:
    """Returns a cell of a table."""
    if device != "cpu":
        pyro.clear_param_store()
        try:
            count = allocated(replace(PROBLEMS[problem], device=device), contender)
        except Exception as error:
            return reason(error)
        return f"{count / 2**20:.0f} MiB"
    run = [sys.executable, "-W", "ignore", __file__, problem, contender]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    if result.returncode:
        return f"cannot: exit status {result.returncode}"
    answer = json.loads(result.stdout.splitlines()[-1])
    return str(answer) if isinstance(answer, str) else f"{answer / 2**20:.0f} MiB"


if __name__ == "__main__":
    try:
        print(json.dumps(growth(*sys.argv[1:])))
    except Exception as error:
        print(json.dumps(reason(error)))
