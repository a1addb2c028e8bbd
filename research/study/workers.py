"""The processes of a study: a thread each, and none outlives the study that began them."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor

import torch


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """A pool of so many processes."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker)


def begin_worker() -> None:
    """One thread for each process, which ends with the one that started it, however that ends."""
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Waits for the process that started this one to end, then ends this one: a pool's own workers would stay."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
