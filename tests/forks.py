"""Processes for tests, which start in milliseconds: forked from one that has the imports."""

import multiprocessing

IMPORTS = ["pyro_bayes.training", "torch.distributed", "torch._dynamo", "numpy", "pytest"]


def context():
    """Returns a context whose processes have imported what tests need before they start."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(IMPORTS)  # what cannot be imported is passed over
    return found
