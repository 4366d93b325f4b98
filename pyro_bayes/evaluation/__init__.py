"""From a posterior to scores, figures and ArviZ.

:func:`~pyro_bayes.evaluate` scores predictions, in one table, with the errors of the scores.
:mod:`~pyro_bayes.evaluation.plots` draws figures of what it found, of the posterior and of
training. :func:`to_arviz` exports draws and predictions.
"""

from pyro_bayes.evaluation import metrics, plots
from pyro_bayes.evaluation.evaluate import evaluate
from pyro_bayes.evaluation.export import to_arviz
from pyro_bayes.evaluation.result import Evaluation, Row

__all__ = ["Evaluation", "Row", "evaluate", "metrics", "plots", "to_arviz"]
