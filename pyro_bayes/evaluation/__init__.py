"""From a posterior to scores: :func:`evaluate` makes one table of them, with their errors."""

from pyro_bayes.evaluation import metrics
from pyro_bayes.evaluation.evaluate import evaluate
from pyro_bayes.evaluation.result import Evaluation, Row

__all__ = ["Evaluation", "Row", "evaluate", "metrics"]
