"""Runs: all edits at every checkpoint, provenance, and streams that survive a kill."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import small_model

from memoir.data import EditSet, load_edits
from memoir.editors import EditError, MemoryFileError, make_editor
from memoir.editors.storage import read_header
from memoir.evaluation import SCORES, WHOLE, Evaluation, passages_for
from memoir.models import load_model
from memoir.records import EditRequest, Probe, Result
from memoir.run import check_edits, run_edits, run_separately

SETTINGS = dict(
    layer=1, k=16, feature="last", tau=0.97, iterations=6, step_rule="constant", learning_rate=3.0, prefixes=0
)


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


BY_RLS = dict(layer=1, k=16, feature="last", tau=0.97, prefixes=0, write="rls")


def editor(model, **overrides):
    settings = BY_RLS if overrides.get("write") == "rls" else SETTINGS
    return make_editor("memoir", model, **settings | overrides)


def test_a_result_says_what_was_measured_and_where_it_comes_from(model, tmp_path):
    result = run_edits(editor(model), EDITS, checkpoints=[1, 4], progress=False)
    assert [c.edits for c in result.checkpoints] == [1, 4, 9]
    last = result.checkpoints[-1]
    assert set(last.scores) == set(SCORES) and all(len(v) == 9 for v in last.per_edit.values())
    assert set(last.per_edit) == set(SCORES) - set(WHOLE)
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


def answers_by_hand(model, prompt: str, count: int) -> str:
    """Greedy decoding without `generate`: one forward pass per token, until the end token or `count` tokens."""
    ids = model.tokenizer(prompt)["input_ids"]
    said: list[int] = []
    while len(said) < count:
        is_prompt = torch.tensor([[True] * len(ids) + [False] * len(said)])
        with torch.no_grad(), model.scope.prompt(is_prompt):
            logits = model.network(input_ids=torch.tensor([ids + said])).logits[0, -1]
        if (token := int(logits.argmax())) == model.tokenizer.eos_token_id:
            break
        said.append(token)
    return model.tokenizer.decode(said).strip()


@pytest.mark.parametrize("learn_stop", [True, False])
def test_free_answers_are_scored_against_greedy_decoding_by_hand(model, learn_stop):
    taught = editor(model, iterations=60, learn_stop=learn_stop, on_conflict="keep-both")
    reports = taught.edit(list(EDITS[:4]))
    scores = Evaluation(taught).scores(list(EDITS[:4]))
    for i, edit in enumerate(EDITS[:4]):
        answer = answers_by_hand(model, edit.prompt, len(f" {edit.target}") + 4)
        assert scores["exact_match"][i] == scores["generated"][i] == (answer == edit.target)
        behind = answer.removeprefix(edit.target)
        assert scores["begins"][i] == (behind != answer and not behind[:1].isalnum())
    assert sum(report.learned for report in reports) >= 3  # when they were written; later edits wear them
    assert any(scores["generated" if learn_stop else "begins"])
    assert learn_stop or not any(scores["generated"])  # nothing taught this model to stop


@pytest.mark.parametrize("learn_stop", [True, False])
def test_an_edit_is_reported_as_learned_when_the_model_says_it(model, learn_stop):
    """Right after each edit, before the next one is written, by the greedy answer to its own prompt."""
    taught = editor(model, iterations=60, learn_stop=learn_stop, on_conflict="keep-both")
    patient = taught.config
    for config, expected in ((replace(patient, iterations=1, learning_rate=1e-6), False), (patient, True)):
        taught.config = config
        (report,) = taught.edit(EDITS[2])
        answer = answers_by_hand(model, EDITS[2].prompt, len(EDITS[2].target) + 5)
        says = answer == EDITS[2].target if learn_stop else answer.startswith(EDITS[2].target)
        assert report.learned is says is expected
    (silent,) = taught.edit(EDITS[3], check=False)
    assert silent.learned is None


def test_a_method_that_teaches_no_stop_has_only_to_begin_with_the_target(model):
    for method in ("unedited", "incontext"):
        assert make_editor(method, model).says("Brno is a city", "Brno")
    assert not editor(model).says("Brno is a city", "Brno")
    assert editor(model, learn_stop=False).says("Brno is a city", "Brno")


def test_the_question_whether_an_edit_was_learned_does_not_count_as_editing(model, monkeypatch):
    slow, late = editor(model), []
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + sum(late))
    monkeypatch.setattr("memoir.editors.base.time", clock)
    monkeypatch.setattr(slow, "learned", lambda requests: late.append(1000) or [True] * len(requests))
    (report,) = slow.edit(EDITS[0])
    assert report.learned and late and report.seconds < 1000
    monkeypatch.setattr(slow, "learned", lambda requests: 1 / 0)  # a run asks nothing while it edits
    run_edits(slow, EDITS[1:3], progress=False)


TEXTS = ["The sea is calm. A boat comes home. It brings fish.", "Bread is simple. It wants flour, water and time."]


def test_perplexity_of_passages_against_a_plain_reading(model):
    forgetful = editor(model, routing=False, learning_rate=20.0)
    forgetful.edit(EDITS[0])

    def plainly() -> float:
        """One unpadded text at a time, without the package's batches: what follows the first sentence."""
        surprise = []
        for text in TEXTS:
            first = len(text.partition(". ")[0]) + 1  # in bytes, which are tokens here
            batch = model.encode([text[:first]], [text[first + 1 :]])
            with torch.no_grad():
                logits = model.forward(batch)[0].log_softmax(-1)
            tokens = model.tokenizer(text)["input_ids"]
            assert batch.input_ids[0].tolist() == tokens
            surprise += [-float(logits[i - 1, tokens[i]]) for i in range(first, len(tokens))]
        return math.exp(math.fsum(surprise) / len(surprise))

    scores = Evaluation(forgetful, generate=False, texts=TEXTS).checkpoint(EDITS[:1]).scores
    assert scores["text_ppl"] == pytest.approx(plainly(), rel=1e-4)
    with forgetful.detached():
        assert scores["text_ppl_unedited"] == pytest.approx(plainly(), rel=1e-4)
    assert scores["text_ppl"] != scores["text_ppl_unedited"]


def test_passages_that_no_edit_reads_keep_their_perplexity_and_long_ones_are_left_out(model):
    routed = editor(model)
    routed.edit(EDITS[0])
    scores = Evaluation(routed, generate=False, texts=[*TEXTS, "Long. " + "words " * 40]).checkpoint(EDITS[:1]).scores
    assert scores["text_ppl"] == scores["text_ppl_unedited"] > 1
    result = run_edits(editor(model), EDITS[:1], progress=False, generate=False, texts=TEXTS)
    assert result.summary()["text_ppl_unedited"] == pytest.approx(scores["text_ppl_unedited"])
    for texts in (["One sentence only"], (), None):  # our own passages exceed this model's 128 tokens
        scores = Evaluation(routed, generate=False, texts=texts).checkpoint(EDITS[:1]).scores
        assert scores["text_ppl"] is scores["text_ppl_unedited"] is None


def test_a_summary_counts_replaced_edits_and_names_tau(model):
    again = [replace(EDITS[0], target=target, id="") for target in ("gold", "lead")]
    unlike = editor(model, tau=1.0)
    summary = run_edits(unlike, [*EDITS[:3], *again], progress=False).summary()
    assert (summary["replaced"], summary["tau"]) == (2, 1.0) and len(unlike.edits) == 3
    assert {"generated", "begins", "text_ppl", "text_ppl_unedited"} < summary.keys()
    for method, settings in (("memoir", SETTINGS | {"routing": False}), ("ft", dict(layer=1, iterations=2))):
        unrouted = make_editor(method, model, **settings)
        assert run_edits(unrouted, EDITS[:1], progress=False, generate=False).summary()["tau"] is None


def test_the_almanacs_passages_are_ones_that_its_model_knows():
    model = load_model("almanac")
    fresh = Evaluation(make_editor("unedited", model), generate=False)
    assert len(passages_for(model)) == len(fresh._texts) == 30
    assert fresh.checkpoint(load_edits("almanac-qa", n=1)).scores["text_ppl"] < 1.5


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
        (list(EDITS), dict(checkpoints=[0]), "expected numbers of edits, at least 1"),
        (iter(EDITS), {}, "expected numbers of edits, at least 1"),
        (iter(EDITS), dict(checkpoints=[12]), "the stream ended after 9 edits, expected 12"),
        (iter(()), dict(checkpoints=itertools.count(3)), "the stream ended after 0 edits, expected 3"),
        (iter(EDITS), dict(checkpoints=iter([2, 2])), "checkpoint 2 comes after 2, expected rising numbers from 1 on"),
        (iter(EDITS), dict(checkpoints=itertools.count()), "checkpoint 0 comes after 0"),
        (list(EDITS), dict(save_every=0), "save_every = 0 edits, expected at least 1"),
    ],
)
def test_runs_that_cannot_be_are_named(model, edits, options, message):
    with pytest.raises(ValueError, match=message):
        run_edits(editor(model), edits, progress=False, **options)


def test_all_edits_are_checked_before_the_first_one_and_the_bad_ones_named_together(model):
    probe = Probe(kind="unrelated", prompt="far " * 40, answer="away")
    long = [EditRequest(prompt=f"{i} {'very ' * 40}long", target="x", id=f"long-{i}") for i in range(10)]
    bad = [*long, EditRequest(prompt="short", target="x", id="probed", probes=(probe,))]
    used = editor(model)
    with pytest.raises(ValueError, match=r"11 of 20 edits cannot be made: edit 9, 'long-0' .*exceed the con") as caught:
        run_edits(used, [*EDITS, *bad], progress=False)
    lines = str(caught.value).splitlines()
    assert len(lines) == 12 and lines[-2] == "and 1 more" and "'long-9'" in lines[-3] and not used.edits
    used.check = lambda edit: (_ for _ in ()).throw(ValueError("no subject")) if edit is EDITS[1] else None
    with pytest.raises(ValueError, match=rf"1 of 9 edits cannot be made: edit 1, '{EDITS[1].id}' .*: no subject"):
        check_edits(used, EDITS)
    check_edits(used, EDITS[2:])


def test_missing_metadata_and_a_missing_git_cost_no_result(model, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("memoir.provenance.version", missing)
    monkeypatch.setenv("PATH", "")
    info = run_edits(editor(model), EDITS[:1], progress=False, generate=False).info
    assert info.versions["memoir"] is None and info.versions["python"] and (info.commit, info.dirty) == (None, None)


def test_provenance_is_gathered_before_the_first_edit(model, monkeypatch):
    monkeypatch.setattr("memoir.run.run_info", lambda *args: 1 / 0)
    used = editor(model)
    with pytest.raises(ZeroDivisionError):
        run_edits(used, EDITS, progress=False)
    assert not used.edits


def test_several_probes_of_a_kind_count_as_their_mean(model):
    forgetful = editor(model, routing=False)
    forgetful.edit(EDITS[0])
    probes = [Probe(kind="unrelated", prompt=f"Far off {i}", answer="rain and snow") for i in range(3)]
    one_each = [EditRequest(prompt=f"{i}", target="x", probes=(probe,)) for i, probe in enumerate(probes)]
    together = EditRequest(prompt="0", target="x", probes=tuple(probes))
    alone = Evaluation(forgetful, generate=False).scores(one_each)
    (found,) = Evaluation(forgetful, generate=False).scores([together])["loc"]
    assert found == pytest.approx(math.fsum(alone["loc"]) / 3)
    assert len(set(alone["loc"])) > 1


@pytest.mark.parametrize("edits", [EDITS[:2], []])
def test_separate_runs_leave_the_models_editor_attached(model, edits):
    used = editor(model)
    with pytest.raises(ValueError, match="no edits") if not edits else contextlib.nullcontext():
        run_separately("ft", model, [edits], layer=1, iterations=1)
    assert model.editor is used and used.edit(EDITS[0], check=False)


def endless():
    return map(request, itertools.count())


@pytest.mark.parametrize("edits", [endless, lambda: list(map(request, range(12)))], ids=["stream", "list"])
@pytest.mark.parametrize("write", ["sgd", "rls"])
def test_a_stream_resumed_is_the_stream_that_never_stopped(model, tmp_path, write, edits):
    options = dict(checkpoints=[5, 12], save_every=3, progress=False, generate=False)
    settings = dict(write=write)
    whole = editor(model, **settings)
    expected = run_edits(whole, edits(), save_to=tmp_path / "whole", **options)
    stopped = editor(model, **settings)
    asked = itertools.count()
    with pytest.raises(EditError):
        run_edits(stopped, edits(), save_to=tmp_path / "s", cancelled=lambda: next(asked) > 50, **options)
    assert 0 < len(stopped.edits) < 12
    resumed = editor(model, **settings)
    found = run_edits(resumed, edits(), save_to=tmp_path / "s", **options)
    assert torch.equal(resumed.memory.weight, whole.memory.weight) and resumed.memory.bank.ids == whole.memory.bank.ids
    assert found.checkpoints == expected.checkpoints and found.losses == expected.losses


CLOCKS = {
    "frozen": lambda: itertools.repeat(0.0),
    "leaping": lambda: itertools.count(0, 100.0),
    "erratic": lambda: itertools.accumulate(random.Random(1).choice((0.0, 7.0)) for _ in itertools.count()),
}


@pytest.mark.parametrize("write", ["sgd", "rls"])
@pytest.mark.parametrize(
    ("clock", "kills"), [("frozen", False), ("leaping", False), ("erratic", False), ("erratic", True)]
)
def test_neither_the_clock_nor_a_kill_nor_a_save_shows_in_what_comes_out(
    model, tmp_path, monkeypatch, clock, kills, write
):
    """Saved every 5 edits or 10 seconds, the same comes out as from a run that saves nothing."""
    options = dict(checkpoints=[7, 13], progress=False, generate=False)
    whole = editor(model, write=write)
    expected = run_edits(whole, endless(), **options)
    now = SimpleNamespace(monotonic=CLOCKS[clock]().__next__, perf_counter=itertools.repeat(0.0).__next__)
    monkeypatch.setattr("memoir.run.time", now)
    rng, saves = random.Random(2), []
    options |= dict(save_to=tmp_path / "s", save_every=5, save_seconds=10)
    while True:
        going = editor(model, write=write)
        save = going.save
        going.save = lambda folder, run, save=save: saves.append(len(run["edits"])) or save(folder, run=run)
        asks = itertools.count()
        last = rng.randrange(*((120, 200) if write == "rls" else (45, 70))) if kills else math.inf
        try:
            found = run_edits(going, endless(), cancelled=lambda a=asks, n=last: next(a) > n, **options)
        except EditError:
            continue
        break
    assert torch.equal(going.memory.weight, whole.memory.weight) and found.losses == expected.losses
    assert found.checkpoints == expected.checkpoints and [c.edits for c in found.checkpoints] == [7, 13]
    if not kills:
        by_number = [0, 5, 7, 7, 10, 13, 13]
        by_clock = [*range(8), *range(7, 14), 13]
        assert clock == "erratic" or saves == (by_number if clock == "frozen" else by_clock)


@pytest.mark.parametrize(("cost", "saves"), [(0.0, 13), (4.0, 13), (50.0, 2)])
def test_saving_takes_a_twentieth_of_the_time_at_most(model, tmp_path, monkeypatch, cost, saves):
    """Every edit takes 100 seconds on this clock, and a save may be due every ten."""
    slow = SimpleNamespace(monotonic=itertools.count(0, 100.0).__next__, perf_counter=itertools.count(0, cost).__next__)
    monkeypatch.setattr("memoir.run.time", slow)
    made, counted = editor(model), []
    save = made.save
    made.save = lambda folder, run: counted.append(len(run["edits"])) or save(folder, run=run)
    run_edits(
        made, endless(), checkpoints=[13], save_to=tmp_path / "s", save_seconds=10, progress=False, generate=False
    )
    assert len([n for n in counted if n < 13]) == saves


@pytest.mark.parametrize("size", [1, 2])
def test_a_stream_is_read_no_further_than_is_written_next_and_a_list_is_handed_over_whole(model, tmp_path, size):
    options = dict(save_every=5, progress=False, generate=False)
    parts: list[int] = []

    def recorded():
        recording = editor(model, batch_size=size)
        edit = recording.edit
        recording.edit = lambda batch, **how: parts.append(len(batch)) or edit(batch, **how)
        return recording

    def live():
        for i in itertools.count():
            assert i - sum(parts) < size
            yield request(i)

    streamed = run_edits(recorded(), live(), checkpoints=[7, 12], save_to=tmp_path / "s", **options)
    assert parts == ([1] * 12 if size == 1 else [2, 2, 2, 1, 2, 2, 1])
    assert streamed.together == tuple(n for n in parts for _ in range(n))
    parts.clear()
    listed = run_edits(recorded(), list(map(request, range(12))), checkpoints=[7], save_to=tmp_path / "l", **options)
    assert parts == [7, 5]  # as many as the editor looks ahead at
    assert streamed.losses == pytest.approx(listed.losses, rel=1e-4)
    assert streamed.together == listed.together


def test_checkpoints_may_be_endless_and_then_the_streams_end_is_the_last(model, tmp_path):
    options = dict(progress=False, generate=False)
    expected = run_edits(editor(model), EDITS[:7], checkpoints=[3, 6], **options).checkpoints
    for edits in (iter(EDITS[:7]), EDITS[:7]):
        found = run_edits(editor(model), edits, checkpoints=itertools.count(3, 3), **options)
        assert found.checkpoints == expected and found.info.edits == 7
    for length in (5, 7, 7):  # stopped, gone on, and asked for once more
        found = run_edits(
            editor(model), iter(EDITS[:length]), checkpoints=itertools.count(3, 3), save_to=tmp_path / "s", **options
        )
    assert [c.edits for c in found.checkpoints] == [3, 5, 6, 7] and len(found.losses) == 7


def test_a_run_without_end_holds_nothing_for_the_saves_to_come(model, tmp_path):
    """What is to come is counted, not listed: a list of these would not fit any memory."""
    with pytest.raises(ValueError, match="the stream ended after 2 edits, expected 1000000000000"):
        run_edits(
            editor(model), iter(EDITS[:2]), checkpoints=[10**12], save_to=tmp_path / "s", save_every=1, progress=False
        )


def test_a_stream_goes_on_only_as_what_it_was(model, tmp_path):
    run_edits(editor(model), EDITS, save_to=tmp_path / "s", progress=False, generate=False)
    with pytest.raises(MemoryFileError, match=r"other settings than this memoir editor's \(they differ in k\)"):
        run_edits(editor(model, k=17), EDITS, save_to=tmp_path / "s", progress=False, generate=False)
    with pytest.raises(MemoryFileError, match="evaluated with different eval_batch_size, generate, texts;"):
        run_edits(editor(model), EDITS, save_to=tmp_path / "s", progress=False, eval_batch_size=3, texts=TEXTS)
    used = editor(model)
    used.edit(EDITS[0])
    with pytest.raises(EditError, match="holds 1 edits already; resume with a fresh one"):
        run_edits(used, EDITS, save_to=tmp_path / "s", progress=False, generate=False)


OTHER = EditRequest(prompt=EDITS[2].prompt, target="gold")


@pytest.mark.parametrize(
    ("edits", "checkpoints", "message"),
    [
        (EDITS[4:], None, rf"its edit 1 is '{EDITS[0].id}' .*, this stream's '{EDITS[4].id}'"),
        ([*EDITS[:2], OTHER, *EDITS[3:]], None, r"its edit 3 is .* → 'made of 2'\), this stream's .* → 'gold'\)"),
        ([replace(EDITS[0], probes=()), *EDITS[1:]], None, r"its edit 1, .*, has other probes"),
        (EDITS[:3], None, "holds a run of 4 edits, and the stream ended after 3"),
        (iter(EDITS), [2], "holds a run of 4 edits, but the last checkpoint is 2"),
        (iter(EDITS), iter([2]), "holds a run of 4 edits, but the last checkpoint is 2"),
        (EDITS, [3], r"holds a run of 4 edits without checkpoint 3; expected checkpoints from 4 on besides \[2, 4\]"),
        (iter(EDITS), itertools.count(1), "without checkpoint 1"),
    ],
)
def test_a_run_of_other_edits_or_checkpoints_is_refused_by_name_before_anything_is_touched(
    model, tmp_path, edits, checkpoints, message
):
    run_edits(editor(model), EDITS[:4], checkpoints=[2], save_to=tmp_path / "s", progress=False, generate=False)
    files = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    other = editor(model)
    with pytest.raises(MemoryFileError, match=message):
        run_edits(other, edits, checkpoints=checkpoints, save_to=tmp_path / "s", progress=False, generate=False)
    assert not other.edits and not len(other.memory.bank)
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}


def test_a_finished_run_goes_on_with_more_edits(model, tmp_path):
    options = dict(progress=False, generate=False)
    for edits in (EDITS[:4], EDITS, EDITS):
        found = run_edits(editor(model), edits, save_to=tmp_path / "s", **options)
    whole = run_edits(editor(model), EDITS, checkpoints=[4], save_to=tmp_path / "whole", **options)
    assert found.checkpoints == whole.checkpoints and found.losses == whole.losses


def test_a_memory_without_a_run_is_named_and_an_empty_folder_is_a_new_one(model, tmp_path):
    saved = editor(model)
    saved.edit(EDITS[0])
    saved.save(tmp_path / "memory")
    with pytest.raises(MemoryFileError, match="holds a memory but no run; expected a folder of a run, or a new one"):
        run_edits(editor(model), EDITS, save_to=tmp_path / "memory", progress=False)
    (tmp_path / "empty").mkdir()
    found = run_edits(editor(model), EDITS[:2], save_to=tmp_path / "empty", progress=False, generate=False)
    assert [c.edits for c in found.checkpoints] == [2]


@pytest.mark.parametrize("lost", ["terms", "losses", "checkpoints"])
def test_a_run_that_lacks_a_part_is_damaged(model, tmp_path, lost):
    made = editor(model)
    run_edits(made, EDITS[:2], save_to=tmp_path / "s", progress=False, generate=False)
    run = read_header(tmp_path / "s")["run"]
    made.save(tmp_path / "s", run={name: value for name, value in run.items() if name != lost})
    with pytest.raises(MemoryFileError, match=f"s is damaged: its run cannot be read .*'{lost}'"):
        run_edits(editor(model), EDITS[:2], save_to=tmp_path / "s", progress=False, generate=False)


def test_one_bar_counts_the_edits_from_where_the_run_goes_on(model, tmp_path, capsys):
    options = dict(checkpoints=[3], generate=False, texts=(), save_to=tmp_path / "s")
    run_edits(editor(model), EDITS[:3], progress=False, **options)
    assert not capsys.readouterr().err
    run_edits(editor(model), EDITS, **options)
    counts = re.findall(r"memoir: +\d+%\|.*?\| (\d+/9)", capsys.readouterr().err)
    assert (counts[0], counts[-1]) == ("3/9", "9/9")


OFTEN = dict(checkpoints=[600], save_every=50, save_seconds=0.1, progress=False, generate=False)


@pytest.mark.slow
def test_fifty_kills_lose_nothing(tmp_path):
    """A stream killed with SIGKILL at random moments, again and again, ends as if it had run through."""
    program = textwrap.dedent(f"""
        import itertools, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_run import OFTEN, editor, endless, run_edits, small_model
        print("ready", flush=True)
        run_edits(editor(small_model("llama"), write="rls"), endless(), save_to={str(tmp_path / "s")!r}, **OFTEN)
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
    result = run_edits(whole, endless(), save_to=tmp_path / "w", **OFTEN)
    assert all(map(torch.equal, found.memory.pages, whole.memory.pages)) and len(found.memory.pages) > 1
    assert header["run"]["losses"] == list(result.losses)
