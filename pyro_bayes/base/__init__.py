"""What is done to the module that is made Bayesian: selection, swap, ownership, state."""
