"""Run functions on a Dask cluster: worker processes of this machine, or of any machines that see the same files."""

from __future__ import annotations

import asyncio
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


@contextlib.contextmanager
def joined(workers: int = 1, scheduler: str | None = None) -> Iterator[Client | None]:
    """The client of a cluster, closed at the end of the block; None where one process is enough.

    workers    processes on this machine; its cores and GPUs are shared out between them
    scheduler  address of a running scheduler, whose workers are used instead

    ConnectionError where no scheduler answers; ImportError where dask.distributed is not installed.
    """
    if workers < 1:
        raise ValueError(f"workers = {workers}, expected at least 1")
    if scheduler is None and workers == 1:
        yield None
        return
    try:
        import distributed  # noqa: F401
    except ImportError:
        raise ImportError("more than one worker needs dask.distributed: pip install 'memoir[cluster]'") from None
    with running_cluster(scheduler) if scheduler is not None else local_cluster(workers) as client:
        yield client


def running_cluster(scheduler: str) -> Client:
    """The client of a scheduler that somebody started."""
    from distributed import Client
    from distributed.comm import connect
    from distributed.security import Security

    async def try_address() -> None:
        connection = await connect(scheduler, timeout=CONNECT, **Security().get_connection_args("client"))
        await connection.close()

    # A Client that cannot connect raises from its constructor and is never closed. So the address is tried first.
    try:
        asyncio.run(try_address())
    except Exception as error:  # its type depends on what is wrong with the address
        raise ConnectionError(f"no Dask scheduler answers at {scheduler!r}: {error}") from None
    client = Client(scheduler, timeout=CONNECT)
    if not running_workers(client):
        print(f"{scheduler} has no workers yet: waiting for one", file=sys.stderr)
    return client


@contextlib.contextmanager
def local_cluster(workers: int) -> Iterator[Client]:
    """The client of a cluster of processes on this machine, which ends with the block."""
    import torch  # workers import this module too, and never need torch themselves
    from distributed import Client, Nanny, Scheduler, SpecCluster

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    options = shares(workers, os.cpu_count() or 1, gpus)
    with (
        SpecCluster(
            workers={i: {"cls": Nanny, "options": share} for i, share in enumerate(options)},
            scheduler={"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}},
            silence_logs=logging.ERROR,
        ) as processes,
        Client(processes) as client,
    ):
        yield client


def shares(workers: int, cores: int, gpus: Sequence[str]) -> list[dict[str, Any]]:
    """Options of each worker's `distributed.Nanny`: this machine's cores and GPUs, shared out.

    A worker with GPUs has one unit of the resource "GPU": the cell that gets it may use all GPUs of this worker.
    """
    threads = dict.fromkeys(THREADS, str(max(1, cores // workers)))
    options = []
    for i in range(workers):
        share = gpus[i::workers]
        options.append(
            {
                "nthreads": 1,
                "silence_logs": logging.ERROR,
                "memory_limit": 0,  # Dask would only see the worker's memory, not its notebook's
                "env": threads | ({"CUDA_VISIBLE_DEVICES": ",".join(share)} if gpus else {}),
                "resources": {"GPU": 1} if share else {},
            }
        )
    return options


def outcomes(
    client: Client, function: Callable[..., Any], cells: Sequence[Any], *arguments: Any
) -> Iterator[tuple[Any, str | None]]:
    """Run function(cell, *arguments) for each cell; yields each cell as soon as it ends, and why it failed or None.

    A cell whose worker dies runs again on another worker, at most `distributed.scheduler.allowed-failures` times. Where
    workers have the resource "GPU", a cell that runs a model takes one unit of it. A dying worker counts against every
    cell that it holds, so the workers never hold more cells than they can run at once.
    """
    from distributed import wait

    waiting, running = deque(cells), {}
    try:
        while waiting or running:
            workers = running_workers(client)
            while waiting:
                gpus = sum(int(worker["resources"].get("GPU", 0)) for worker in workers) if waiting[0].gpu else 0
                if len(running) >= (gpus or sum(worker["nthreads"] for worker in workers)):
                    break
                cell, resources = waiting.popleft(), {"GPU": 1} if gpus else None
                running[client.submit(function, cell, *arguments, resources=resources, pure=False)] = cell
            if not running:
                time.sleep(LOOK)
                continue
            with contextlib.suppress(TimeoutError, CancelledError):  # then look for workers again
                wait(list(running), timeout=LOOK, return_when="FIRST_COMPLETED")
            for future in [future for future in running if future.done()]:
                yield running.pop(future), failure(future.result)
    except OSError as error:  # the scheduler is gone, and all its cells with it
        for cell in (*running.values(), *waiting):
            yield cell, f"{type(error).__name__}: {error}"


def failure(function: Callable[..., Any], *arguments: Any) -> str | None:
    """Call function(*arguments). None, or one line on the error: of a notebook's own error, without its traceback."""
    try:
        function(*arguments)
    except Exception as error:
        name, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", error)
        return f"{name}: {' '.join(str(text).split())}"
    return None


def running_workers(client: Client) -> list[dict[str, Any]]:
    """What the scheduler knows of its running workers; ConnectionError where the scheduler is gone."""
    if client.status == "closed":
        raise ConnectionError("the scheduler is gone")
    workers = client.scheduler_info().get("workers", {})  # empty while the client connects again
    return [worker for worker in workers.values() if worker["status"] == "running"]
