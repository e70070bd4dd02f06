"""The command line: `python -m memoir run …` makes one run, `python -m memoir tables …` the paper's tables,
`python -m memoir report` reruns the exploring notebooks, `python -m memoir bench` measures what editing costs.

A mistake in what is asked for ends with exit code 2 and one line, before anything heavy runs.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from memoir import batch, bench, cluster, grid, report
from memoir.data import DATASETS, load_background, load_edits
from memoir.editors import EDITORS, make_editor
from memoir.models import load_model
from memoir.records import write_json
from memoir.run import run_edits

MISTAKES = (ValueError, TypeError, LookupError, OSError, ImportError)  # in what is asked for


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    atexit.register(gc.freeze)  # or Python looks through all that torch is made of for cycles, for a second, and ends
    options = parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        # Workers of this machine, and kernels, end with this process; what is finished is whole.
        print("\nstopped; the same command goes on from here", file=sys.stderr, flush=True)
        os._exit(130)


def parser() -> Parser:
    top = Parser(prog="python -m memoir", description="Lifelong editing of language models, from the command line.")
    commands = top.add_subparsers(title="commands", required=True, metavar="run | tables | report | bench")

    one = commands.add_parser("run", help="one sequence of edits; the last line printed is its result as JSON")
    one.set_defaults(command=run)
    one.add_argument("--method", required=True, help=f"one of {', '.join(EDITORS)}")
    one.add_argument("--dataset", required=True, help=f"one of {', '.join(DATASETS)}")
    one.add_argument("--split", default="test", help="test or validation of the almanac; a split's name on the hub")
    one.add_argument("--edits", type=int, metavar="N", help="edits in a row (default: all)")
    one.add_argument("--seed", type=int, default=0, help="of the edits' choice and order, and of the method")
    one.add_argument("--checkpoints", type=numbers, default=(), metavar="N,N", help="evaluate after so many, too")
    one.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", dest="settings")
    one.add_argument("--out", type=Path, required=True, metavar="F.json", help="file for the whole result")
    _model_options(one)

    many = commands.add_parser("tables", help="the paper's tables: methods × data sets × numbers of edits")
    many.set_defaults(command=tables)
    many.add_argument(
        "--methods", type=names, default=list(EDITORS), metavar="M,M", help="a variant is written memoir+write=rls"
    )
    many.add_argument("--dataset", type=names, default=["almanac-qa", "almanac-bio"], metavar="D,D", dest="datasets")
    many.add_argument("--T", type=numbers, default=(1, 10, 100), metavar="N,N", help="numbers of edits (1,10,100)")
    many.add_argument("--seeds", type=numbers, default=(0,), metavar="N,N", help="repeat everything with each (0)")
    many.add_argument("--parameter", nargs="+", action="extend", default=[], metavar="NAME=VALUE", dest="parameters")
    many.add_argument("--fresh", action="store_true", help="run finished cells again")
    _grid_options(many, "one per core; 1 for large models")
    _model_options(many)

    inside = commands.add_parser("report", help=f"rerun the exploring notebooks: {', '.join(report.NOTEBOOKS)}")
    inside.set_defaults(command=explore)
    inside.add_argument("--only", nargs="+", action="extend", default=[], metavar="NAME", help="these notebooks")
    inside.add_argument("--parameter", nargs="+", action="extend", default=[], metavar="NAME=VALUE", dest="parameters")
    _grid_options(inside, "1")

    speed = commands.add_parser("bench", help="what editing costs; the last line printed is its ratios as JSON")
    speed.set_defaults(command=measure)
    speed.add_argument("--quick", action="store_true", help="fewer edits and methods: three minutes at most")
    speed.add_argument("--shape", metavar="NAME", help=f"with random weights: {', '.join(bench.REAL_SHAPES)}, or all")
    speed.add_argument("--methods", type=names, default=[], metavar="M,M", help="a variant is written memoir+write=rls")
    speed.add_argument("--out", type=Path, metavar="F.json", help="file for all that was measured")
    return top


def _grid_options(command: argparse.ArgumentParser, workers: str) -> None:
    where = command.add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, metavar="N", help=f"notebooks at a time on this machine ({workers})")
    where.add_argument("--scheduler", metavar="ADDRESS", help="run them on this Dask cluster, e.g. tcp://10.0.0.1:8786")
    command.add_argument("--out", type=Path, default=Path("reports"), metavar="FOLDER")


def _model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="almanac", help="almanac, a transformers folder, or a hub id")
    command.add_argument("--data-path", metavar="F", help="file of zsre or selfcheckgpt, or a hub id")
    command.add_argument("--background", metavar="F", help="JSON list of texts irrelevant to all edits")
    command.add_argument("--dtype", help="float32, bfloat16, … (float32 on a CPU, bfloat16 on a GPU)")
    command.add_argument("--device-map", help="cpu, cuda, auto, …")
    command.add_argument("--chat", action="store_true", help="prompts as a user's turn, by the chat template")


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected whole numbers with commas between") from None


# run -----------------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """One run: its Result as a JSON file, its summary as the last line of the output."""
    try:
        settings = grid.settings(options.settings)
        grid.check_settings(options.method, settings)
        edits = load_edits(
            options.dataset, path=options.data_path, n=options.edits, seed=options.seed, split=options.split
        )
        background = load_background(options.background) if options.background else None
        if wrong := [n for n in options.checkpoints if not 1 <= n <= len(edits)]:
            raise ValueError(f"checkpoints {wrong} do not fit {len(edits)} edits, expected 1 to {len(edits)}")
        if options.out.is_dir():
            raise IsADirectoryError(f"{options.out} is a folder, expected a file for the result")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        model = load_model(options.model, dtype=options.dtype, device_map=options.device_map, chat=options.chat)
        editor = make_editor(
            options.method, model, background=background, dataset=options.dataset, **{"seed": options.seed, **settings}
        )
    except MISTAKES as error:
        return mistake(error)
    result = run_edits(editor, edits, checkpoints=options.checkpoints)
    result.save(options.out)
    print(json.dumps(finite(result.summary()), ensure_ascii=False, allow_nan=False))
    return 0


def finite(summary: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity: a number that is not finite is not defined."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}


# tables --------------------------------------------------------------------------------------------------------------


def tables(options: argparse.Namespace) -> int:
    """The grid, then the tables of what is there; 1 where a cell failed."""
    with contextlib.ExitStack() as stack:
        try:
            cells = grid.table_cells(
                options.methods,
                options.model,
                options.datasets,
                T=options.T,
                seeds=options.seeds,
                data_path=options.data_path,
                background=options.background,
                dtype=options.dtype,
                device_map=options.device_map,
                chat=options.chat,
                parameters=grid.settings(options.parameters),
            )
            workers = grid.default_workers(options.model) if options.workers is None else options.workers
            client = stack.enter_context(cluster.joined(workers, options.scheduler))
        except MISTAKES as error:
            return mistake(error)
        failures = batch.run_cells(cells, options.out, client=client, fresh=options.fresh)
        failures |= grid.write_tables(cells, options.out, client=client)
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    print(f"{options.out / 'README.md'}: {len(cells)} cells, {len(failures)} failures")
    return 1 if failures else 0


# report --------------------------------------------------------------------------------------------------------------


def explore(options: argparse.Namespace) -> int:
    """The exploring notebooks; 1 where one failed."""
    with contextlib.ExitStack() as stack:
        try:
            cells = report.cells(options.only, grid.settings(options.parameters))
            for cell in cells:
                batch.check_parameters(cell)
            workers = 1 if options.workers is None else options.workers
            client = stack.enter_context(cluster.joined(workers, options.scheduler))
        except MISTAKES as error:
            return mistake(error)
        failures = report.rerun(cells, options.out, client=client)
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    print(f"{options.out / 'README.md'}: {len(cells)} notebooks, {len(failures)} failures")
    return 1 if failures else 0


# bench ---------------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> int:
    """The benchmark on the almanac, or the shapes of published models."""
    try:
        for name in options.methods:
            grid.check_settings(*grid.variant(name))
        shapes = bench.shape_names(options.shape) if options.shape else []
    except MISTAKES as error:
        return mistake(error)
    if shapes:
        found = bench.measure_shapes(shapes, options.methods)
        summary = bench.shapes_summary(found)
    else:
        found = bench.measure(quick=options.quick, methods=options.methods)
        summary = found["summary"]
    if options.out:
        write_json(options.out, found)
    print(json.dumps(finite(summary), allow_nan=False))
    return 0


def mistake(error: Exception) -> int:
    """Tell the caller in one line what to mend."""
    message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    print(f"memoir: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
