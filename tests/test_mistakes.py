"""What users bring: bad files, records, settings, models, places and signals. Each ends with one line and code 2 (bad
input) or 1 (the run failed), without a traceback, and a result that was there before stays as it was."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_weights import small_gguf

from memoir import __main__ as cli
from memoir.data import load_edits
from memoir.formats import FORMATS
from memoir.records import BadInput, EditRequest, Result
from memoir.run import run_edits

GOOD = dict(prompt="Ida plays the", target="oboe", subject="Ida")
ZSRE = dict(subject="Ida", src="Ida plays what?", rephrase="Ida's?", alt="oboe", loc="who is Olo", loc_ans="me")
FAR = dict(kind="far", prompt="a", answer="b")
ROME = dict(method="rome", set=["layer=1", "moments=background", "prefixes=0"])
KEY_VALUE = {"rome": "layer=1", "memit": "layers=(0,1)", "alphaedit": "layers=(0,1)", "rlsedit": "layers=(0,1)"}


class Desk:
    """A folder with a good data file, a good model, and an earlier result."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model = folder, model
        self.data = self.file("good.json", [GOOD, GOOD | {"target": "lute"}])
        self.out = self.file("result.json", "an earlier result")

    def file(self, name: str, content) -> Path:
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        (self.folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return self.folder / name

    def empty(self) -> Path:
        (self.folder / "empty").mkdir()
        return self.folder / "empty"

    def damaged(self, change) -> Path:
        shutil.copytree(self.model, self.folder / "damaged")
        change(self.folder / "damaged")
        return self.folder / "damaged"


def records(*rows, name="edits.json"):
    """The option for a data file; `name` may be that of a table, then rows are its lines."""
    return lambda desk: desk.file(name, list(rows) if name.endswith("json") else "\n".join(rows))


def content(name, text):
    return lambda desk: desk.file(name, text)


def model(change):
    return lambda desk: desk.damaged(change)


def config(**changes):
    """A change of a model's config.json."""

    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return model(change)


def weights(change):
    def changed(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        path.unlink()
        save_file(change(tensors), path, metadata={"format": "pt"})

    return model(changed)


def torn_gguf(desk) -> Path:
    path = small_gguf(desk.folder / "torn.gguf")
    path.write_bytes(path.read_bytes()[:3000])
    return path


def without(name):
    return model(lambda folder: [path.unlink() for path in folder.glob(name)])


def overwritten(name, data):
    return model(lambda folder: (folder / name).write_bytes(data))


def setting(*pairs, method="memoir"):
    return dict(method=method, set=["feature=last", *pairs] if method == "memoir" else list(pairs))


FILES = [
    ("no such file: nowhere.json", dict(data_path="./nowhere.json")),
    ("no such file: some/edits; as a data set of the hub it cannot be loaded", dict(data_path="some/edits")),
    ("torn.json is not JSON", dict(data_path=content("torn.json", '[{"prompt": '))),
    ("lines.jsonl, line 2 is not JSON", dict(data_path=content("lines.jsonl", json.dumps(GOOD) + "\n{\n"))),
    ("blank.json is not JSON", dict(data_path=content("blank.json", ""))),
    ("deep.json is not JSON", dict(data_path=content("deep.json", "[" * 100_000))),
    ("long.json is not JSON: Exceeds the limit", dict(data_path=content("long.json", f"[{'9' * 5000}]"))),
    ("latin.csv is not text in UTF-8", dict(data_path=content("latin.csv", "prompt,target\né,a".encode("latin-1")))),
    ("torn.json.gz is damaged", dict(data_path=content("torn.json.gz", gzip.compress(b"[1, 2]")[:-9]))),
    ("none.json is empty, expected a list of records", dict(data_path=content("none.json", []))),
    ("holds dict with the keys data, expected", dict(data_path=content("inner.json", {"data": [GOOD]}))),
    ("holds int, expected a non-empty list", dict(data_path=content("number.json", "3"))),
    ("of no known format: its first record has the keys a; expected zsre", dict(data_path=records({"a": 1}))),
    ("of no known format: its first record is no object", dict(data_path=records(1, 2))),
    ("header.csv is empty, expected a list of records", dict(data_path=content("header.csv", "prompt,target\n"))),
    ("line 2 is not a valid table row", dict(data_path=content("quote.csv", 'prompt,target\n"a" b,c'))),
    ("has two columns named 'target'", dict(data_path=content("twice.csv", "prompt,target,Target\na,b,c\n"))),
    ("no such file: texts.json", dict(background="texts.json")),
    ("holds no list of non-empty texts", dict(background=content("texts.json", ["a", ""]))),
    ("dataset 'zsrre' is unknown; expected one of almanac-qa, almanac-bio", dict(dataset="zsrre", data_path=None)),
    ("dataset 'zsre' needs a path", dict(dataset="zsre", data_path=None)),
    ("almanac-qa ships with the package", dict(dataset="almanac-qa")),
    ("almanac-qa has no split 'dev'; expected one of", dict(dataset="almanac-qa", data_path=None, split="dev")),
    ("format 'csv' is unknown", dict(format="csv")),
]
RECORDS = [
    ("record 0: key 'alt' holds null, expected text", dict(dataset="zsre", data_path=records(ZSRE | {"alt": None}))),
    ("record 1: key 'target' holds 1.5, expected text", dict(data_path=records(GOOD, GOOD | {"target": 1.5}))),
    ("record 1: key 'target' holds true, expected text", dict(data_path=records(GOOD, GOOD | {"target": True}))),
    ("record 1: key 'prompt' holds [], expected text", dict(data_path=records(GOOD, GOOD | {"prompt": []}))),
    ("key 'target' holds \" \", expected text that is not empty", dict(data_path=records(GOOD | {"target": " "}))),
    ("record 1: key 'target' is missing", dict(data_path=records(GOOD, {"prompt": "a"}))),
    ("record 1: 7 is not a record", dict(data_path=records(GOOD, 7))),
    ("expected valid Unicode text (no lone surrogates)", dict(data_path=records(GOOD | {"prompt": "\ud800"}))),
    ("key 'subjct' is unknown, expected 'subject'", dict(data_path=records(dict(prompt="a", target="b", subjct="c")))),
    ("key 'unrelated_answer' is missing", dict(data_path=records(GOOD | {"unrelated": "Olo plays"}))),
    ("probe kind 'far' is unknown", dict(data_path=records(GOOD | {"probes": [FAR]}))),
    ("has more cells than the table", dict(data_path=records("prompt,target", "Ida, who plays,oboe", name="a.csv"))),
    ("record 1: key 'target' is missing", dict(data_path=records("prompt,target", "a,b", "Ida plays,", name="a.csv"))),
    ("key 'src' is missing; zsre records carry", dict(format="zsre")),
    ("record 1, ", "subject 'Olo' does not occur", ROME | dict(data_path=records(GOOD, GOOD | {"subject": "Olo"}))),
    ("has no subject", ROME | dict(data_path=records(dict(prompt="Ida plays", target="oboe")))),
    ("exceed the context of 128", dict(data_path=records(GOOD | {"prompt": "very " * 99}))),
    ("exceed the context of 128", dict(data_path=records(GOOD | {"rephrase": "very " * 99}))),
    ("2 of 2 records are bad", dict(data_path=records(GOOD | {"target": ""}, 3), format="table", skip_bad=True)),
    ("n = 3 edits, but", "holds 2", dict(edits=3)),
]  # fmt: skip
OFFLINE = ("the hub has no such data set, or cannot be reached", "expected a connection, moments='sampled'")
SETTINGS = [
    *(
        (f"moments = '{name}", *OFFLINE, setting("prefixes=0", f"moments={given}", f"{layers}", method=method))
        for method, layers in KEY_VALUE.items()
        for given, name in (("wikipedia", "wikimedia/wikipedia:20231101.en'"), ("someones/texts", "someones/texts'"))
    ),
    ("no such file: nowhere.txt", setting("layer=1", "moments=./nowhere.txt", method="rome")),
    ("method 'mmoir' is unknown; expected one of unedited", dict(method="mmoir")),
    ("memoir has no setting taau", setting("taau=1")),
    ("'tau' is no setting, expected name=value", setting("tau")),
    ("k = 100.5, expected a valid integer", setting("k=100.5")),
    ("k = 999999, expected 1 to the 64 columns", setting("k=999999")),
    ("layer = 'two', expected a valid integer", setting("layer=two")),
    ("layer 99 does not exist; ", "has blocks 0 to 2", setting("layer=99", method="ft")),
    ("layers = (2, 1), expected one or more blocks, ascending", setting("layers=(2,1)", method="memit")),
    ("tau = 7, expected less than or equal to 1", setting("tau=7")),
    ("feature = 'mena', expected 'mean', 'mean_centred' or 'last'", setting("feature=mena")),
    ("tau = (0, 5), expected a valid number", setting("tau=0,5")),
    ("learning_rate = 'nan', expected a finite number", setting("learning_rate=nan")),
    ("learning_rate = 1e+30, expected less than", setting("learning_rate=1e30")),
    ("random_mask = 'maybe', expected a valid boolean", setting("random_mask=maybe")),
    ("step_rule = 'wild', expected 'constant' or 'relative'", setting("step_rule=wild")),
    ("write = 'rsl', expected 'sgd' or 'rls'", setting("write=rsl")),
    ("seed = 'abc', expected a valid integer", setting("seed=abc")),
    ("seed = -1, expected greater than or equal to 0", dict(seed=-1)),
    ("seed = 1180591620717411303424, expected less than", dict(seed=2**70)),
    ("argument --seed: invalid int value: 'abc'", dict(seed="abc")),
    ("n = 0 edits, expected at least 1", dict(edits=0)),
    ("argument --edits: invalid int value: 'many'", dict(edits="many")),
    ("checkpoints [9] do not fit 2 edits", dict(checkpoints="1,9")),
    ("'1,,2', expected whole numbers", dict(checkpoints="1,,2")),
    ("dtype 'float99' is unknown", dict(dtype="float99")),
    ("dtype 'int8' is unknown", dict(dtype="int8")),
]
MODELS = [
    ("no such folder: modle; as a hub id it cannot be loaded", dict(model="modle")),
    ("no model in nowhere: expected a transformers folder with a config.json", dict(model="./nowhere")),
    ("no such file: model.gguf", dict(model="model.gguf")),
    ("cannot be read as a GGUF file", dict(model=content("bad.gguf", b"GGUFxxxx"))),
    ("torn.gguf cannot be read as a GGUF file", dict(model=torn_gguf)),
    ("cannot be loaded", "config.json' is not a valid JSON", dict(model=overwritten("config.json", b"{"))),
    ("cannot be loaded", "model_type", dict(model=overwritten("config.json", b"{}"))),
    ("cannot be loaded", "`martian`", dict(model=config(model_type="martian"))),
    ("cannot be loaded", "hidden_size", dict(model=config(hidden_size="many"))),
    ("cannot be loaded", "mismatched", dict(model=config(hidden_size=64))),
    ("lacks 9 weights that its config.json asks for", dict(model=config(num_hidden_layers=4))),
    ("lacks 1 weights", "'model.norm.weight'", dict(model=weights(lambda t: t.pop("model.norm.weight") is None or t))),
    ("cannot be loaded", "no file named model.safetensors", dict(model=without("*.safetensors"))),
    ("cannot be loaded", "header too small", dict(model=overwritten("model.safetensors", b""))),
    ("cannot be loaded", "okenizer", dict(model=without("tokenizer*"))),
    ("cannot be loaded", dict(model=overwritten("tokenizer.json", b"{"))),
    ("has no chat template", dict(chat=True)),
    ("device_map = 'cuda', but torch sees no NVIDIA GPU here; expected 'cpu'", dict(device_map="cuda")),
    ("cannot be loaded", "nonsense", dict(device_map="nonsense")),
    ("the loss of edit", "became nan", "holds the first 0 edits; the same command goes on", 1, dict(
        model=weights(lambda t: {k: torch.full_like(v, float("nan")) for k, v in t.items()}), method="ft", set=[])),
]  # fmt: skip
PLACES = [
    ("is a folder, expected a file", dict(out=lambda desk: desk.folder)),
    ("result.json cannot be written: File exists", dict(out=lambda desk: desk.data / "result.json")),
    ("/proc/nowhere/result.json cannot be written: ", dict(out="/proc/nowhere/result.json")),
    ("/proc/result.json cannot be written: ", "expected another --out", dict(out="/proc/result.json")),
    ("no such file: ", dict(data_path=lambda desk: desk.folder / "deep" / "edits.json")),
    ("cannot be loaded by `datasets`", dict(data_path=lambda desk: desk.empty())),
    ("Is a directory", dict(background=lambda desk: desk.folder)),
]  # fmt: skip
ALL = {"files": FILES, "records": RECORDS, "settings": SETTINGS, "models": MODELS, "places": PLACES}
ROWS = [pytest.param(row, id=f"{kind}: {row[0][:50]}") for kind, rows in ALL.items() for row in rows]


@pytest.fixture
def desk(tmp_path, tiny_model, monkeypatch):
    def unreachable(name, timeout, **options):
        raise ConnectionError("the hub cannot be reached")

    monkeypatch.setattr("memoir.sources.model_info", unreachable)
    monkeypatch.setattr("huggingface_hub.dataset_info", unreachable)
    monkeypatch.setattr("memoir.moments.reachable", lambda name: False)
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path, tiny_model("llama"))


def command(desk, options) -> list[str]:
    given = dict(method="memoir", model=desk.model, dataset="mine", data_path=desk.data, out=desk.out)
    given |= dict(set=["feature=last", "prefixes=0", "iterations=1"]) | options
    flags = ["run"]
    for name, value in given.items():
        value = value(desk) if callable(value) else value
        if value is not None and value != []:
            values = value if isinstance(value, list) else [] if value is True else [value]
            flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


def ended(arguments) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return end.code


def told(capsys) -> str:
    """The one line that says what is wrong; transformers may log above it."""
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line.strip("\x1b[A ")]
    assert [line for line in lines if line.startswith(("memoir: ", "python -m memoir"))] == lines[-1:], lines
    assert not any(line.startswith("Traceback") for line in lines)
    return lines[-1]


@pytest.mark.filterwarnings("ignore:the blocks of damaged")  # nothing composes where all weights are NaN
@pytest.mark.parametrize("row", ROWS)
def test_a_mistake_ends_with_its_line_and_code(desk, capsys, row):
    *said, options = row
    code = said.pop() if isinstance(said[-1], int) else 2
    assert ended(command(desk, options)) == code
    line = told(capsys)
    assert all(words in line for words in said), line
    assert desk.out.read_text() == "an earlier result"


def test_there_are_many_kinds():
    assert len(ROWS) >= 60 and all(len(rows) >= 5 for rows in ALL.values())


# What goes on without the bad ones -----------------------------------------------------------------------------------


def test_a_run_without_the_bad_records_counts_them(desk, capsys):
    bad = records(GOOD, GOOD | {"target": None}, GOOD | {"subject": "Olo"}, GOOD | {"prompt": "Ida has the"})
    assert ended(command(desk, ROME | dict(data_path=bad, skip_bad=True))) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["edits"], summary["skipped"]) == (2, 2)
    unread, refused = Result.load(desk.out).skipped
    assert "edits.json, record 1: key 'target' holds null, expected text" in unread
    assert "edits.json, record 2, " in refused and "subject 'Olo' does not occur in prompt" in refused


def test_edits_from_python_are_left_out_too(tiny_model):
    from memoir import load_model, make_editor

    editor = make_editor("memoir", load_model(tiny_model("llama")), feature="last", prefixes=0, iterations=1)
    good, bad = EditRequest(**GOOD), EditRequest(prompt="very " * 99, target="long")
    with pytest.raises(BadInput, match="1 of 2 edits cannot be made: edit 1, "):
        run_edits(editor, [good, bad], progress=False)
    assert not editor.edits
    result = run_edits(editor, [good, bad], progress=False, generate=False, skip_bad=True)
    assert result.edit_ids == (good.id,) and len(result.skipped) == 1 and "exceed the context" in result.skipped[0]


# Failures and signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("CUDA out\nof memory"), OSError(28, "No space left"), KeyError("x")])
def test_any_failure_is_one_line_unless_debug_is_asked(monkeypatch, capsys, error):
    def run(**options):
        raise error

    monkeypatch.setattr(cli, "COMMANDS", {run: lambda one: None})
    assert cli.main(["run"]) == 1
    line = told(capsys)
    assert line.startswith(f"memoir: run failed: {type(error).__name__}: ") and line.endswith("--debug shows where")
    with pytest.raises(type(error)):
        cli.main(["run", "--debug"])


SCRIPT = """
import os, signal, sys, time
from memoir import __main__ as cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with Ctrl-C ignored
def run(**options):
    {work}
    return 0
cli.COMMANDS = {{run: lambda one: None}}
sys.argv = ["memoir", "run"]
sys.exit(cli.main())
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_stops_a_run_with_one_line(name):
    work = f"os.kill(os.getpid(), signal.{name}); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(work=work)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.split()) == (128 + signal.SIGINT, ["stopped"])


def test_an_output_that_nobody_reads_ends_with_one_line():
    work = "sys.stdin.read(); cli.print_json({'rel': 1.0})"
    code = [sys.executable, "-c", SCRIPT.format(work=work)]
    with subprocess.Popen(
        code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        run.stdout.close()
        run.stdin.close()
        said = run.stderr.read().splitlines()
    assert run.returncode == 1 and len(said) == 1 and said[0].startswith("memoir: run failed: BrokenPipeError")


# Random records ------------------------------------------------------------------------------------------------------

KEYS = sorted({key for forms in FORMATS.values() for form in forms for key in (*form.keys, *form.optional)})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "str"]), inner, max_size=4),
    max_leaves=8,
)
QUOTE = '"'


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8) | VALUES, min_size=1, max_size=4))
def test_random_records_are_read_or_refused_by_name(tmp_path_factory, rows):
    """Whatever the records hold: edits, or BadInput that names the file; with skip_bad no record is lost silently."""
    path = tmp_path_factory.mktemp("random") / "edits.json"
    path.write_text(json.dumps(rows))
    for name in ["mine", *FORMATS]:
        try:
            edits = load_edits(name, path=path, skip_bad=True)
        except BadInput as error:
            assert str(path) in str(error)
        else:
            read = {int(place.rpartition("record ")[2]) for place in edits.places}
            left = {int(line.partition("record ")[2].partition(":")[0]) for line in edits.skipped}
            assert not read & left and (name == "mquake" or read | left == set(range(len(rows))))
            assert all(edit.prompt.strip() and edit.target.strip() for edit in edits)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_table_says_the_same_in_every_file(tmp_path_factory, data):
    """CSV, JSON, JSON lines, gzip and a byte order mark: the same records, the same edits."""
    cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1, max_size=20)
    names = ("prompt", "target", "subject", "rephrase")
    row = st.fixed_dictionaries({name: cells.filter(str.strip) for name in names})
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    folder = tmp_path_factory.mktemp("table")
    delimiter = data.draw(st.sampled_from(",;\t"))
    lines = [names, *([row[name] for name in names] for row in rows)]
    table = "\n".join(delimiter.join(f'"{cell.replace(QUOTE, 2 * QUOTE)}"' for cell in line) for line in lines)
    texts = {
        "a.csv": table,
        "a.json": json.dumps(rows),
        "a.jsonl": "\n".join(json.dumps(row) for row in rows),
    }
    read = []
    for name, text in texts.items():
        for mark in ("", "\ufeff"):
            (folder / name).write_bytes((mark + text).encode())
            (folder / f"{name}.gz").write_bytes(gzip.compress((mark + text).encode()))
            read += [load_edits("table", path=folder / name), load_edits("table", path=folder / f"{name}.gz")]
    assert all(edits == read[0] for edits in read) and len(read[0]) == len(rows)
    assert sorted(edit.prompt for edit in read[0]) == sorted(row["prompt"] for row in rows)


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(tmp_path, monkeypatch):
    from families import small_model

    from memoir.data import load_background
    from memoir.editors import load_editor, make_editor

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    for name, content in (("edits.json", [GOOD]), ("texts.json", ["Rain."])):
        (tmp_path / "home" / name).write_text(json.dumps(content))
    edits, texts = load_edits("table", path="~/edits.json"), load_background("~/texts.json")
    editor = make_editor("ft", small_model("llama"), background=texts, layer=1, iterations=1)
    result = run_edits(editor, edits, save_to="~/run", progress=False, generate=False)
    assert Result.load(result.save("~/result.json")) == result
    editor.save("~/memory")
    editor.export("~/checkpoint")
    assert list(load_editor("~/memory", editor.model).edits) == list(editor.edits)
    kept = {"edits.json", "texts.json", "run", "result.json", "memory", "checkpoint"}
    assert {path.name for path in (tmp_path / "home").iterdir()} == kept
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
