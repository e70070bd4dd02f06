"""Run notebooks with papermill, one cell of a grid at a time, and skip the cells that are finished.

A finished cell leaves `<reports>/<notebook>/<name>.ipynb` and `<name>.json`. The JSON is completed last, with a record
of everything the cell was made from. So a batch that was killed continues with the same command, and a result of
another configuration, seed, model or data set never counts as this cell's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import papermill
import zmq
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from tqdm import tqdm
from traitlets import Dict
from traitlets.config import Config

from memoir import cluster
from memoir.files import read_json, write_atomically, write_json

if TYPE_CHECKING:
    from distributed import Client

UNFINISHED = ".unfinished"  # folder of notebooks that are running or that failed
PATIENCE = 600  # seconds that a busy machine may take to start a kernel or to deliver its output
WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Cell:
    """One run of a notebook. ValueError where the notebook does not have one of the parameters.

    notebook    name of the source, without its ending
    name        name of the files that the cell leaves, without their endings
    parameters  values for the notebook's tagged cell; `OUT`, the JSON file, and `SAVE_TO` are added when the cell runs
    inputs      what else the result depends on: resolved settings, digests of model and data
    gpu         whether the cell runs a model, which goes on a GPU where there is one
    threads     number of threads of its kernel; None: the environment decides. Sums come out the same to the last digit
                only with equal numbers of threads
    commit      of the code: an unfinished run resumes only under the same commit; a finished cell counts under any
    command     the command line that asked for the cell, kept with its result; None if there was none
    """

    notebook: str
    name: str
    parameters: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    gpu: bool = True
    threads: int | None = None
    commit: str | None = None
    command: str | None = None

    def __post_init__(self) -> None:
        # papermill only logs a warning for an unknown parameter, and runs the notebook with its default.
        path = source(self.notebook)
        known = [name for name in papermill.inspect_notebook(str(path)) if name not in ("OUT", "SAVE_TO")]
        if unknown := sorted(set(self.parameters) - set(known)):
            raise ValueError(f"{path.name} has no parameter {', '.join(unknown)}; expected {', '.join(known)}")

    def path(self, reports: Path, ending: str) -> Path:
        return reports / self.notebook / f"{self.name}{ending}"

    @property
    def made_from(self) -> dict[str, Any]:
        """Parameters and inputs, as JSON reads them back."""
        return json.loads(json.dumps({"parameters": self.parameters, "inputs": self.inputs}))

    def unfinished(self, reports: Path, ending: str) -> Path:
        return reports / self.notebook / UNFINISHED / f"{self.name}{ending}"

    def kept(self, reports: Path) -> Path:
        """Where an unfinished run is kept. Other code, parameters or inputs have another folder."""
        made_from = json.dumps([self.made_from, self.commit])
        return self.unfinished(reports, f".{hashlib.sha256(made_from.encode()).hexdigest()[:12]}.run")

    def finished(self, reports: Path) -> bool:
        """Whether both files are there and were made from the same parameters and inputs."""
        try:
            made_from = read_json(self.path(reports, ".json"))["extra"]["cell"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return made_from == self.made_from and self.path(reports, ".ipynb").is_file()


def source(notebook: str, folder: Path = Path()) -> Path:
    """The file of a source notebook: in the checkout that holds the package, or in the working folder."""
    paths = [place / "notebooks" / f"{notebook}.ipynb" for place in (Path(__file__).parents[1], folder)]
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no notebook {' or '.join(map(str, paths))}: run in a checkout")


def run_cells(
    cells: Sequence[Cell],
    reports: str | os.PathLike,
    *,
    workers: int = 1,
    client: Client | None = None,
    fresh: bool = False,
) -> dict[str, str]:
    """Run the cells that are not finished yet. A cell that fails stops no other; returns name → reason of each failure.

    workers  cells at a time on this machine; its cores and GPUs are shared out between them
    client   of a Dask cluster whose workers all see `reports` and the working folder, and run the cells instead
    fresh    run finished cells again
    """
    reports, folder = Path(reports), Path.cwd()
    todo = [cell for cell in cells if fresh or not cell.finished(reports)]
    if len(todo) < len(cells):
        print(f"{len(cells) - len(todo)} of {len(cells)} cells are finished already", file=sys.stderr)
    if begun := sum(cell.kept(reports).is_dir() for cell in todo):
        print(f"{begun} of {len(todo)} cells resume from a saved run", file=sys.stderr)
    reports.mkdir(parents=True, exist_ok=True)
    if client is None:
        gpus = cluster.visible_gpus() if any(cell.gpu for cell in todo) else []
        environments = cluster.shares(workers, os.cpu_count() or 1, gpus)
        outcomes = cluster.outcomes_here(environments, execute, todo, reports, folder)
    else:
        outcomes = cluster.outcomes(client, execute, todo, reports, folder)
    failures = {}
    for cell, reason in tqdm(outcomes, total=len(todo), desc="notebooks", unit="cell", disable=not todo):
        if reason is not None:
            failures[cell.name] = f"{reason} (in {cell.unfinished(reports, '.ipynb')})"
    for notebook in {cell.notebook for cell in todo}:
        with contextlib.suppress(OSError):  # the folder still holds the notebooks of failed cells
            (reports / notebook / UNFINISHED).rmdir()
    return failures


def execute(cell: Cell, reports: Path, folder: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run one cell and leave its files. The notebook of a failed cell stays in `.unfinished` to be read.

    reports      where the files go
    folder       working folder of the kernel; relative paths start there, `reports` too
    environment  variables of the kernel beside those of this process
    """
    logging.getLogger("papermill").setLevel(logging.ERROR)
    if not (folder / reports).is_dir():
        raise FileNotFoundError(f"{folder / reports} is not there on {platform.node()}: every worker needs to see it")
    result = cell.path(reports, ".json")
    (folder / result).unlink(missing_ok=True)  # an earlier result must not pass for this one
    running = cell.unfinished(folder / reports, ".ipynb")
    running.parent.mkdir(parents=True, exist_ok=True)
    notebook = str(source(cell.notebook, folder))
    own = {"OUT": str(result)}
    if "SAVE_TO" in papermill.inspect_notebook(notebook):
        own["SAVE_TO"] = str(cell.kept(reports))
    # Sockets lie in the system's own folder for temporary files: their paths may only have about a hundred characters,
    # and a shared file system may not hold any.
    with tempfile.TemporaryDirectory(prefix="memoir-", ignore_cleanup_errors=True) as sockets:
        executed = papermill.execute_notebook(
            notebook,
            str(running),
            parameters={**cell.parameters, **own},
            kernel_name="python3",
            kernel_manager_class=ThisPython,
            config=kernel_config(sockets, cell.threads, environment or {}),
            shutdown_kernel="immediate",  # everything is written by then; an orderly end takes a second more
            resources={"metadata": {"path": str(folder)}},
            progress_bar=False,
            start_timeout=PATIENCE,
            iopub_timeout=PATIENCE,
            coalesce_streams=True,
            store_widget_state=False,
        )
    tidy(executed)
    write_atomically(cell.path(folder / reports, ".ipynb"), lambda path: nbformat.write(executed, path))
    data = read_json(folder / result)
    data["extra"] = {**data.get("extra", {}), "cell": cell.made_from, "command": cell.command}
    write_json(folder / result, data)
    running.unlink(missing_ok=True)
    for kept in running.parent.glob(f"{cell.name}.*.run"):
        shutil.rmtree(kept, ignore_errors=True)


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Remove from an executed notebook its progress bars and the paths of the machine that ran it."""
    for key in ("input_path", "output_path"):
        notebook.metadata.papermill.pop(key, None)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        for output in cell.outputs:
            if output.get("name") == "stderr":
                output.text = "\n".join(line for line in output.text.splitlines() if "%|" not in line).strip()
        cell.outputs = [out for out in cell.outputs if out.get("text") != "" and WIDGET not in out.get("data", {})]


class ThisPython(AsyncKernelManager):
    """Starts the running Python as the kernel, whatever kernels the user has registered."""

    environment = Dict(help="variables added to the environment of the kernel").tag(config=True)

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict(), env=self.environment)


def kernel_config(sockets: str, threads: int | None, environment: Mapping[str, str]) -> Config:
    """Configuration of a kernel. Its sockets are files in the folder `sockets`, where the system has such sockets: a
    port that is free now may be taken when the kernel opens it, if many start at once."""
    environment = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", **environment}
    if threads is not None:
        environment |= dict.fromkeys(cluster.THREADS, str(threads))
    connection = {"transport": "ipc", "ip": f"{sockets}/kernel"} if zmq.has("ipc") else {}
    return Config(ThisPython={"environment": environment, **connection})
