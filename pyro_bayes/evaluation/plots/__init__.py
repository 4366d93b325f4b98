"""Figures of calibration, uncertainty, the prior, the posterior and training.

Each function draws on the axes that it is given, or on those of a figure of its own, and returns
them; `ax.figure.savefig("name.pdf")` saves the figure. Nothing goes through
:mod:`matplotlib.pyplot`, whose current figure stays what it is. Calls with the same axes add up, in
colours that the colour-blind can tell apart. The extra `plot` brings matplotlib.
"""

from pyro_bayes.evaluation.plots.calibration import pit_histogram, reliability
from pyro_bayes.evaluation.plots.posterior import scale_histogram, signal_histogram
from pyro_bayes.evaluation.plots.prior import prior_predictive
from pyro_bayes.evaluation.plots.training import Losses, training_curves
from pyro_bayes.evaluation.plots.uncertainty import regression_band, rejection_curve

__all__ = [
    "Losses",
    "pit_histogram",
    "prior_predictive",
    "regression_band",
    "rejection_curve",
    "reliability",
    "scale_histogram",
    "signal_histogram",
    "training_curves",
]
