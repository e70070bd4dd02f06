"""Runs: all edits at every checkpoint, provenance, and streams that survive a kill."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from families import small_model

from memoir.data import EditSet
from memoir.editors import EditError, MemoryFileError, make_editor
from memoir.records import EditRequest, Probe, Result
from memoir.run import SCORES, Evaluation, run_edits

SETTINGS = dict(layer=1, k=16, feature="last", tau=0.97, iterations=6, learning_rate=3.0, prefixes=0)


def request(i: int) -> EditRequest:
    return EditRequest(
        prompt=f"{i} things, {i * 7}",
        target=f"made of {i % 5}",
        probes=(
            Probe(kind="rephrase", prompt=f"Things, {i} of {i * 7}", answer=f"made of {i % 5}"),
            Probe(kind="unrelated", prompt=f"Nothing like it {i}", answer="rain and snow"),
        ),
    )


EDITS = EditSet([request(i) for i in range(9)], "things", seed=4)


@pytest.fixture
def model():
    return small_model("llama")


def editor(model, **overrides):
    return make_editor("memoir", model, **SETTINGS | overrides)


def test_a_result_says_what_was_measured_and_where_it_comes_from(model, tmp_path):
    result = run_edits(editor(model), EDITS, checkpoints=[1, 4], progress=False)
    assert [c.edits for c in result.checkpoints] == [1, 4, 9]
    last = result.checkpoints[-1]
    assert set(last.scores) == set(SCORES) and all(len(v) == 9 for v in last.per_edit.values())
    assert last.scores["loc_same_subject"] is None and 0 <= last.scores["avg"] <= 1
    for name in ("rel", "gen", "loc", "ppl"):
        assert last.scores[name] == pytest.approx(math.fsum(last.per_edit[name]) / 9)
    info = result.info
    assert (info.method, info.dataset, info.edits, info.dtype) == ("memoir", "things", 9, "float32")
    assert info.config["k"] == 16 and info.model_fingerprint == model.fingerprint and "evaluated" in info.protocol
    assert result.edit_ids == tuple(e.id for e in EDITS) and len(result.losses) == 9 and result.peak_bytes > 1e7
    assert Result.load(result.save(tmp_path / "r.json")) == result


def test_scores_are_taken_after_the_last_edit_not_after_each(model):
    """A memory without routing forgets: the first edit's score must be the one it has in the end."""
    forgetful = editor(model, routing=False, learning_rate=20.0)
    result = run_edits(forgetful, EDITS, checkpoints=[1], progress=False)
    first, last = (c.per_edit["ppl"][0] for c in result.checkpoints)
    assert last != first
    assert last == pytest.approx(Evaluation(forgetful, generate=False).scores(list(EDITS))["ppl"][0])


def test_locality_is_agreement_with_the_unedited_model_not_with_the_answer(model):
    unrouted = editor(model)
    scores = Evaluation(unrouted).scores(list(EDITS))
    assert scores["loc"] == [1.0] * 9  # no edits yet, though a random model gets no answer right
    assert scores["unrelated_ppl"] == scores["unrelated_ppl_unedited"]


def test_routing_scores_count_the_right_edit(model):
    exact = editor(model)
    exact.edit(list(EDITS))
    scores = Evaluation(exact, generate=False).scores(list(EDITS))
    read = exact.matches([e.prompt for e in EDITS])
    assert read == [e.id for e in EDITS]
    rephrased = exact.matches([e.probe("rephrase").prompt for e in EDITS])
    for edit, found, recall in zip(EDITS, rephrased, scores["routing_recall"], strict=True):
        assert recall == (1 + (found == edit.id)) / 2
    assert exact.matches(["zzz"]) == [found.edit_id if (found := exact.explain("zzz")).fired else None]


@pytest.mark.parametrize(
    ("edits", "options", "message"),
    [
        ([], {}, "no edits to run"),
        (list(EDITS), dict(checkpoints=[99]), r"checkpoints \[9, 99\] do not fit 9 edits"),
        (list(EDITS), dict(checkpoints=[0]), "are no numbers of edits"),
        (iter(EDITS), {}, "are no numbers of edits"),
        (iter(EDITS), dict(checkpoints=[12]), "the stream ended after 9 edits, expected 12"),
    ],
)
def test_runs_that_cannot_be_are_named(model, edits, options, message):
    with pytest.raises(ValueError, match=message):
        run_edits(editor(model), edits, progress=False, **options)


def endless():
    return map(request, itertools.count())


@pytest.mark.parametrize("write", ["sgd", "rls"])
def test_a_stream_resumed_is_the_stream_that_never_stopped(model, tmp_path, write):
    options = dict(checkpoints=[5, 12], save_every=3, progress=False, generate=False)
    settings = dict(write=write)
    whole = editor(model, **settings)
    expected = run_edits(whole, endless(), save_to=tmp_path / "whole", **options)
    stopped = editor(model, **settings)
    asked = itertools.count()
    with pytest.raises(EditError):
        run_edits(stopped, endless(), save_to=tmp_path / "s", cancelled=lambda: next(asked) > 50, **options)
    assert 0 < len(stopped.edits) < 12
    resumed = editor(model, **settings)
    found = run_edits(resumed, endless(), save_to=tmp_path / "s", **options)
    assert torch.equal(resumed.memory.weight, whole.memory.weight) and resumed.memory.bank.ids == whole.memory.bank.ids
    assert found.checkpoints == expected.checkpoints and found.losses == expected.losses


def test_a_stream_goes_on_only_as_what_it_was(model, tmp_path):
    run_edits(editor(model), EDITS, save_to=tmp_path / "s", progress=False, generate=False)
    with pytest.raises(MemoryFileError, match=r"other settings than this memoir editor's \(they differ in k\)"):
        run_edits(editor(model, k=17), EDITS, save_to=tmp_path / "s", progress=False)
    used = editor(model)
    used.edit(EDITS[0])
    with pytest.raises(EditError, match="holds 1 edits already; resume with a fresh one"):
        run_edits(used, EDITS, save_to=tmp_path / "s", progress=False)


@pytest.mark.slow
def test_fifty_kills_lose_nothing(tmp_path):
    """A stream killed with SIGKILL at random moments, again and again, ends as if it had run through."""
    program = textwrap.dedent(f"""
        import itertools, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_run import SETTINGS, editor, endless, run_edits, small_model
        print("ready", flush=True)
        run_edits(editor(small_model("llama"), write="rls"), endless(), checkpoints=[600],
                  save_every=5, save_to={str(tmp_path / "s")!r}, progress=False, generate=False)
    """)
    rng, kills = random.Random(0), 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    while kills < 50:
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as process:
            process.stdout.readline()
            time.sleep(rng.uniform(0, 1.5))
            process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
    subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, env=environment, check=True)
    model = small_model("llama")
    found = editor(model, write="rls")
    header = found.resume(tmp_path / "s")
    whole = editor(model, write="rls")
    result = run_edits(
        whole, endless(), checkpoints=[600], save_every=5, save_to=tmp_path / "w", progress=False, generate=False
    )
    assert all(map(torch.equal, found.memory.pages, whole.memory.pages)) and len(found.memory.pages) > 1
    assert header["run"]["losses"] == list(result.losses)
