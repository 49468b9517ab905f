"""Measure what compression costs on your own questions: scores, tokens and time of each budget, beside baselines.

`evaluate` is also `hf_vtc.evaluate`. `scores.py` has the metrics, `statistics.py` the intervals, `points.py` and
`baselines.py` what is compared, `running.py` the asking, `recommendation.py` the sentence, `report.py` the files.
"""

from .questions import Question, read_questions, records_to_ask
from .recommendation import Recommendation
from .report import EvalReport
from .scores import METRICS, Metric
from .summary import Row
from .sweep import evaluate

__all__ = [
    "METRICS",
    "EvalReport",
    "Metric",
    "Question",
    "Recommendation",
    "Row",
    "evaluate",
    "read_questions",
    "records_to_ask",
]
