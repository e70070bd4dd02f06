"""Cells on a Dask cluster: worker processes of this machine, or of any machines that see the same files."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Client

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
CONNECT = 10.0  # seconds within which a scheduler has to answer
LOOK = 1.0  # seconds between two looks at which workers there are
# What Dask looks up about itself many times a second takes a few percent of a core in every process; notebooks need it.
QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "10s",
}


@contextlib.contextmanager
def joined(workers: int = 1, scheduler: str | None = None) -> Iterator[Client | None]:
    """The client of a cluster, while inside; None where one cell at a time on this machine needs no cluster.

    workers    processes on this machine, one cell at a time each; its cores and GPUs are shared out between them
    scheduler  address of a running scheduler, whose workers are used instead

    ConnectionError where none answers there; ImportError where dask.distributed is not installed.
    """
    if workers < 1:
        raise ValueError(f"workers = {workers}, expected at least 1")
    if scheduler is None and workers == 1:
        yield None
        return
    try:
        import dask
        from distributed import Client, Nanny, Scheduler, SpecCluster
    except ImportError:
        raise ImportError("more than one worker needs dask.distributed: pip install 'memoir[cluster]'") from None
    if scheduler is not None:
        client = Client.__new__(Client)  # made in two steps, so that one that could not start is at hand
        try:
            client.__init__(scheduler, timeout=CONNECT)
        except Exception as error:  # what a wrong address raises depends on what is there instead
            # Left to the garbage collector, it would be closed in the middle of anything, such as Dask's starting a
            # thread, whose lock the closing then waits for without end.
            client.close()
            raise ConnectionError(f"no Dask scheduler answers at {scheduler!r}: {error}") from None
        with client:
            if not _workers(client):
                print(f"{scheduler} has no workers yet: waiting for one", file=sys.stderr)
            yield client
        return
    import torch  # not above: workers come by here too

    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = gpus if gpus != [""] else [str(i) for i in range(torch.cuda.device_count())]
    options = shares(workers, os.cpu_count() or 1, gpus)
    with (
        dask.config.set(QUIET),
        SpecCluster(
            workers={i: {"cls": Nanny, "options": given} for i, given in enumerate(options)},
            scheduler={"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}},
            silence_logs=logging.ERROR,
        ) as local,
        Client(local) as client,
    ):
        yield client


def shares(workers: int, cores: int, gpus: Sequence[str]) -> list[dict[str, Any]]:
    """Options of each worker's `distributed.Nanny`: this machine's cores and GPUs, shared out.

    A worker that has GPUs has one "GPU" to give away: the run that gets it may spread over all of them.
    """
    threads = dict.fromkeys(THREADS, str(max(1, cores // workers)))
    options = []
    for i in range(workers):
        mine = gpus[i::workers]
        options.append(
            {
                "nthreads": 1,
                "silence_logs": logging.ERROR,
                "memory_limit": 0,  # Dask sees the memory of the worker, not that of its notebook
                "env": threads | ({"CUDA_VISIBLE_DEVICES": ",".join(mine)} if gpus else {}),
                "resources": {"GPU": 1} if mine else {},
            }
        )
    return options


def outcomes(
    client: Client, function: Callable[..., str | None], cells: Sequence[Any], *arguments: Any
) -> Iterator[tuple[Any, str | None]]:
    """Each cell as it ends, with what function(cell, *arguments) gave for it: None, or why it failed.

    A cell whose worker dies runs again on another one; Dask calls it failed when that has happened more often than its
    `distributed.scheduler.allowed-failures`. Where workers have the resource "GPU", a cell that runs a model asks for
    one. No more cells are handed over than workers can run at once, since a dying worker counts against all it holds.
    """
    from distributed import wait

    waiting, running = deque(cells), {}
    try:
        while waiting or running:
            workers = _workers(client)
            while waiting:
                gpus = sum(int(worker["resources"].get("GPU", 0)) for worker in workers) if waiting[0].gpu else 0
                if len(running) >= (gpus or sum(worker["nthreads"] for worker in workers)):
                    break
                cell = waiting.popleft()
                needs = {"GPU": 1} if gpus else None
                running[client.submit(function, cell, *arguments, resources=needs, pure=False)] = cell
            if not running:
                time.sleep(LOOK)
                continue
            with contextlib.suppress(TimeoutError, CancelledError):  # look again: workers may have come, or all be lost
                wait(list(running), timeout=LOOK, return_when="FIRST_COMPLETED")
            for job in [job for job in running if job.done()]:
                yield running.pop(job), _result(job)
    except OSError as error:  # the scheduler is gone, and with it what it had
        for cell in (*running.values(), *waiting):
            yield cell, f"{type(error).__name__}: {error}"


def _result(job: Any) -> str | None:
    try:
        return job.result()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _workers(client: Client) -> list[dict[str, Any]]:
    """What the scheduler knows of the workers that are up; ConnectionError where it is gone."""
    if client.status == "closed":
        raise ConnectionError("the scheduler is gone")
    found = client.scheduler_info().get("workers", {})  # nothing at all while the connection is made again
    return [worker for worker in found.values() if worker["status"] == "running"]
