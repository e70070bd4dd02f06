"""The options of the command line. Each function adds those of one command, and imports the names that it lists itself,
so that `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

SPECS = "a variant is written memoir+tau=0.6, and rome@10 is rome with T up to 10"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser(
    commands: Mapping[Callable[..., int], Callable[[Parser], None]], wanted: Sequence[str] | None = None
) -> Parser:
    """The parser of some commands, by what adds their options; a docstring begins with the line of help. Only those in
    `wanted` (default: all) get their options: the help texts of these list all methods and notebooks, and importing the
    lists takes seconds."""
    top = Parser(prog="python -m memoir", description="Lifelong editing of language models, from the command line.")
    listed = top.add_subparsers(title="commands", required=True, metavar="run | tables | report | publish | …")
    for command, add_options in commands.items():
        one = listed.add_parser(command.__name__, help=(command.__doc__ or "").partition("\n")[0])
        one.set_defaults(command=command)
        one.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if wanted is None or command.__name__ in wanted:
            add_options(one)
    return top


def run_options(command: Parser) -> None:
    from memoir.data import DATASETS
    from memoir.editors import EDITORS

    add = command.add_argument
    add("--method", required=True, help=f"one of {', '.join(EDITORS)}, or a variant like memoir+paper")
    add("--dataset", required=True, help=f"one of {', '.join(DATASETS)}")
    add("--format", metavar="F", help="format of the file (default: detected)")
    add("--skip-bad", action="store_true", help="leave bad records out instead of stopping at them")
    add("--split", default="test", help="test or validation of the almanac; a split's name on the hub")
    add("--edits", type=int, metavar="N", dest="n", help="number of edits (default: all)")
    add("--seed", type=int, default=0, help="seed for choosing and ordering the edits, and for the method")
    add("--checkpoints", type=numbers, default=(), metavar="N,N", help="also evaluate after this many edits")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", dest="settings")
    add("--out", type=place, required=True, metavar="F.json", help="file for the whole result")
    kept = "folder that keeps the memory (default: F.json.run, until the result is written)"
    add("--save-to", type=place, metavar="FOLDER", help=kept)
    model_options(command)


def tables_options(command: Parser) -> None:
    from memoir.editors import EDITORS

    add = command.add_argument
    add("--methods", type=names, default=list(EDITORS), metavar="M,M", help=SPECS)
    add("--dataset", type=names, default=["almanac-qa", "almanac-bio"], metavar="D,D", dest="datasets")
    add("--T", type=numbers, default=(1, 10, 100), metavar="N,N", help="numbers of edits (1,10,100)")
    add("--seeds", type=numbers, default=(0,), metavar="N,N", help="repeat everything with each (0)")
    add("--separate", type=numbers, default=(20, 5), metavar="N,N", help="short runs for T = 1 and for T = 10 (20,5)")
    add("--skip-bad", action="store_true", help="leave bad records out instead of stopping at them")
    add("--fresh", action="store_true", help="run finished cells again")
    notebook_options(command, "one per core; 1 for large models")
    model_options(command)


def report_options(command: Parser) -> None:
    from memoir.report import NOTEBOOKS

    notebooks = f"some of {', '.join(NOTEBOOKS)} (all)"
    command.add_argument("--only", nargs="+", action="extend", default=[], metavar="NAME", help=notebooks)
    notebook_options(command, "1")


def publish_options(command: Parser) -> None:
    command.add_argument("--out", type=place, default=Path("out"), metavar="FOLDER", help="what to publish (out)")
    command.add_argument(
        "--to", type=place, required=True, metavar="FOLDER", help="the folder whose front page it replaces"
    )


def calibrate_options(command: Parser) -> None:
    add = command.add_argument
    add("--method", default="memoir", help="memoir or memoir-rls (memoir)")
    add("--dataset", metavar="D", help="store the prompts of its edits (default: none)")
    add("--edits", type=int, metavar="N", dest="n", help="number of edits (default: all)")
    add("--seed", type=int, default=0, help="seed for choosing the edits")
    add("--share", type=float, default=0.01, metavar="S", help="of unrelated questions that may read the memory (0.01)")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", dest="settings")
    model_options(command)


def export_options(command: Parser) -> None:
    add = command.add_argument
    add("--memory", type=Path, required=True, metavar="FOLDER", help="what `run --save-to` or `editor.save` wrote")
    add("--out", type=Path, required=True, metavar="FOLDER", help="new folder for the checkpoint")
    add("--model", default="almanac", metavar="NAME", help="model the memory was written for")
    add("--dtype", help="of the checkpoint; may differ from the memory's (float32 on a CPU, bfloat16 on a GPU)")
    add("--device-map", help="cpu, cuda, auto, …")
    add("--chat", action="store_true", help="if the memory was written with it")


def settings_options(command: Parser) -> None:
    from memoir.editors import EDITORS

    command.add_argument("method", choices=list(EDITORS), metavar="METHOD", help=f"one of {', '.join(EDITORS)}")


def audit_options(command: Parser) -> None:
    add = command.add_argument
    add("--dataset", required=True, metavar="D", help="the edit set")
    add("--data-path", metavar="F", help="its file, or a hub id")
    add("--edits", type=int, metavar="N", dest="n", help="number of edits (default: all)")
    add("--seed", type=int, default=0, help="seed for choosing the edits")
    add("--model", metavar="NAME", help="also ask this model for the targets and the true answers (default: none)")


def bench_options(command: Parser) -> None:
    from memoir.shapes import REAL_SHAPES

    add = command.add_argument
    add("--quick", action="store_true", help="fewer edits and methods: three minutes at most")
    add("--shape", metavar="NAME", help=f"with random weights instead of --model: {', '.join(REAL_SHAPES)}, or all")
    add("--methods", type=names, default=[], metavar="M,M", help="a variant is written memoir+tau=0.6")
    add("--model", default="almanac", metavar="NAME", help="almanac, smollm2, a folder, a .gguf file, or a hub id")
    add("--dataset", default="almanac-qa", metavar="D", help="where the edits come from")
    add("--data-path", metavar="F", help="file of the data set, or a hub id")
    add("--out", type=place, metavar="F.json", help="file for all that was measured")


def notebook_options(command: Parser, workers: str) -> None:
    add, either = command.add_argument, command.add_mutually_exclusive_group().add_argument
    add("--parameter", nargs="+", action="extend", default=[], metavar="NAME=VALUE", dest="parameters")
    add("--out", type=place, default=Path("out"), metavar="FOLDER", help="folder for the results (out)")
    either("--workers", type=int, metavar="N", help=f"notebooks at a time on this machine ({workers})")
    either("--scheduler", metavar="ADDRESS", help="run them on this Dask cluster, e.g. tcp://10.0.0.1:8786")


def model_options(command: Parser) -> None:
    add = command.add_argument
    add("--model", default="almanac", help="almanac, smollm2, a folder, a .gguf file, or a hub id")
    add("--data-path", metavar="F", help="file of edits (JSON, JSON lines, CSV), or a hub id")
    add("--background", metavar="F", help="texts irrelevant to all edits: JSON list, or .txt with one a line (our own)")
    add("--dtype", help="float32, bfloat16, … (float32 on a CPU, bfloat16 on a GPU)")
    add("--device-map", help="cpu, cuda, auto, …")
    add("--chat", action="store_true", help="prompts as a user's turn, by the chat template")


def place(text: str) -> Path:
    """A path; a shell leaves the ~ of --out=~/result.json as it is."""
    return Path(text).expanduser()


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected whole numbers with commas between") from None
