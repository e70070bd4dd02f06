"""Cells on a Dask cluster, with a real scheduler and real worker processes: the same reports, whatever dies."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import dask
import nbformat
import psutil
import pytest
from distributed import Client, Nanny, Scheduler, SpecCluster

import memoir as mm
from memoir import __main__ as cli
from memoir import batch, cluster, grid
from memoir.batch import Cell

pytestmark = [
    pytest.mark.xdist_group("cluster"),  # whose fixtures are made once
    pytest.mark.filterwarnings("ignore:Creating scratch directories"),  # Dask's, on a busy machine
]

STAMP = """
import json, os, time
from pathlib import Path

with Path("pids").open("a") as pids:
    pids.write(f"{SEED} {os.getpid()} {os.getppid()}\\n")
time.sleep(SECONDS)
assert SEED != 13, "unlucky"
Path(OUT).write_text(json.dumps({"square": SEED**2, "threads": os.environ.get("OMP_NUM_THREADS")}))
SEED**2
"""


@pytest.fixture
def stamps(tmp_path, monkeypatch):
    """Makes cells of a notebook that imports nothing heavy: it notes by which process it is run."""
    parameters = nbformat.v4.new_code_cell("SEED = 0\nSECONDS = 0\nOUT = None")
    parameters.metadata.tags = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(STAMP)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "stamp.ipynb")
    monkeypatch.chdir(tmp_path)

    def cells(*seeds: int, **parameters) -> list[Cell]:
        return [Cell("stamp", f"stamp{seed}", {"SEED": seed, **parameters}, threads=3) for seed in seeds]

    return cells


@pytest.fixture(scope="module")
def two_workers():
    with running_cluster({}, {}) as there, cluster.joined(there.scheduler_address) as client:
        yield client


def running_cluster(*options: dict) -> SpecCluster:
    """A scheduler and a worker for each of the options, as somebody else would have started them."""
    usual = {"nthreads": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    return SpecCluster(
        workers={i: {"cls": Nanny, "options": usual | given} for i, given in enumerate(options)},
        scheduler={"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}},
        silence_logs=logging.CRITICAL,
    )


@pytest.fixture(scope="module")
def one_gpu():
    """A cluster whose second worker has two places, but one GPU; the first death of a worker counts."""
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        there = running_cluster({}, {"nthreads": 2, "resources": {"GPU": 1}})
    with there, cluster.joined(there.scheduler_address) as client:
        yield client


def started() -> list[tuple[int, int, int]]:
    """Seed, kernel and its parent of every cell that has begun, in this order."""
    with contextlib.suppress(FileNotFoundError):
        return [tuple(map(int, line.split())) for line in Path("pids").read_text().splitlines()]
    return []


def open_clients() -> set[str]:
    """Of this process, by their ids, as far as the garbage collector knows any."""
    return {thing.id for thing in gc.get_objects() if type(thing) is Client and thing.status != "closed"}


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing to see after {seconds} s"
        time.sleep(0.02)


def reports(folder: str) -> dict[str, str]:
    """What is in a reports' folder, by name; times and kernels' ids left out."""
    found = {}
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        text = path.read_text()
        if path.suffix == ".ipynb":
            notebook = nbformat.reads(text.replace(folder, "reports"), as_version=4)
            notebook.metadata.pop("papermill")
            text = repr([(cell.source, cell.get("outputs")) for cell in notebook.cells])
        elif path.suffix == ".json":
            data = json.loads(text)
            for place in (data, data["extra"], data.get("info", {})):
                for name in ("seconds", "started", "finished", "peak_bytes"):
                    place.pop(name, None)
            for edit in data.get("edits", ()):
                edit.pop("seconds", None)
            text = json.dumps(data)
        found[str(path.relative_to(folder))] = text
    return found


# Sharing out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("cores", [1, 2, 16])
@pytest.mark.parametrize("gpus", [[], ["0", "1"], ["2", "5", "7"]])
def test_cores_and_gpus_are_shared_out(workers, cores, gpus):
    environments = cluster.shares(workers, cores, gpus)
    at_once = min(workers, len(gpus)) if gpus else workers
    threads = [int(environment["OMP_NUM_THREADS"]) for environment in environments]
    assert len(environments) == at_once and min(threads) >= 1 and sum(threads) <= max(cores, at_once)
    visible = [gpu for environment in environments for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    assert sorted(visible) == (gpus or [""] * at_once)


@pytest.mark.parametrize("gpus", [[], ["0"]])
def test_a_cell_that_runs_alone_has_the_whole_machine(gpus):
    assert cluster.shares(1, 16, gpus) == [{}]
    assert len(cluster.shares(4, 16, ["0"])) == 1  # runs never share a GPU


@pytest.mark.parametrize(
    ("visible", "gpus"), [("0", ["0"]), ("2,GPU-5a", ["2", "GPU-5a"]), ("-1", []), ("1,-1,2", ["1"])]
)
def test_gpus_that_the_environment_hides_do_not_count(monkeypatch, visible, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cluster.visible_gpus() == gpus


def test_cells_run_here_at_the_same_time_and_each_in_an_environment_of_its_own():
    meeting, at_once = threading.Barrier(2, timeout=60), []

    def run(cell, environment):
        at_once.append(environment["share"])
        meeting.wait()
        if cell == "b":
            raise ValueError("two\nlines")

    environments = [{"share": 1}, {"share": 2}]
    ended = dict(cluster.outcomes_here(environments, run, "abcd"))
    assert ended == {"a": None, "b": "ValueError: two lines", "c": None, "d": None}
    assert sorted(at_once) == [1, 1, 2, 2] and set(at_once[:2]) == {1, 2}


def test_a_cluster_needs_dask(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"pip install 'memoir\[cluster\]'"):
        cluster.joined("tcp://127.0.0.1:1")


def test_no_workers_are_refused(tmp_path, capsys):
    assert cli.main(["report", "--only", "columns", "--workers", "0", "--out", str(tmp_path / "out")]) == 2
    assert "workers = 0, expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense"])
@pytest.mark.parametrize("command", [["tables", "--methods", "unedited"], ["report"]])
def test_a_scheduler_that_does_not_answer_is_named(tmp_path, monkeypatch, capsys, command, address):
    monkeypatch.setattr(cluster, "CONNECT", 0.3)
    assert cli.main([*command, "--out", str(tmp_path / "reports"), "--scheduler", address]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith(f"memoir: no Dask scheduler answers at {address!r}")
    assert not (tmp_path / "reports").exists()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense", "nonsense://x:1", "tcp://host:port", "tcp://:1"])
def test_no_client_is_left_half_made(monkeypatch, address):
    monkeypatch.setattr(cluster, "CONNECT", 0.3)
    before = open_clients()
    with pytest.raises(ConnectionError):
        cluster.joined(address)
    assert open_clients() <= before  # each would be closed as garbage, and that can wait for itself


# Running -------------------------------------------------------------------------------------------------------------


def kept(folder: str) -> dict[str, str]:
    return {name: text for name, text in reports(folder).items() if ".unfinished" not in name}


@pytest.mark.notebook
def test_two_at_a_time_leave_what_one_by_one_leaves(stamps):
    cells = stamps(1, 13, 2, 3)
    batch.run_cells(cells, "alone")
    assert list(batch.run_cells(cells, "pair", workers=2)) == ["stamp13"]
    assert kept("alone") == kept("pair") and len(kept("pair")) == 6


@pytest.mark.notebook
def test_a_cluster_leaves_what_a_single_process_leaves(two_workers, stamps, capsys):
    """Failures stop no other and are told alike; nothing is checked or run twice."""
    cells = stamps(1, 13, 2, 3)
    here = batch.run_cells(cells, "here")
    there = batch.run_cells(cells, "there", client=two_workers)
    assert here == {"stamp13": "AssertionError: unlucky (in here/stamp/.unfinished/stamp13.ipynb)"}
    assert there == {"stamp13": "AssertionError: unlucky (in there/stamp/.unfinished/stamp13.ipynb)"}
    assert kept("there") == kept("here") and len(kept("here")) == 6
    assert {json.loads(v)["threads"] for k, v in kept("there").items() if k.endswith(".json")} == {"3"}
    assert {parent for _, _, parent in started()[4:]} <= set(two_workers.run(os.getpid).values())

    ran = len(started())
    assert batch.run_cells(cells, "there", client=two_workers) == there
    assert len(started()) == ran + 1 and "3 of 4 cells are finished already" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"stamp.ipynb has no parameter THRESHOLD"):
        batch.run_cells(stamps(4) + stamps(5, THRESHOLD=1), "there", client=two_workers)
    assert len(started()) == ran + 1


@pytest.mark.notebook
def test_edits_come_out_the_same_on_a_cluster_and_where_a_killed_cell_goes_on(
    two_workers, tiny_model, zsre_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    cells = grid.table_cells(
        ["memoir+feature=last+prefixes=1+iterations=3"], str(tiny_model("llama")), ["zsre"],
        T=(1, 3), data_path=str(zsre_file), separate=(0, 0),
    )  # fmt: skip
    (killed,) = cells
    kept = leave_the_first_edit(killed, zsre_file, seconds=5)
    assert batch.run_cells(cells, "here") == {}
    assert "1 of 1 cells resume from a saved run" in capsys.readouterr().err and not kept.exists()
    assert batch.run_cells(cells, "there", client=two_workers) == {}
    assert "resume" not in capsys.readouterr().err
    mine, other = (json.loads(killed.path(Path(folder), ".json").read_text()) for folder in ("here", "there"))
    assert mine["checkpoints"] == other["checkpoints"] and mine["extra"]["cell"] == other["extra"]["cell"]
    assert mine["losses"] == other["losses"] and len(mine["losses"]) == 3
    # The kept edit is not made again.
    assert [3 * run["seconds_per_edit"] > 5 for run in (mine, other)] == [True, False]


def leave_the_first_edit(cell: Cell, zsre_file: Path, *, seconds: float) -> Path:
    """What a kill during a cell's second edit leaves, its first edit having taken so long; returns the folder."""
    own, folder = cell.parameters, cell.kept(Path("here"))
    editor = mm.make_editor(own["METHOD"], mm.load_model(own["MODEL"]), dataset="zsre", seed=0, **own["OVERRIDES"])
    write = editor.write

    def write_once(requests: list[mm.EditRequest]) -> list:
        if editor.edits:
            raise mm.EditCancelled("killed")
        time.sleep(seconds)
        return write(requests)

    editor.write = write_once
    edits = mm.load_edits("zsre", path=zsre_file, n=own["N_EDITS"], seed=0)
    with pytest.raises(mm.EditCancelled):
        mm.run_edits(editor, edits, checkpoints=own["CHECKPOINTS"], save_to=folder, progress=False)
    return folder


@pytest.mark.notebook
def test_a_killed_worker_loses_nothing(two_workers, stamps):
    """kill -9 in the middle of a cell: its kernel dies too, the cell runs again, the reports are those without it."""
    batch.run_cells(stamps(0, 1, 2), "here")
    Path("pids").unlink()
    cells, failures = stamps(0, 1, 2, SECONDS=1.5), []
    running = threading.Thread(target=lambda: failures.append(batch.run_cells(cells, "there", client=two_workers)))
    running.start()
    try:
        wait_for(started)
        seed, kernel, worker = started()[0]
        assert worker in two_workers.run(os.getpid).values()
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: not psutil.pid_exists(kernel) or psutil.Process(kernel).status() == "zombie", seconds=10)
    finally:
        running.join(timeout=300)
    assert failures == [{}]
    again = [parent for cell, _, parent in started() if cell == seed]
    assert len(again) == 2 and worker not in again[1:]
    slow = {k: v.replace("SECONDS = 1.5\\n", "") for k, v in reports("there").items()}
    fast = reports("here")
    assert slow.keys() == fast.keys() and not list(Path("there").rglob(".unfinished"))
    assert {k: v for k, v in slow.items() if k.endswith(".ipynb")} == {
        k: v for k, v in fast.items() if k.endswith(".ipynb")
    }


@pytest.mark.notebook
def test_two_attempts_at_a_cell_leave_one_whole_result(stamps):
    """A worker that was given up for lost, but still runs, does not spoil the other's cell."""
    (cell,), lost = stamps(5, SECONDS=3), []
    Path("reports").mkdir()
    execute = lambda: cluster.failure(batch.execute, cell, Path("reports"), Path.cwd())  # noqa: E731
    earlier = threading.Thread(target=lambda: lost.append(execute()))
    earlier.start()
    wait_for(started)
    assert execute() is None and cell.finished(Path("reports"))
    earlier.join()
    assert (
        cell.finished(Path("reports")) and json.loads(cell.path(Path("reports"), ".json").read_text())["square"] == 25
    )
    assert not list(Path("reports").rglob(f"{batch.UNFINISHED}/*"))


@pytest.mark.notebook
def test_a_worker_that_does_not_see_the_reports_says_so(stamps, tmp_path):
    (cell,) = stamps(1)
    reason = cluster.failure(batch.execute, cell, Path("reports"), tmp_path / "elsewhere")
    assert reason.startswith(f"FileNotFoundError: {tmp_path}/elsewhere/reports is not there on ")
    assert not (tmp_path / "elsewhere").exists()


# Who runs what -------------------------------------------------------------------------------------------------------
# Functions inside of tests go to the workers whole, so that these need not import anything for them.


def places(*names: str, gpu: bool) -> list[SimpleNamespace]:
    return [SimpleNamespace(name=name, gpu=gpu) for name in names]


def ended(client, function, cells, *arguments) -> dict[str, str | None]:
    return {cell.name: reason for cell, reason in cluster.outcomes(client, function, cells, *arguments)}


def test_runs_never_share_a_gpu(one_gpu, tmp_path):
    """Of three places on two workers, cells of a model take the one with the GPU in turn."""

    def note(cell, folder):
        began = time.time()
        time.sleep(0.2)
        (folder / cell.name).write_text(json.dumps([began, time.time(), os.getpid()]))

    assert ended(one_gpu, note, places("a", "b", "c", gpu=True), tmp_path) == {"a": None, "b": None, "c": None}
    runs = sorted(json.loads((tmp_path / name).read_text()) for name in "abc")
    assert all(end <= begin for (_, end, _), (begin, _, _) in itertools.pairwise(runs))
    assert len({worker for _, _, worker in runs}) == 1


def test_cells_without_a_model_take_all_places(one_gpu, tmp_path):
    def meet(cell, folder):
        (folder / cell.name).touch()
        end = time.monotonic() + 60
        while len(list(folder.iterdir())) < 3:
            if time.monotonic() > end:
                raise TimeoutError("the others did not come")
            time.sleep(0.02)

    assert set(ended(one_gpu, meet, places("a", "b", "c", gpu=False), tmp_path).values()) == {None}


def test_a_cell_that_kills_its_workers_fails_alone(one_gpu):
    """Those that wait for the same GPU do not pay for it."""

    def run(cell):
        if cell.name == "a":
            os.kill(os.getpid(), signal.SIGKILL)

    failures = ended(one_gpu, run, places("a", "b", "c", gpu=True))
    assert failures.pop("a").startswith("KilledWorker: ") and failures == {"b": None, "c": None}


def test_a_scheduler_that_is_lost_fails_what_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT", 2.0)

    def wait(cell, folder):
        (folder / cell.name).touch()
        time.sleep(5)

    found, cells = {}, places("a", "b", gpu=False)
    with running_cluster({}) as there, cluster.joined(there.scheduler_address) as client:
        running = threading.Thread(target=lambda: found.update(ended(client, wait, cells, tmp_path)))
        running.start()
        wait_for(lambda: (tmp_path / "a").exists())
        there.close()
        running.join(timeout=60)
    assert found.keys() == {"a", "b"} and all(found.values()), found
