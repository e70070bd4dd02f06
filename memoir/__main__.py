"""The command line: `run` makes one run, `tables` the paper's tables, `report` reruns the exploring notebooks, and
`bench` measures what editing costs. A mistake in what was given ends with exit code 2 and one line, before heavy work;
a run that fails ends with exit code 1 and one line. `--debug` shows the traceback of both.

Each command is a function of its options, and its docstring begins with its line of help. It imports what it needs
itself, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from memoir import options
from memoir.files import sole_writer, try_writing, write_json
from memoir.records import BadInput

SAVE_SECONDS = 30  # between two saves of a run


def main(arguments: Sequence[str] | None = None) -> int:
    if arguments is None:  # from a shell
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` stops a run as Ctrl-C does
        arguments = sys.argv[1:]
    command = None
    try:
        given = vars(options.parser(COMMANDS, arguments).parse_args(arguments))
        command, _ = given.pop("command"), given.pop("debug")
        if command is tables:  # its results say how they were made
            given["command"] = shlex.join(["python", "-m", "memoir", *arguments])
        return command(**given)
    except KeyboardInterrupt:
        line = "stopped; the same command continues from here" if command in (tables, run) else "stopped"
        print(f"\n{line}", file=sys.stderr, flush=True)
        # Python would wait for the threads whose notebooks are running. Their kernels end with this process.
        os._exit(130)
    except Exception as error:
        if "--debug" in arguments:
            raise
        if isinstance(error, BrokenPipeError):  # nobody reads the output; Python would try once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        mistake = isinstance(error, BadInput)
        failed = f"{getattr(command, '__name__', 'memoir')} failed: {type(error).__name__}: "
        line = one_line(error) if mistake else f"{failed}{one_line(error)}; --debug shows where"
        print(f"memoir: {line}", file=sys.stderr)
        return 2 if mistake else 1


def one_line(error: BaseException) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


@contextlib.contextmanager
def checks() -> Iterator[None]:
    """Turns errors into BadInput. Inside, arguments are checked and the long work has not begun."""
    try:
        yield
    except (ValueError, TypeError, LookupError, OSError, ImportError) as error:
        raise BadInput(one_line(error)) from error


# Commands ------------------------------------------------------------------------------------------------------------


def run(
    *, method, model, dataset, data_path, format, split, skip_bad, n, seed, checkpoints, settings, background, out,
    save_to, **loading
) -> int:  # fmt: skip
    """one sequence of edits; the last line printed is its summary as JSON

    A run of the same command that was stopped goes on."""
    from memoir import data, grid
    from memoir.editors import make_editor
    from memoir.editors.config import settings_from
    from memoir.models import load_model

    folder = save_to or out.with_name(f"{out.name}.run")

    with checks():
        method, own = grid.variant(method)
        settings = {"seed": seed, **own, **settings_from(settings)}
        grid.check_settings(method, settings)
        source = {"path": data_path, "format": format, "split": split, "skip_bad": skip_bad}
        edits = data.load_edits(dataset, n=n, seed=seed, **source)
        texts = data.load_background(background) if background else None
        if wrong := [n for n in checkpoints if not 1 <= n <= len(edits)]:
            raise ValueError(f"checkpoints {wrong} do not fit {len(edits)} edits, expected 1 to {len(edits)}")
        check_place(out)
        if folder.exists():  # another run's folder is told before the model is loaded
            with sole_writer(folder):
                pass
        editor = make_editor(method, load_model(model, **loading), background=texts, dataset=dataset, **settings)
    result = run_kept(editor, edits, checkpoints, folder, skip_bad, keep=save_to is not None)
    if result is None:
        return 1
    unsaved = result.extra.get("unsaved") if save_to else None
    try:
        result.save(out)
        if save_to is None:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        unsaved = f"{error.strerror}: {out}"
    print_json(result.summary())  # whatever happens to the file
    if unsaved:
        print(f"memoir: not all was saved: {unsaved}. {going_on(folder)}", file=sys.stderr)
    return 1 if unsaved else 0


def run_kept(editor, edits, checkpoints, folder, skip_bad, *, keep):
    """The Result of a run that saves to a folder every `SAVE_SECONDS`; None, after one line that says why, if it
    failed."""
    from memoir.editors import EditError, MemoryFileError
    from memoir.run import run_edits

    try:
        return run_edits(
            editor, edits, checkpoints=checkpoints, skip_bad=skip_bad, save_to=folder, save_seconds=SAVE_SECONDS
        )
    except MemoryFileError as error:
        where = "--save-to" if keep else "--out"
        raise BadInput(f"{error}; choose another {where}, or delete {folder} to start over") from error
    except BlockingIOError as error:
        raise BadInput(str(error)) from error
    except (OSError, EditError) as error:
        print(f"memoir: {' '.join(str(error).split())}. {going_on(folder)}", file=sys.stderr)
        return None
    except KeyboardInterrupt:
        print(f"\n{going_on(folder)}", file=sys.stderr)
        raise


def going_on(folder: Path) -> str:
    """What is saved of a run, in one sentence."""
    from memoir.editors.storage import MemoryFileError, read_header

    try:
        made = len(read_header(folder)["run"]["edits"])
    except (MemoryFileError, KeyError):
        made = 0
    return f"{folder} holds the first {made} edits; the same command goes on from there"


def check_place(out: Path) -> None:
    """OSError where a file cannot be written: found out before the work, not after it."""
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder, expected a file for the result")
    try:
        try_writing(out.parent)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""  # an error on a full disk names none
        raise OSError(f"{out} cannot be written: {error.strerror}{place}; expected another --out") from error


def tables(*, parameters, fresh, out, workers, scheduler, **request) -> int:
    """the paper's tables: methods × data sets × numbers of edits"""
    from memoir import batch, grid
    from memoir.editors.config import settings_from

    with checks():
        cells = grid.table_cells(**request, parameters=settings_from(parameters))
    workers = grid.default_workers(request["model"]) if workers is None else workers
    with writing(out, workers, scheduler) as client:
        failures = batch.run_cells(cells, out, workers=workers, client=client, fresh=fresh)
        grid.write_tables(cells, out)
    return tell(failures, len(cells), out)


def report(*, only, parameters, out, workers, scheduler) -> int:
    """rerun the exploring notebooks"""
    from memoir import batch, frontpage, report
    from memoir.editors.config import settings_from

    with checks():
        cells = report.cells(only, settings_from(parameters))
    workers = 1 if workers is None else workers
    with writing(out, workers, scheduler) as client:
        failures = batch.run_cells(cells, out, workers=workers, client=client, fresh=True)
        frontpage.write(out)
    return tell(failures, len(cells), out)


def publish(*, out, to) -> int:
    """copy a front page and what it leads to, without executed notebooks"""
    from memoir import frontpage

    with checks():
        files = frontpage.publish(out, to)
    print(f"{to / 'README.md'}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
    return 0


@contextlib.contextmanager
def writing(out: Path, workers: int, scheduler: str | None) -> Iterator[Any]:
    """The only run that writes into `out`, with the client of the scheduler, if there is one."""
    from memoir import cluster

    with contextlib.ExitStack() as stack:
        with checks():
            if workers < 1:
                raise ValueError(f"workers = {workers}, expected at least 1")
            client = stack.enter_context(cluster.joined(scheduler)) if scheduler else None
            stack.enter_context(sole_writer(out))
        yield client


def tell(failures: dict[str, str], count: int, out: Path) -> int:
    """Print which cells failed; returns the exit code."""
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    print(f"{out / 'README.md'}: {count} cells, {len(failures)} failures")
    return 1 if failures else 0


def bench(*, model, dataset, data_path, quick, shape, methods, out) -> int:
    """what editing costs; the last line printed is its ratios as JSON"""
    from memoir import bench, data, grid, shapes
    from memoir.sources import locate

    with checks():
        for method in methods:
            grid.check_settings(*grid.variant(method))
        chosen = shapes.shape_names(shape) if shape else []
        if out:
            check_place(out)
        if not chosen:
            data.load_edits(dataset, path=data_path)
            locate(model)
    if chosen:
        measured = shapes.measure_shapes(chosen, methods)
        summary = shapes.shapes_summary(measured)
    else:
        measured = bench.measure(model, dataset, data_path=data_path, quick=quick, methods=methods)
        summary = measured["summary"]
    print_json(summary)  # whatever happens to the file
    if out:
        write_json(out, measured)
    return 0


def settings(*, method) -> int:
    """what the settings of a method mean"""
    from memoir.editors import EDITORS
    from memoir.editors.settings import settings_of

    for name, default, meaning in settings_of(EDITORS[method]):
        print(f"{name} = {'by model' if default is None else default}\n    {meaning}")
    return 0


def audit(*, dataset, data_path, n, seed, model) -> int:
    """contradictions and leaks in an edit set; the last line printed is JSON"""
    from memoir.audits import audit
    from memoir.data import load_edits
    from memoir.models import load_model

    with checks():
        edits = load_edits(dataset, path=data_path, n=n, seed=seed)
        found = audit(edits, load_model(model) if model else None)
    print(*found.lines(), sep="\n")
    print_json(found.to_json())
    return 0


def print_json(summary: dict[str, Any]) -> None:
    print(json.dumps(finite(summary), ensure_ascii=False, allow_nan=False), flush=True)


def finite(summary: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: such a number becomes null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}


def calibrate(*, method, model, dataset, data_path, n, seed, share, settings, background, **loading) -> int:
    """the threshold τ for a model, with a histogram; the last line printed is JSON"""
    from memoir import data, grid
    from memoir.editors import make_editor
    from memoir.editors.config import settings_from
    from memoir.explore.calibrate import histogram, measured_tau
    from memoir.models import load_model
    from memoir.run import check_edits

    with checks():
        settings = {"seed": seed, "prefixes": 0, "unrelated_share": share, **settings_from(settings), "tau": "auto"}
        grid.check_settings(method, settings)
        edits = data.load_edits(dataset, path=data_path, n=n, seed=seed) if dataset else []
        texts = data.load_background(background) if background else None
        editor = make_editor(method, load_model(model, **loading), background=texts, dataset=dataset, **settings)
        check_edits(editor, edits)
    calibrated = measured_tau(editor, edits)
    print(histogram(calibrated["overlaps"], calibrated["tau"]))
    reads = {kind: float((ratios >= calibrated["tau"]).mean()) for kind, ratios in calibrated["overlaps"].items()}
    print_json({"tau": calibrated["tau"], "share": share, "edits": len(edits), "reads": reads})
    return 0


def export(*, memory, out, model, **loading) -> int:
    """an edited model as a plain transformers checkpoint"""
    from memoir.editors import load_editor
    from memoir.models import load_model

    with checks():
        written = load_editor(memory, load_model(model, **loading), allow_dtype=True).export(out)
    print_json({**vars(written), "folder": str(written.folder)})
    return 0


COMMANDS = {
    run: options.run_options,
    tables: options.tables_options,
    report: options.report_options,
    publish: options.publish_options,
    calibrate: options.calibrate_options,
    export: options.export_options,
    settings: options.settings_options,
    audit: options.audit_options,
    bench: options.bench_options,
}

if __name__ == "__main__":
    sys.exit(main())
