"""Cells: what counts as finished, that one failure stops no other, and that starting them takes nothing heavy."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import zmq

from memoir import batch, files
from memoir.batch import Cell


def finish(cell: Cell, reports) -> None:
    """Leave what a run of the cell leaves."""
    for ending, text in ((".ipynb", "{}"), (".json", json.dumps({"extra": {"cell": cell.made_from}}))):
        cell.path(reports, ending).parent.mkdir(parents=True, exist_ok=True)
        cell.path(reports, ending).write_text(text)


def test_finished_means_both_files_made_from_the_same(tiny_grid, tmp_path, zsre_file, tiny_model):
    (cell,) = tiny_grid()
    assert not cell.finished(tmp_path)
    finish(cell, tmp_path)
    assert cell.finished(tmp_path) and tiny_grid()[0].finished(tmp_path)

    other_data = tmp_path / "zsre.json"
    other_data.write_text(zsre_file.read_text().replace("oboe", "horn"))
    changes = [
        dict(T=(1, 2, 4)),
        dict(methods=["ft"]),
        dict(seeds=(1,)),
        dict(chat=False, dtype="bfloat16"),
        dict(data_path=str(other_data)),
        dict(model=str(tiny_model("mistral"))),
        dict(methods=["unedited+learn_stop=True"]),
    ]
    for change in changes:
        (changed,) = tiny_grid(**change)
        moved = Cell(cell.notebook, cell.name, changed.parameters, changed.inputs)
        assert not moved.finished(tmp_path), change

    text = cell.path(tmp_path, ".json").read_text()
    cell.path(tmp_path, ".json").write_text(text[:-5])
    assert not cell.finished(tmp_path)
    cell.path(tmp_path, ".json").write_text(text)
    cell.path(tmp_path, ".ipynb").unlink()
    assert not cell.finished(tmp_path)


def test_a_finished_cell_counts_whatever_code_and_command_it_came_from(tiny_grid, tmp_path):
    (cell,) = tiny_grid(command="python -m memoir tables")
    finish(cell, tmp_path)
    assert cell.command == "python -m memoir tables"
    assert replace(cell, commit="another", command="python -m memoir tables --seeds 0,1").finished(tmp_path)


def test_an_unfinished_run_goes_on_by_the_same_code_on_the_same_only(tiny_grid, tmp_path):
    (cell,) = tiny_grid()
    assert tiny_grid()[0].kept(tmp_path) == cell.kept(tmp_path)
    changes = [
        dict(commit="another"),
        dict(parameters=cell.parameters | {"EVAL_BATCH_SIZE": 1}),
        dict(inputs=cell.inputs | {"model": "another"}),
    ]
    assert len({cell.kept(tmp_path), *(replace(cell, **change).kept(tmp_path) for change in changes)}) == 4


def test_failures_stop_no_other_and_finished_cells_are_skipped(tiny_grid, tmp_path, monkeypatch, capsys):
    cells = tiny_grid(seeds=(0, 1, 2, 3))
    finish(cells[0], tmp_path)
    ran = []

    def execute(cell, reports, *_):
        ran.append(cell.name)
        if cell is cells[2]:
            raise RuntimeError("two\nlines")
        finish(cell, reports)

    monkeypatch.setattr(batch, "execute", execute)
    failures = batch.run_cells(cells, tmp_path)
    assert sorted(ran) == sorted(cell.name for cell in cells[1:])
    assert list(failures) == [cells[2].name] and "RuntimeError: two lines" in failures[cells[2].name]
    assert "1 of 4 cells are finished already" in capsys.readouterr().err

    ran.clear()
    monkeypatch.setattr(batch, "execute", lambda cell, *_: ran.append(cell.name))
    assert batch.run_cells(cells, tmp_path) == {} and ran == [cells[2].name]
    ran.clear()
    batch.run_cells(cells, tmp_path, fresh=True)
    assert len(ran) == 4


@pytest.mark.parametrize("name", ["THRESHOLD", "OUT"])  # OUT is the batch's own
def test_no_cell_can_be_made_with_a_parameter_that_its_notebook_does_not_have(name):
    with pytest.raises(ValueError, match=rf"edit.ipynb has no parameter {name}; expected METHOD"):
        Cell(notebook="edit", name="x", parameters={"METHOD": "ft", name: 1})
    with pytest.raises(FileNotFoundError, match=r"no notebook .*nope\.ipynb"):
        Cell(notebook="nope", name="x", parameters={})


def test_two_batches_never_write_into_one_folder(tmp_path):
    """The second one is told who writes there; the lock of a killed process is free again."""
    hold = (
        "import sys, time, memoir.files as files\nwith files.sole_writer(sys.argv[1]): print('in', flush=True); input()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        told = rf"another run is writing here: .*out \(process {other.pid} on {platform.node()}\)"
        with pytest.raises(BlockingIOError, match=told), files.sole_writer(tmp_path / "out"):
            pass
        other.kill()
    with files.sole_writer(tmp_path / "out"):
        pass


@pytest.mark.skipif(not zmq.has("ipc"), reason="this system has no sockets that are files")
def test_kernels_take_no_ports_that_another_process_could_have_taken(tmp_path):
    manager = batch.ThisPython(config=batch.kernel_config(str(tmp_path), None, {}))
    manager.write_connection_file()
    try:
        connection = manager.get_connection_info()
        assert connection["transport"] == "ipc" and connection["ip"].startswith(str(tmp_path))
    finally:
        manager.cleanup_connection_file()


def test_the_kernel_is_this_python_with_so_many_threads():
    """Whatever kernels the user has registered under the name python3."""
    spec = batch.ThisPython(
        kernel_name="python3", config=batch.kernel_config("/tmp/x", 3, {"OMP_NUM_THREADS": "8"})
    ).kernel_spec
    assert spec.argv[0] == sys.executable and spec.env["OMP_NUM_THREADS"] == "3"


def test_who_only_starts_notebooks_imports_no_torch():
    """Or every worker would take seconds to come up, and hundreds of megabytes."""
    code = "import sys, memoir.batch, papermill; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
