"""The audit of an edit set: by hand, against brute force, and on ZsRE."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memoir as mm
from memoir.records import EditRequest, Probe

SHARED = Path(__file__).parents[2] / "shared" / "data"


def edit(subject: str, wording: str, target: str, rephrases=("Say {} again",), truth: str = "") -> EditRequest:
    probes = [Probe(kind="rephrase", prompt=text.format(subject), answer=target) for text in rephrases]
    probes.append(Probe(kind="unrelated", prompt="What is the tallest tree?", answer="a redwood"))
    return EditRequest(
        prompt=wording.format(subject), target=target, subject=subject, truth=truth, probes=tuple(probes)
    )


def test_what_contradicts_and_what_only_may_is_told_apart():
    edits = [
        edit("Ada", "Who designed {}?", "Kahn"),
        edit("Ada", "Who drew {}?", "Wren", ["Who designed {}?"]),  # the set links both wordings: a contradiction
        edit("Bo", "Where is {}?", "Oslo"),
        edit("Bo", "When did {} open?", "1950", ["When was {} new?"]),  # nothing links them: perhaps another relation
        edit("Cy", "Where is {}?", "Bonn"),
        edit("Cy", "Where is {}?", "the Bonn."),  # the same target
    ]
    found = mm.audit(edits)
    assert (found.edits, found.subjects, found.repeated_subjects, found.on_repeated_subjects) == (6, 3, 3, 6)
    assert (found.contradicting_subjects, found.contradicting_wordings) == (2, 1)
    assert found.ceiling == pytest.approx((4 / 6, 5 / 6)) and found.ceiling_text == "0.67–0.83"


def test_wordings_are_linked_over_other_subjects_and_through_several_edits():
    links = [edit("X", "A {}?", "1", ["B {}?"]), edit("Y", "C {}?", "2", ["B {}?"]), edit("Z", "D {}?", "3", ["C {}?"])]
    asked_twice = [edit("W", "A {}?", "4", ["A, {}?"]), edit("W", "D {}?", "5", ["D, {}?"])]
    assert mm.audit(links + asked_twice).contradicting_wordings == 1
    assert mm.audit(links[:2] + asked_twice).contradicting_wordings == 0


def test_true_answers_tell_the_questions_of_a_subject_apart():
    edits = [edit("Ada", "Where is {}?", "Rome", truth="Oslo"), edit("Ada", "Who is {}?", "Bo", truth="Cy")]
    assert mm.audit(edits).ceiling == (1, 1) and mm.audit(edits).contradicting_subjects == 0
    assert mm.audit([replace(one, truth="") for one in edits]).contradicting_subjects == 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("1234")), min_size=1, max_size=7))
def test_the_low_ceiling_is_the_best_that_one_answer_per_subject_can_reach(pairs):
    edits = [edit(subject, "What is {}?", target) for subject, target in pairs]
    best = max(
        sum(dict(zip("xyz", answers, strict=True))[subject] == target for subject, target in pairs)
        for answers in product("1234", repeat=3)
    )
    assert mm.audit(edits).ceiling[0] == pytest.approx(best / len(pairs))


def test_flaws_of_single_edits_are_counted_and_a_clean_set_gets_one_line():
    clean = edit("Ada", "Where is {}?", "Rome")
    assert mm.audit([clean]).lines() == ["Edits: 1. Subjects: 1."]
    probe = Probe(kind="same_template", prompt="WHERE is Ada", answer="Oslo")
    flawed = [
        clean,
        replace(clean, subject="Bo", target=" Rome", id="spaces"),
        replace(clean, subject="Cy", probes=(), id="bare"),
        replace(clean, subject="Di", probes=(*clean.probes, probe), id="edited"),
    ]
    found = mm.audit(flawed)
    assert (found.spaces, found.no_rephrase, found.no_locality, found.edited_localities) == (1, 1, 1, 1)
    assert mm.audit([flawed[2]]).ceiling is None and len(mm.audit([flawed[2]]).lines()) == 3


def test_a_model_is_asked_for_targets_and_truths():
    prompt = "What is the capital of New Zealand?"
    edits = [
        EditRequest(prompt=prompt, target="Wellington"),
        EditRequest(prompt=prompt, target="Auckland", truth="Wellington"),
        EditRequest(prompt=prompt, target="Auckland", truth="Auckland", id="false"),
    ]
    found = mm.audit(edits, mm.load_model("almanac"))
    assert (found.already_answered, found.known) == (1, 0.5)
    assert mm.audit(edits).already_answered is None


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("method", [None, "ft"])
def test_the_models_editor_is_attached_again_afterwards(monkeypatch, method, broken):
    model, edits = mm.load_model("almanac"), [EditRequest(prompt="What is the capital of Peru?", target="Oslo")]
    editor = mm.make_editor(method, model) if method else None
    if broken:
        monkeypatch.setattr("memoir.audits.Evaluation", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError) if broken else contextlib.nullcontext():
        mm.audit(edits, model)
    assert model.editor is editor
    assert editor is None or editor.edit(edits, check=False)  # which a detached editor refuses


def test_zsre_contradicts_itself():
    path = SHARED / "zsre" / "zsre_mend_edit.json"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    found = mm.audit(mm.load_edits("zsre", path=path))
    assert (found.edits, found.subjects, found.repeated_subjects, found.on_repeated_subjects) == (1000, 711, 167, 456)
    assert found.contradicting_subjects == pytest.approx(140, abs=1)  # one pair differs in white space only
    assert found.ceiling[0] < found.ceiling[1] < 1
