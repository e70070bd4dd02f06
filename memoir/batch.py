"""Notebooks over a grid: every cell of it is one papermill run.

A cell leaves `reports/<notebook>/<name>.ipynb` and `<name>.json`. Both are moved into place whole, the JSON last: with
what it was made from inside, it is the mark that the cell is finished. So a batch that was killed goes on with the same
command, and a result of another configuration, seed, model or data set is never taken for this one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from nbformat import NotebookNode
from tqdm import tqdm

from memoir import cluster
from memoir.records import read_json, write_json

if TYPE_CHECKING:
    from distributed import Client

UNFINISHED = ".unfinished"
BAR = re.compile(r"\d+%\|")  # a line of a text progress bar
PATIENCE = 600  # seconds that a kernel may take to start, or its output to arrive, on a machine that is busy


@dataclass(frozen=True)
class Cell:
    """One run of a notebook.

    notebook    name of the source, without its ending
    name        of the files that it leaves
    parameters  for its tagged cell; `OUT`, the JSON file, is added when it runs
    inputs      what else the result depends on: resolved settings, digests of model and data
    gpu         whether it runs a model, which goes on a GPU where there is one
    threads     with which its kernel computes; None: as many as the environment says. Sums come out the same to the
                last digit only with equal numbers of them
    """

    notebook: str
    name: str
    parameters: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    gpu: bool = True
    threads: int | None = None

    def path(self, reports: Path, ending: str) -> Path:
        return reports / self.notebook / f"{self.name}{ending}"

    @property
    def made_from(self) -> dict[str, Any]:
        """Parameters and inputs, as they read after a way through JSON."""
        return json.loads(json.dumps({"parameters": self.parameters, "inputs": self.inputs}))

    def finished(self, reports: Path) -> bool:
        """Whether its files are there and were made from the same."""
        try:
            found = read_json(self.path(reports, ".json"))["extra"]["cell"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return found == self.made_from and self.path(reports, ".ipynb").is_file()


# Running -------------------------------------------------------------------------------------------------------------


def run_cells(
    cells: Sequence[Cell], reports: str | os.PathLike, *, client: Client | None = None, fresh: bool = False
) -> dict[str, str]:
    """Run the cells that are not finished yet; name → reason of those that failed, which stop no other.

    client  of a Dask cluster whose workers all see `reports` and the working folder; None: one by one, here
    fresh   run finished ones again
    ValueError before the first run where a notebook has no such parameter.
    """
    reports, folder = Path(reports), Path.cwd()
    for cell in cells:
        check_parameters(cell)
    todo = [cell for cell in cells if fresh or not cell.finished(reports)]
    if len(todo) < len(cells):
        print(f"{len(cells) - len(todo)} of {len(cells)} cells are finished already", file=sys.stderr)
    reports.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    outcomes = (
        ((cell, attempt(cell, reports, folder)) for cell in todo)
        if client is None
        else cluster.outcomes(client, attempt, todo, reports, folder)
    )
    with tqdm(total=len(todo), desc=todo[0].notebook if todo else "cells", unit="cell", disable=not todo) as bar:
        for cell, reason in outcomes:
            if reason is not None:
                failures[cell.name] = f"{reason} (in {reports / cell.notebook / UNFINISHED / cell.name})"
            bar.set_postfix_str(cell.name)
            bar.update()
    for notebook in {cell.notebook for cell in todo}:
        with contextlib.suppress(OSError):  # failed ones are in there
            (reports / notebook / UNFINISHED).rmdir()
    return {cell.name: failures[cell.name] for cell in todo if cell.name in failures}


def attempt(cell: Cell, reports: Path, folder: Path) -> str | None:
    """Run one cell; None, or what went wrong in one line, a notebook's own error without its traceback."""
    try:
        execute(cell, reports, folder)
    except Exception as error:
        name, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", error)
        return f"{name}: {' '.join(str(text).split())}"
    return None


def execute(cell: Cell, reports: Path, folder: Path) -> None:
    """Run one cell. The kernel is the Python that runs this, with its environment; nothing is registered anywhere.

    It works in a folder of its own under `.unfinished/<name>`, and what it leaves there is moved into place at the end.
    A failed cell's notebook stays there to be read. Starting a cell takes the ground from under an attempt at it that
    still runs somewhere, cut off from the batch: that one ends with an error, and never mixes with this one.

    reports  where it leaves its files
    folder   the working folder of the kernel, from which relative paths are read, `reports` too
    """
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    if not (folder / reports).is_dir():
        raise FileNotFoundError(f"{folder / reports} is not there on {platform.node()}: every worker needs to see it")
    place = reports / cell.notebook
    attempts = folder / place / UNFINISHED / cell.name
    shutil.rmtree(attempts, ignore_errors=True)
    attempts.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=attempts))
    out = place / work.relative_to(folder / place) / f"{cell.name}.json"
    notebook, result = work / f"{cell.name}.ipynb", folder / out
    # Not in `work`: a socket's path has about a hundred characters at most, and a shared file system may hold none.
    with tempfile.TemporaryDirectory(prefix="memoir-", ignore_cleanup_errors=True) as sockets:
        papermill.execute_notebook(
            str(source(cell.notebook, folder)),
            str(notebook),
            parameters={**cell.parameters, "OUT": str(out)},
            kernel_name="python3",
            kernel_manager_class=_kernel_manager(cell.threads, sockets),
            shutdown_kernel="immediate",  # all is written by then, and taking an interpreter down tidily takes a second
            resources={"metadata": {"path": str(folder)}},
            progress_bar=False,
            start_timeout=PATIENCE,
            iopub_timeout=PATIENCE,
            coalesce_streams=True,
        )
    data = read_json(result)
    # The notebook shows where its files are, not where they were made.
    executed = nbformat.reads(notebook.read_text(encoding="utf-8").replace(str(out.parent), str(place)), as_version=4)
    nbformat.write(_for_readers(executed), notebook)
    result.unlink()
    for path in sorted(work.iterdir()):
        os.replace(path, folder / place / path.name)
    data["extra"] = {**data.get("extra", {}), "cell": cell.made_from}
    write_json(cell.path(folder / reports, ".json"), data)
    shutil.rmtree(attempts, ignore_errors=True)


def _for_readers(executed: NotebookNode) -> NotebookNode:
    """An executed notebook without what only mattered while it ran: progress bars, and where it lay."""
    for key in ("input_path", "output_path"):
        executed.metadata.papermill.pop(key, None)
    executed.metadata.pop("widgets", None)
    for cell in (cell for cell in executed.cells if cell.cell_type == "code"):
        for output in cell.outputs:
            if output.get("name") == "stderr":
                output.text = "\n".join(line for line in output.text.splitlines() if not BAR.search(line)).strip()
        cell.outputs = [output for output in cell.outputs if _shows(output)]
    return executed


def _shows(output: NotebookNode) -> bool:
    return output.get("text") != "" and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def _kernel_manager(threads: int | None, sockets: str) -> type:
    """A manager of kernels that run this Python with so many threads, whatever kernels the user has registered.

    They are spoken to through files in the folder `sockets`, where the system has such: a port that was free a moment
    ago may be another process's by the time a kernel takes it, when many start at once.
    """
    import zmq
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import Unicode

    spec = KernelSpec(**get_kernel_dict(extra_arguments=["--HistoryManager.enabled=False"]))
    spec.env = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    if threads is not None:
        spec.env |= dict.fromkeys(cluster.THREADS, str(threads))

    class ThisPython(AsyncKernelManager):
        kernel_spec = spec
        if zmq.has("ipc"):
            transport, ip = Unicode("ipc"), Unicode(f"{sockets}/kernel")
        else:
            transport_encryption = Unicode("auto" if zmq.has("curve") else "disabled")

    return ThisPython


def source(notebook: str, folder: Path = Path()) -> Path:
    """The file of a source notebook: of the checkout that the package lies in, else of the working folder."""
    folders = (Path(__file__).parents[1] / "notebooks", folder / "notebooks")
    for folder in folders:
        if (path := folder / f"{notebook}.ipynb").is_file():
            return path
    raise FileNotFoundError(f"no notebook {notebook}.ipynb in {' or '.join(map(str, folders))}: run in a checkout")


def check_parameters(cell: Cell) -> None:
    """ValueError where the notebook knows no such parameter; papermill by itself only logs a warning and goes on."""
    import papermill

    path = source(cell.notebook)
    known = papermill.inspect_notebook(str(path))
    if unknown := sorted(set(cell.parameters) - set(known)):
        raise ValueError(f"{path.name} has no parameter {', '.join(unknown)}; expected {', '.join(known)}")
