"""Runs lose no work: killed, interrupted, or on a full disk, they end as if nothing had happened."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from families import small_model
from test_contract import METHODS, SETTINGS, editor_for

from memoir import __main__ as cli
from memoir.editors import EditError
from memoir.editors.base import write_memory
from memoir.records import EditRequest, Probe
from memoir.run import run_edits

EDITS = [
    EditRequest(
        prompt=f"The {thing} of Olo lies in",
        target=place,
        subject=f"{thing} of Olo",
        probes=(Probe(kind="rephrase", prompt=f"Olo's {thing} is in", answer=place),),
    )
    for thing, place in zip(("boat", "oboe", "harp", "lute", "hat", "boat"), ("Ulm", "Bonn", "Graz") * 2, strict=True)
]
RUN = dict(checkpoints=[3], progress=False, generate=False)


def timeless(result: dict) -> dict:
    """A result without what may differ between two runs of one command: times, memory, and the commit of the code."""
    left = {name: value for name, value in result.items() if name not in ("seconds_per_edit", "peak_bytes")}
    moment = ("started", "commit", "dirty")
    return left | {"info": {name: value for name, value in result["info"].items() if name not in moment}}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(method, tmp_path):
    model = small_model("llama")
    expected = run_edits(editor_for(method, model), EDITS, **RUN)
    rng, stopped = random.Random(method), 0
    with contextlib.suppress(StopIteration):
        for most in itertools.count(1):
            asked, last = itertools.count(), rng.randrange(3, 10) * most
            try:
                found = run_edits(
                    editor_for(method, model),
                    EDITS,
                    save_to=tmp_path / "s",
                    save_every=1,
                    cancelled=lambda asked=asked, last=last: next(asked) >= last,
                    **RUN,
                )
            except EditError:
                stopped += 1
                continue
            break
    assert timeless(found.to_json()) == timeless(expected.to_json())
    assert stopped or method in ("unedited", "incontext")


def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path, monkeypatch):
    """The run goes on, and tells; once there is room, it saves again."""
    model = small_model("llama")
    expected = run_edits(editor_for("memoir-rls", model), EDITS, **RUN)
    saves = []

    def full(folder, header, *rest):
        saves.append(made := len(header["run"]["edits"]))
        if made in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_memory(folder, header, *rest)

    monkeypatch.setattr("memoir.editors.base.write_memory", full)
    stream = dict(save_to=tmp_path / "s", save_every=1) | RUN | dict(checkpoints=[3, 6])
    with pytest.warns(UserWarning, match="after [23] edits nothing could be saved: No space left on device: .*/s"):
        found = run_edits(editor_for("memoir-rls", model), iter(EDITS), **stream)
    assert timeless(found.to_json())["losses"] == pytest.approx(expected.losses, rel=1e-4)
    assert saves == [0, 1, 2, 3, 3, 4, 5, 6, 6] and "unsaved" not in found.extra


def test_a_place_without_room_is_found_out_before_the_first_edit(tmp_path, monkeypatch):
    def full(*call):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("memoir.editors.base.write_memory", full)
    fresh = editor_for("memoir", small_model("llama"))
    with pytest.raises(OSError, match="No space left"):
        run_edits(fresh, EDITS, save_to=tmp_path / "s", **RUN)
    assert not fresh.edits


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Leave no room on a small disk; returns the file that takes it."""
    with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return folder / "filler"


def test_a_run_on_a_disk_that_fills_up_goes_on_once_there_is_room(small_disk):
    model = small_model("llama")
    expected = run_edits(editor_for("memoir", model), EDITS, **RUN)
    asked = itertools.count()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        full = run_edits(
            editor_for("memoir", model),
            EDITS,
            save_to=small_disk / "s",
            cancelled=lambda: next(asked) == 5 and bool(fill(small_disk)) and False,
            **RUN,
        )
    assert "No space left on device" in full.extra["unsaved"] and any("nothing could be saved" in str(w) for w in told)
    assert timeless(full.to_json()) | {"extra": {}} == timeless(expected.to_json())
    with pytest.raises(OSError, match="No space left"):
        run_edits(editor_for("memoir", model), EDITS, save_to=small_disk / "s", **RUN)
    (small_disk / "filler").unlink()
    found = run_edits(editor_for("memoir", model), EDITS, save_to=small_disk / "s", **RUN)
    assert timeless(found.to_json()) == timeless(expected.to_json())


def test_a_command_is_refused_on_a_full_disk(small_disk, tiny_model, zsre_file, capsys):
    fill(small_disk)
    assert cli.main(command("memoir", tiny_model, zsre_file, small_disk / "r.json")) == 2
    assert "No space left on device" in capsys.readouterr().err


def command(method: str, tiny_model, zsre_file, out: Path) -> list[str]:
    settings = SETTINGS.get(method, {}) | ({"value_steps": 20} if method == "memoir-rls" else {})
    given = [f"{name}={value!r}" for name, value in settings.items()]
    files = ["--model", str(tiny_model("llama")), "--data-path", str(zsre_file), "--out", str(out)]
    return ["run", "--method", method, "--dataset", "zsre", *files, *(["--set", *given] if given else [])]


# Saves after every look-ahead; a folder that a first save has reached is worth a kill.
PROGRAM = """
import sys
from memoir import __main__ as cli
cli.SAVE_SECONDS = 0
sys.exit(cli.main(sys.argv[1:]))
"""


def killed(method: str, kills: int, tiny_model, zsre_file, tmp_path: Path) -> None:
    """Kill a command again and again; whenever it comes to its end, the result is that of the unbroken command."""
    assert cli.main(command(method, tiny_model, zsre_file, tmp_path / "whole.json")) == 0
    expected = timeless(json.loads((tmp_path / "whole.json").read_text()))
    out, rng, span = tmp_path / "r.json", random.Random(method), 2.0
    arguments = [sys.executable, "-c", PROGRAM, *command(method, tiny_model, zsre_file, out)]
    while kills:
        with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            while process.poll() is None and not (tmp_path / "r.json.run" / "config.json").exists():
                time.sleep(0.02)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, span))
            process.send_signal(signal.SIGKILL)
            told = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), told
        if process.returncode:
            kills -= 1
        else:  # too late for a kill
            assert timeless(json.loads(out.read_text())) == expected
            span /= 2
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cli, "SAVE_SECONDS", 0)  # as in `PROGRAM`
        assert cli.main(command(method, tiny_model, zsre_file, out)) == 0
    assert timeless(json.loads(out.read_text())) == expected


def test_a_killed_command_goes_on(tiny_model, zsre_file, tmp_path):
    killed("memoir-rls", 1, tiny_model, zsre_file, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["memoir", "memoir-rls", "wise", "grace", "alphaedit"])
def test_twenty_kills_at_random_moments_do_not_show(method, tiny_model, zsre_file, tmp_path):
    killed(method, 4, tiny_model, zsre_file, tmp_path)


def test_ctrl_c_says_what_is_saved_and_the_same_command_goes_on(tiny_model, zsre_file, tmp_path, monkeypatch, capsys):
    assert cli.main(command("memoir", tiny_model, zsre_file, tmp_path / "whole.json")) == 0
    arguments = command("memoir", tiny_model, zsre_file, tmp_path / "r.json")
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with Ctrl-C ignored
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr("memoir.evaluation.Evaluation.checkpoint", lambda *a: os.kill(os.getpid(), signal.SIGINT))
        cli.main(arguments)
    assert ended.value.code == 130
    assert "holds the first 12 edits; the same command goes on from there" in capsys.readouterr().err
    monkeypatch.setattr("memoir.editors.memoir.MEMOIR.write", None)  # there is nothing left to write
    assert cli.main(arguments) == 0
    again, whole = (timeless(json.loads((tmp_path / name).read_text())) for name in ("r.json", "whole.json"))
    assert again == whole
