"""Where the cells of a batch run: several at a time on this machine, or on a Dask cluster that sees the same files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from itertools import takewhile
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Client

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
CONNECT = 10.0  # seconds within which a scheduler has to answer
LOOK = 1.0  # seconds between polls for new workers


def failure(function: Callable[..., Any], *arguments: Any) -> str | None:
    """Call function(*arguments). Return None, or one line on its error; for an error inside a notebook, on that one."""
    try:
        function(*arguments)
    except Exception as error:
        name, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", error)
        return f"{name}: {' '.join(str(text).split())}"
    return None


# This machine --------------------------------------------------------------------------------------------------------


def shares(workers: int, cores: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """Environments of cells that run at the same time: the machine's cores and GPUs, shared out.

    No two cells share a GPU: with fewer GPUs than workers, there are only as many environments as GPUs.
    """
    workers = min(workers, len(gpus)) if gpus else workers
    if workers == 1:
        return [{}]
    threads = dict.fromkeys(THREADS, str(max(1, cores // workers)))
    return [threads | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus[i::workers])} if gpus else {}) for i in range(workers)]


def visible_gpus() -> list[str]:
    import torch  # a Dask worker imports this module too, and never needs torch itself

    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):  # CUDA reads it up to the first -1
        return list(takewhile(lambda gpu: not gpu.strip().startswith("-"), visible.split(",")))
    return [str(i) for i in range(torch.cuda.device_count())]


def outcomes_here(
    environments: Sequence[dict[str, str]], function: Callable[..., Any], cells: Sequence[Any], *arguments: Any
) -> Iterator[tuple[Any, str | None]]:
    """Run function(cell, *arguments, environment) for each cell, one cell at a time in each environment; yields each
    cell as soon as it ends, and why it failed or None."""
    free = SimpleQueue()
    for environment in environments:
        free.put(environment)

    def run(cell: Any) -> str | None:
        environment = free.get()
        try:
            return failure(function, cell, *arguments, environment)
        finally:
            free.put(environment)

    pool = ThreadPoolExecutor(len(environments))
    try:
        futures = {pool.submit(run, cell): cell for cell in cells}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:  # also after Ctrl-C, which must not wait for the cells that are running
        pool.shutdown(wait=False, cancel_futures=True)


# A Dask cluster ------------------------------------------------------------------------------------------------------


def joined(scheduler: str) -> Client:
    """The client of a running scheduler, to be closed by the caller.

    ConnectionError where no scheduler answers; ImportError where dask.distributed is not installed.
    """
    try:
        from distributed import Client
        from distributed.comm import connect
        from distributed.security import Security
    except ImportError:
        raise ImportError("a cluster needs dask.distributed: pip install 'memoir[cluster]'") from None

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


def running_workers(client: Client) -> list[dict[str, Any]]:
    """What the scheduler knows of its running workers; ConnectionError where the scheduler is gone."""
    if client.status == "closed":
        raise ConnectionError("the scheduler is gone")
    workers = client.scheduler_info().get("workers", {})  # empty while the client connects again
    return [worker for worker in workers.values() if worker["status"] == "running"]
