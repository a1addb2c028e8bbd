"""Evaluation: public benchmarks by their published protocols, and suites of your own. See docs/evaluation.md."""

from .protocol import Judge, Task
from .report import figure, has_failed_tasks, model_index, report
from .run import Options, evaluate
from .tasks import TASKS, find_tasks

__all__ = [
    "TASKS",
    "Judge",
    "Options",
    "Task",
    "evaluate",
    "figure",
    "find_tasks",
    "has_failed_tasks",
    "model_index",
    "report",
]
