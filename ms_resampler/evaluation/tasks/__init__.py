"""The tasks by name, and named sets of them."""

from collections.abc import Sequence
from pathlib import Path

from ..protocol import Task
from ..suite import suite_tasks
from . import (
    ai2d,
    chartqa,
    docvqa,
    gqa,
    mmbench,
    mme,
    mmmu,
    mmvet,
    ocrbench,
    pope,
    scienceqa,
    seed,
    textvqa,
    vizwiz,
    vqav2,
)

TEN = (
    vqav2.TASK, gqa.TASK, vizwiz.TASK, scienceqa.TASK, textvqa.TASK, pope.TASK, mme.TASK,
    mmbench.ENGLISH, mmbench.CHINESE, mmvet.TASK,
)  # fmt: skip
MORE = (seed.TASK, mmmu.TASK, ai2d.TASK, chartqa.TASK, docvqa.TASK, ocrbench.TASK)
TASKS = {task.name: task for task in (*TEN, *MORE)}
SETS = {"ten": TEN, "all": (*TEN, *MORE)}


def find_tasks(names: Sequence[str | Path]) -> list[Task]:
    """The tasks for names, sets and paths of suites, each once. Raises ValueError if one is unknown."""
    found: dict[str, Task] = {}
    for name in map(str, names):
        if name in SETS:
            new = list(SETS[name])
        elif name in TASKS:
            new = [TASKS[name]]
        elif Path(name).exists():
            new = suite_tasks(Path(name))
        else:
            known = ", ".join([*SETS, *TASKS])
            raise ValueError(f"There is no task {name!r}; there are {known}, and the paths of suites.")
        for task in new:
            if found.setdefault(task.name, task) is not task:
                raise ValueError(f"Two tasks are called {task.name!r}: rename one of the suites' files.")
    return list(found.values())
