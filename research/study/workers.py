"""The processes of a study: one thread each, ended with the study that started them."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor

import torch


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """A pool of this many processes."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker)


def begin_worker() -> None:
    """Initialises a process: one thread, and it ends with its parent."""
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Waits for the parent process to end, then ends this one; a pool's workers would otherwise stay."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
