"""What the panel does, without widgets: each action, and random sequences of them, held to what is so."""

import random

import pytest
import torch
from families import small_model

from memoir.editors import EditCancelled, EditError
from memoir.editors import configured as settings_for
from memoir.editors.storage import MemoryFileError
from memoir.models import LanguageModel
from memoir.panel.asking import TOP
from memoir.panel.inputs import edits_of, request_of
from memoir.panel.outcomes import Edited, Pending
from memoir.panel.parts import page
from memoir.panel.session import Session, WouldOverwrite, configured
from memoir.records import EditRequest, Probe

# On a random model all prompts look alike: only the very same one is to match.
SETTINGS = dict(layer=1, k=16, feature="last", tau=1.0, prefixes=1, prefix_tokens=3, iterations=5, same_question=1.0)
PROMPTS = ("The first word is", "Number two is called", "A third thing is")
RLS = {name: value for name, value in SETTINGS.items() if name != "iterations"}
ROME = dict(layer=1, prefixes=0, moments="sampled", moment_samples=20)
TEXTS = ("Rain falls on the hills.", "A clock has two hands.", "Who sells bread here?", "Ships need harbours.")


def open_session(loaded: int = 0, method: str = "memoir", model=None, **overrides) -> Session:
    session = Session()
    settings = {**SETTINGS, **overrides} if method == "memoir" else overrides
    session.open(model or small_model("llama"), method, loaded, background=TEXTS, **settings)
    return session


def shown(model: LanguageModel, prompt: str) -> str:
    """What the panel shows of a model's answer, made from the whole one."""
    answer = model.generate(prompt, max_new_tokens=32 if model.chat else 14)
    return answer if model.chat else answer.partition("\n")[0].rstrip()


def logits(session: Session) -> torch.Tensor:
    with torch.no_grad():
        return session.model.forward(session.model.encode(PROMPTS))


# Opening, asking, saving ----------------------------------------------------------------------------------------------


def test_a_reply_shows_the_model_without_and_with_its_edits():
    session = open_session()
    request = request_of(PROMPTS[0], "zebra")
    session.edit(request)
    reply = session.ask(PROMPTS[0])
    assert reply.after.text == shown(session.model, PROMPTS[0])
    assert (reply.edit, reply.why.fired, reply.why.score) == (request, True, 1.0)
    session.editor.detach()
    assert reply.before.text == shown(session.model, PROMPTS[0])


def test_an_answer_is_its_first_line_unless_a_target_has_several():
    session = open_session(iterations=60, learning_rate=5.0)
    assert session.edit(request_of(PROMPTS[0], "a\nb")).learned
    assert session.ask(PROMPTS[0]).after.text == "a\nb"
    after = session.ask(PROMPTS[0] + " ").after  # the same tokens, but no edit's own prompt
    assert (after.text, after.whole, after.cut) == ("a", "a\nb", True)


def test_the_next_tokens_are_those_of_a_plain_softmax():
    session = open_session(model=small_model("gpt2"))
    session.edit(request_of(PROMPTS[0], "zebra"))
    reply, model = session.ask(PROMPTS[0]), session.model
    prompt = model.encode([PROMPTS[0]])
    after = model.forward(prompt)[0, -1]
    session.editor.detach()
    for answer, logits in ((reply.before, model.forward(prompt)[0, -1]), (reply.after, after)):
        shares = logits.detach().double().softmax(-1)
        order = shares.argsort(descending=True)[:5].tolist()
        assert [token for token, _ in answer.tokens] == [model.tokenizer.decode([i]) for i in order]
        assert [share for _, share in answer.tokens] == pytest.approx(shares[order].tolist(), rel=1e-4)
    assert reply.before.tokens != reply.after.tokens


def test_an_editor_that_cannot_get_ready_leaves_the_current_one():
    session = open_session()
    session.edit(request_of(PROMPTS[0], "zebra"))
    editor, before = session.editor, logits(session)
    with pytest.raises(ValueError, match="exceed the context"):
        session.open(session.model, "memoir", background=["word " * 100], **{**SETTINGS, "tau": "auto"})
    assert session.editor is editor and session.model.editor is editor
    assert torch.equal(logits(session), before)


def test_opening_with_edits_makes_the_almanacs_first_ones_and_says_how_far_it_is():
    seen = []
    session = Session(progress=seen.append)
    made = session.open(small_model("llama"), "memoir", 3, **SETTINGS)
    assert (made, len(session.editor.edits), session.unsaved) == (3, 3, 0)
    assert [(at.unit, at.done, at.total) for at in seen] == [("edits", 0, 3), ("edits", 1, 3), ("edits", 2, 3)]


def test_a_cancelled_batch_keeps_the_edits_before_the_interrupted_one():
    whole = open_session(2)
    asked = []

    def third_edit() -> bool:
        return len(asked) >= 2 and len(session.editor.edits) == 2

    session = Session(asked.append, third_edit)
    made = session.open(small_model("llama"), "memoir", 5, **SETTINGS)
    assert made == len(session.editor.edits) == 2
    assert torch.equal(logits(session), logits(whole))


def test_a_cancelled_edit_leaves_the_memory_as_it_was():
    calls = iter(range(100))
    session = Session(cancelled=lambda: session.unsaved == 1 and next(calls) >= 3)
    session.open(small_model("llama"), "memoir", 1, **SETTINGS)
    session.edit(request_of(PROMPTS[1], "apple"))
    before = logits(session)
    with pytest.raises(EditCancelled):
        session.edit(request_of(PROMPTS[0], "zebra"))
    assert next(calls) > 3
    assert torch.equal(logits(session), before)
    assert (len(session.editor.edits), session.unsaved) == (2, 1)


def test_saved_edits_come_back_and_damaged_ones_leave_the_editor_at_hand_at_work(tmp_path):
    session = open_session(2)
    session.edit(request_of(PROMPTS[0], "zebra"))
    before = logits(session)
    assert session.save(f" {tmp_path / 'memory'} ") == tmp_path / "memory"
    assert session.unsaved == 0
    session.forget(request_of(PROMPTS[0], "zebra"))
    assert session.unsaved == 1 and not torch.equal(logits(session), before)
    session.load(str(tmp_path / "memory"))
    assert torch.equal(logits(session), before) and len(session.editor.edits) == 3
    (tmp_path / "memory" / "memory.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="damaged"):
        session.load(str(tmp_path / "memory"))
    assert torch.equal(logits(session), before)


def test_a_memory_never_replaces_a_folder_of_other_files(tmp_path):
    session = open_session()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="contains files that do not belong"):
        session.save(str(tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_search_finds_all_words_in_prompt_or_answer_newest_first():
    session = open_session()
    requests = [request_of(prompt, target) for prompt, target in zip(PROMPTS, ("zebra", "apple", "Zebra"), strict=True)]
    for request in requests:
        session.edit(request)
    assert session.search("") == requests[::-1]
    assert session.search("ZEBRA is") == [requests[2], requests[0]]
    assert session.search("zebra two") == []


def test_nothing_can_be_asked_before_a_model_is_open():
    with pytest.raises(EditError, match="no model is open"):
        Session().ask(PROMPTS[0])


@pytest.mark.parametrize(
    ("model", "method", "settings", "message"),
    [
        ("", "memoir", {}, "model is empty"),
        ("./nowhere", "memoir", {}, "no model in nowhere"),
        (None, "nonsense", {}, "method 'nonsense' is unknown"),
        (None, "memoir", {"layer": 9}, "layer 9 does not exist"),
        (None, "memoir", {"layers": 9}, "memoir has no setting layers"),
    ],
)
def test_what_cannot_be_opened_leaves_the_editor_at_hand_at_work(model, method, settings, message):
    session = open_session(2)
    editor, before = session.editor, logits(session)
    with pytest.raises((ValueError, TypeError, FileNotFoundError, IndexError), match=message):
        session.open(session.model if model is None else model, method, **{**SETTINGS, **settings})
    assert session.editor is editor
    assert torch.equal(logits(session), before)


def test_a_reply_lasts_as_long_as_the_edits_that_gave_it(tmp_path):
    session = open_session()
    request = request_of(PROMPTS[0], "zebra")
    session.edit(request)
    assert session.reply is not None
    session.save(str(tmp_path / "memory"))
    assert session.reply is not None
    session.load(str(tmp_path / "memory"))
    assert session.reply is None
    assert session.ask(PROMPTS[0]) is session.reply
    session.forget(request)
    assert session.reply is None
    session.ask(PROMPTS[0])
    session.open(session.model, "memoir", **SETTINGS)
    assert session.reply is None


# Verdict and checks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "target", "learned"),
    [
        ("Canberra", "Canberra", True),
        ("canberra.", "Canberra", True),
        ("Canberra", "CANBERRA!", True),
        ("Canberra Au", "Canberra", False),
        ("", "Canberra", False),
        ("St. Gallen", "St Gallen", False),
    ],
)
def test_an_edit_is_learned_if_the_answer_is_its_target(monkeypatch, answer, target, learned):
    session = open_session()
    monkeypatch.setattr(session.model, "generate", lambda prompt, **_: answer)
    edited = session.edit(request_of(PROMPTS[0], target))
    assert (edited.checks[0].answer, edited.learned) == (answer, learned)
    assert session.status == {edited.requests[0].id: learned}


def test_three_questions_are_asked_after_an_edit():
    session = open_session(tau=0.0)  # every prompt reads the nearest edit
    request = request_of(PROMPTS[0], "zebra", rephrase=PROMPTS[1])
    checks = session.edit(request, unrelated=PROMPTS[2]).checks
    assert [(c.kind, c.prompt) for c in checks] == list(zip(("prompt", "rephrase", "unrelated"), PROMPTS, strict=True))
    assert [c.answer for c in checks] == [shown(session.model, prompt) for prompt in PROMPTS]
    with session.editor.detached() as model:
        unedited = shown(model, PROMPTS[2])
    assert checks[2].passed == (checks[2].answer == unedited)
    assert session.reply.prompt == PROMPTS[0]


def test_an_edits_own_unrelated_probe_is_asked_and_else_a_stock_question():
    session = open_session()
    probe = Probe(kind="unrelated", prompt=PROMPTS[2], answer="anything")
    assert session.edit(EditRequest(prompt=PROMPTS[0], target="a", probes=(probe,))).checks[-1].prompt == PROMPTS[2]
    assert session.edit(request_of(PROMPTS[1], "b")).checks[-1].prompt == "The chemical symbol of gold is"


def test_an_unrelated_answer_that_changed_is_said():
    session = open_session(tau=0.0, learning_rate=50.0, iterations=20)
    session.edit(request_of(PROMPTS[0], "zebra"), unrelated=PROMPTS[2])
    with session.editor.detached() as model:
        unedited = shown(model, PROMPTS[2])
    check = session.edited.checks[-1]
    assert check.answer != unedited and not check.passed


def test_asking_an_edits_prompt_again_renews_its_status(monkeypatch):
    session = open_session()
    (request,) = session.edit(request_of(PROMPTS[0], "zebra")).requests
    for answer in ("zebra", "horse"):
        monkeypatch.setattr(session.model, "generate", lambda prompt, answer=answer, **_: answer)
        session.ask(PROMPTS[0])
        assert session.status[request.id] == (answer == "zebra")


def test_a_long_target_gets_an_answer_long_enough_to_be_compared():
    session, lengths = open_session(), []
    plain = session.model.generate
    session.model.generate = lambda prompt, max_new_tokens, **_: lengths.append(max_new_tokens) or plain(prompt)
    session.edit(request_of(PROMPTS[0], "x" * 50))  # 50 tokens: the tokenizer's are bytes
    assert lengths[0] > 50


# Retry, Undo, Forget -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["memoir", "memoir-rls", "ft", "grace", "rome"])
def test_undo_brings_back_what_every_prompt_was_answered(method):
    settings = {
        "memoir-rls": RLS,
        "ft": dict(layer=1, iterations=3),
        "grace": dict(layer=1, iterations=3),
        "rome": dict(value_steps=3, **ROME),
    }.get(method, {})
    session = open_session(method=method, **settings)
    session.edit(request_of(PROMPTS[0], "zebra", subject="first"))
    before = logits(session)
    said = dict(session.status)
    session.edit(request_of(PROMPTS[1], "apple", subject="two"))
    assert not torch.equal(logits(session), before)
    assert "Number two" in session.undoable
    session.undo()
    torch.testing.assert_close(logits(session), before, rtol=0, atol=1e-5 if method == "memoir-rls" else 0)
    assert (session.status, session.unsaved, session.undoable) == (said, 1, "")
    assert len(session.editor.edits) == 1 and session.reply is session.edited is None
    with pytest.raises(EditError, match="nothing to undo"):
        session.undo()


def test_undo_brings_back_what_was_replaced_and_what_was_forgotten():
    session = open_session()
    (first,) = session.edit(request_of(PROMPTS[0], "zebra")).requests
    before = logits(session)
    assert session.edit(request_of(PROMPTS[0], "apple"), conflict="replace").replaced == (first,)
    session.undo()
    assert torch.equal(logits(session), before) and session.search("") == [first]
    session.forget(first)
    assert session.search("") == [] and session.unsaved == 2
    session.undo()
    assert torch.equal(logits(session), before) and session.search("") == [first] and session.unsaved == 1


def test_retry_tries_harder_and_keeps_one_edit():
    session = open_session(iterations=1, learning_rate=0.01)
    first = session.edit(request_of(PROMPTS[0], "zebra"))
    again = session.retry()
    assert (again.again, again.reports[0].iterations) == (1, 2 * first.reports[0].iterations)
    assert session.search("") == list(first.requests) and session.unsaved == 1
    assert again.checks[1] == first.checks[1]
    assert session.retry().reports[0].iterations == 4 * first.reports[0].iterations
    assert session.editor.config.iterations == 1
    session.undo()
    assert session.search("") == [] and session.unsaved == 0


@pytest.mark.parametrize("method", ["memoir", "memoir-rls", "ft", "grace", "rome", "wise"])
def test_every_method_learns_more_by_another_try(method):
    tried = {
        "ft": {"learning_rate": 1e-4},
        "rome": dict(value_steps=1, **ROME),
        "memoir-rls": RLS | {"value_steps": 1, "value_rate": 0.01},
    }
    settings = {"iterations": 1} if method in ("memoir", "grace", "wise", "ft") else {}
    session = open_session(method=method, **{"layer": 1, **settings, **tried.get(method, {})})
    edited = session.edit(request_of(PROMPTS[0], "zebra", subject="first"))
    assert edited.failed == edited.requests
    losses = [edited.reports[0].loss_after, *(session.retry().reports[0].loss_after for _ in range(3))]
    assert losses[-1] < losses[0] and session.search("") == list(edited.requests)


def test_another_try_means_twice_the_steps_and_a_tenth_of_the_loss():
    editor = open_session().editor
    config = editor.config
    with configured(editor, again=2):
        assert (editor.config.iterations, editor.config.stop_loss) == (20, pytest.approx(config.stop_loss / 100))
    assert editor.config is config


def learning(monkeypatch, session: Session, *prompts: str) -> None:
    """Let the model answer "zebra" to these prompts, and "horse" to all others."""

    def generate(asked, **_):
        said = ["zebra" if prompt in prompts else "horse" for prompt in ([asked] if isinstance(asked, str) else asked)]
        return said[0] if isinstance(asked, str) else said

    monkeypatch.setattr(session.model, "generate", generate)


def test_what_a_list_did_not_learn_is_tried_again_and_the_rest_is_left_alone(monkeypatch):
    session = open_session()
    before, table = logits(session), [request_of(prompt, "zebra") for prompt in PROMPTS]
    learning(monkeypatch, session, PROMPTS[1])
    first = session.edit(*table)
    assert first.failed == (table[0], table[2]) and not first.learned
    kept = session.editor.factors[table[1].id]
    learning(monkeypatch, session, *PROMPTS[1:])
    again = session.retry()
    assert [report.edit_id for report in again.reports] == [table[0].id, table[2].id]
    assert (again.made, again.failed, again.again) == (3, (table[0],), 1)
    assert session.editor.factors[table[1].id] is kept and len(session.editor.edits) == 3
    assert session.status == {request.id: request is not table[0] for request in table}
    learning(monkeypatch, session, *PROMPTS)
    assert session.retry().learned
    with pytest.raises(EditError, match="no edit to try again"):
        session.retry()
    session.undo()
    assert torch.equal(logits(session), before) and session.search("") == [] and session.unsaved == 0


def test_a_cancelled_retry_of_a_list_keeps_what_was_tried_and_leaves_the_rest(monkeypatch):
    done, cancel = [], []
    session = Session(lambda at: done.append(at.done), lambda: bool(cancel) and done[-1] == 1)
    session.open(small_model("llama"), "memoir", background=TEXTS, **SETTINGS)
    learning(monkeypatch, session)
    table = [request_of(prompt, "zebra") for prompt in PROMPTS[:2]]
    session.edit(*table)
    kept = session.editor.factors[table[1].id]
    learning(monkeypatch, session, PROMPTS[0])
    cancel.append(True)
    again = session.retry()
    assert [report.edit_id for report in again.reports] == [table[0].id]
    assert again.failed == (table[1],) and session.editor.factors[table[1].id] is kept


def test_a_cancelled_retry_leaves_the_edit_as_it_was():
    stop = []
    session = Session(cancelled=lambda: bool(stop))
    session.open(small_model("llama"), "memoir", background=TEXTS, **SETTINGS)
    edited, before = session.edit(request_of(PROMPTS[0], "zebra and more")), logits(session)
    assert not edited.learned
    stop.append(True)
    with pytest.raises(EditCancelled):
        session.retry()
    assert torch.equal(logits(session), before)
    assert session.edited is edited and session.unsaved == 1 and session.undoable
    session.undo()
    assert session.search("") == []


# Conflicts -----------------------------------------------------------------------------------------------------------


def test_a_conflict_is_named_before_anything_is_replaced():
    session = open_session()
    (first,) = session.edit(request_of(PROMPTS[0], "zebra")).requests
    before = logits(session)
    pending = session.edit(request_of(PROMPTS[0].upper() + " ", "apple", rephrase=PROMPTS[1]))
    assert isinstance(pending, Pending) and pending is session.pending
    assert [(c.new.target, c.old) for c in pending.clashes] == [("apple", first)]
    assert torch.equal(logits(session), before) and session.search("") == [first] and session.unsaved == 1
    edited = session.decide("keep-both")
    assert edited.replaced == () and len(session.editor.edits) == 2 and session.pending is None
    session.undo()
    session.edit(request_of(PROMPTS[0], "apple"))
    assert session.decide("replace").replaced == (first,)
    assert [e.target for e in session.search("")] == ["apple"]
    assert session.editor.config.on_conflict == "replace"


def test_the_overlap_of_a_conflict_is_that_of_the_masks():
    session = open_session()
    session.edit(request_of(PROMPTS[0], "zebra"))
    (clash,) = session.edit(request_of(PROMPTS[0], "apple")).clashes
    assert clash.overlap == session.editor.explain(PROMPTS[0]).score == 1.0


def test_a_list_names_its_conflicts_with_stored_edits_and_within_itself():
    session = open_session()
    session.edit(request_of(PROMPTS[0], "zebra"))
    table = [request_of(PROMPTS[1], "a"), request_of(PROMPTS[0], "b"), request_of(PROMPTS[1], "c")]
    pending = session.edit(*table)
    assert [(c.new.target, c.old.target) for c in pending.clashes] == [("b", "zebra"), ("c", "a")]
    assert len(session.editor.edits) == 1
    batch = session.decide("replace")
    assert batch.made == 3 and [edit.target for edit in batch.replaced] == ["zebra"]
    assert sorted(e.target for e in session.search("")) == ["b", "c"]


def test_a_method_that_keeps_both_by_its_settings_is_not_asked_about():
    session = open_session(on_conflict="keep-both")
    session.edit(request_of(PROMPTS[0], "zebra"))
    assert isinstance(session.edit(request_of(PROMPTS[0], "apple")), Edited)
    assert len(session.editor.edits) == 2


# Lists of edits ------------------------------------------------------------------------------------------------------


def test_a_list_is_made_asked_and_undone_as_one():
    seen = []
    session = Session(progress=seen.append)
    session.open(small_model("llama"), "memoir", background=TEXTS, **SETTINGS)
    before = logits(session)
    table = [request_of(prompt, target) for prompt, target in zip(PROMPTS, "abc", strict=True)]
    batch = session.edit(*table)
    assert (batch.made, batch.checks) == (3, ())
    learned = session.editor.learned(table)
    assert [r for r, known in zip(table, learned, strict=True) if not known] == list(batch.failed)
    assert session.status == {r.id: known for r, known in zip(table, learned, strict=True)}
    assert [(at.done, at.total) for at in seen if at.unit == "edits"] == [(0, 3), (1, 3), (2, 3)]
    assert session.unsaved == 3 and "3 edits" in session.undoable
    session.undo()
    assert torch.equal(logits(session), before) and session.unsaved == 0


def test_a_cancelled_list_keeps_the_edits_made_so_far():
    session = Session(cancelled=lambda: len(session.editor.edits) == 2)
    session.open(small_model("llama"), "memoir", background=TEXTS, **SETTINGS)
    table = [request_of(prompt, "a") for prompt in PROMPTS]
    batch = session.edit(*table)
    assert (batch.made, batch.requests, session.unsaved) == (2, tuple(table), 2)
    assert session.search("") == table[1::-1]


def test_a_list_that_is_cancelled_at_once_leaves_everything():
    session = Session(cancelled=lambda: True)
    session.open(small_model("llama"), "memoir", background=TEXTS, **SETTINGS)
    with pytest.raises(EditCancelled):
        session.edit(*(request_of(prompt, "a") for prompt in PROMPTS))
    assert session.search("") == [] and not session.undoable and session.edited is None


TABLES = {
    "headed": 'prompt,target,rephrase\nWho?,me,Which one?\n"Where, then?",here,\n',
    "another order": 'target,prompt,rephrase\nme,Who?,Which one?\nhere,"Where, then?",\n',
    "pasted from a spreadsheet": "prompt\ttarget\trephrase\nWho?\tme\tWhich one?\nWhere, then?\there\t\n",
    "semicolons": "prompt;target;rephrase\nWho?;me;Which one?\nWhere, then?;here;\n",
    "no heading": 'Who?,me,,Which one?\n\n"Where, then?",here\n',
    "JSON lines": '{"prompt": "Who?", "target": "me", "rephrase": "Which one?"}\n'
    '{"prompt": "Where, then?", "target": "here", "rephrase": null}\n',
    "a JSON list": '[{"prompt": "Who?", "target": "me", "rephrase": "Which one?"},'
    '{"prompt": "Where, then?", "target": "here"}]',
    "a byte order mark": '\ufeffprompt,target,rephrase\r\nWho?,me,Which one?\r\n"Where, then?",here,\r\n',
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_tables_become_edits_in_their_order(text):
    assert edits_of(text) == [request_of("Who?", "me", "Which one?"), request_of("Where, then?", "here")]


def test_a_tab_separates_cells_however_many_commas_they_hold():
    assert edits_of("Who, in 1990, was here?\tme") == [request_of("Who, in 1990, was here?", "me")]


def test_a_column_beside_the_one_it_resembles_is_no_misspelling():
    table = "prompt,target,rephrase,rephrase_2\nWho?,me,,Which one?\n"
    assert edits_of(table) == [request_of("Who?", "me")]


def test_a_table_may_bring_subjects_and_unrelated_questions():
    (edit,) = edits_of("prompt,target,subject,unrelated,unrelated_answer\nWho?,me,Who,Why?,because")
    assert edit.subject == "Who" and edit.probe("unrelated") == Probe(kind="unrelated", prompt="Why?", answer="because")


def test_a_public_format_is_read_like_anywhere(zsre_file):
    edits = edits_of(zsre_file.read_text(), "zsre.json")
    assert len(edits) == 12
    assert [edit.probe("unrelated").prompt for edit in edits] == [f"nq question: where is hill {i}?" for i in range(12)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  \n", "is empty"),
        (", ,\n", "holds no edits"),
        ("[]", "holds no edits"),
        ("prompt,target\n", "holds no edits"),
        (
            "prompt,target\nWho?,me\nWhere?,\n,here",
            "line 3: key 'target' is missing.*\nline 4: key 'prompt' is",
        ),
        ("prompt,target,subjects\nWho?,me,red", "line 2: key 'subjects' is unknown, expected 'subject'"),
        ("prompt,target\nWhere, then?,here", "line 2: has more cells than the table has columns"),
        ('{"prompt": "Who?", "target": 3.5}', "line 1: key 'target' holds 3.5, expected text"),
        ('{"prompt": "Who?"}', "line 1: key 'target' is missing; table records carry prompt, target"),
        ('[{"prompt": "Who?",\n"target": "me"},\n{"prompt": "Where?"}]', "record 2: key 'target' is missing"),
        ("prompt,target,target\nWho?,me,you", "two columns named 'target'"),
        ('{"prompt": ', "neither JSON lines nor a JSON list"),
        ("[1]", "record 1: 1 is not a record"),
        ("prompt,target,unrelated\nWho?,me,Why?", "line 2: key 'unrelated_answer' is missing"),
    ],
)
def test_a_table_that_cannot_be_read_says_which_line(text, message):
    with pytest.raises(ValueError, match=message):
        edits_of(text)


def test_a_form_becomes_an_edit_or_names_what_is_empty():
    request = request_of(" Who? ", " me ", " Which one? ", " Who ")
    assert (request.prompt, request.target, request.subject) == ("Who?", "me", "Who")
    assert [(p.kind, p.prompt, p.answer) for p in request.probes] == [("rephrase", "Which one?", "me")]
    for texts, name in (((" ", "me"), "prompt"), (("Who?", ""), "new answer")):
        with pytest.raises(ValueError, match=f"{name} is empty"):
            request_of(*texts)


# τ -------------------------------------------------------------------------------------------------------------------


def test_dots_are_the_overlaps_that_explain_gives_and_fire_from_tau_on():
    session = open_session()
    session.edit(request_of(PROMPTS[0], "zebra"))
    for prompt in PROMPTS[1:]:
        session.ask(prompt)
    writes, before = session.unsaved, session.editor.memory.weight.clone()
    for tau in (0.0, 0.3, 0.5, 0.9, 1.0):
        session.set_tau(tau)
        dots = session.dots()
        assert set(PROMPTS[1:]) <= set(dots) and PROMPTS[0] not in dots
        for prompt, overlap in dots.items():
            why = session.editor.explain(prompt)
            assert (overlap, overlap >= tau, tau) == (why.score, why.fired, why.threshold)
    assert session.unsaved == writes and torch.equal(session.editor.memory.weight, before)


def test_dots_are_measured_against_the_edits_that_are_there():
    session = open_session()
    session.ask(PROMPTS[1])
    assert session.dots() == {}
    (near,) = session.edit(request_of(PROMPTS[1] + "?", "zebra")).requests
    session.edit(request_of(PROMPTS[2], "apple"))
    for _ in range(2):
        assert session.dots()[PROMPTS[1]] == session.editor.explain(PROMPTS[1]).score
        if near.id in session.editor.edits:
            session.forget(near)


def test_a_tau_that_decides_the_reply_otherwise_takes_it_away():
    session = open_session()
    session.edit(request_of(PROMPTS[0], "zebra"))
    score = session.ask(PROMPTS[1]).why.score
    assert score < 1
    session.set_tau((score + 1) / 2)
    assert session.reply.why.threshold == (score + 1) / 2
    session.set_tau(score)
    assert session.reply is None
    assert session.ask(PROMPTS[1]).why.fired


def test_tau_is_kept_by_saving(tmp_path):
    session = open_session()
    session.edit(request_of(PROMPTS[0], "zebra"))
    session.set_tau(0.73)
    session.save(str(tmp_path / "memory"))
    session.set_tau(0.2)
    session.load(str(tmp_path / "memory"))
    assert session.threshold.tau == session.editor.memory.tau == 0.73


def test_calibration_writes_nothing_and_is_named():
    session = open_session(tau="auto")
    assert session.threshold.origin == "calibrated"
    session.set_tau(0.25)
    session.set_tau("auto")
    assert session.threshold.origin == "calibrated" and not session.editor.memory.weight.any()
    session.set_tau(0.5)
    assert session.threshold.origin == "hand"
    session.edit(request_of(PROMPTS[0], "zebra"))
    assert session.threshold.tau == 0.5
    session.undo()
    assert session.threshold.tau == 0.5


def test_edits_that_wait_for_a_decision_wait_on_while_tau_moves():
    session = open_session()
    session.edit(request_of(PROMPTS[0], "zebra"))
    pending = session.edit(request_of(PROMPTS[0], "apple"))
    session.set_tau(0.5)
    assert session.pending is pending
    assert [edit.target for edit in session.decide("replace").replaced] == ["zebra"]


def test_undo_keeps_a_tau_that_was_moved_since():
    session = open_session()
    session.edit(request_of(PROMPTS[0], "zebra"))
    session.set_tau(0.25)
    session.undo()
    assert session.threshold.tau == session.editor.memory.tau == 0.25


def test_a_tau_that_was_measured_stays_measured_when_edits_are_taken_back_or_made_again():
    session = open_session(model=chatty())
    session.edit(request_of(PROMPTS[0], "zebra"))
    session.set_tau("auto")
    session.undo()
    assert session.threshold.origin == "calibrated" and session.search("") == []
    session.set_chat(True)
    assert session.threshold.origin == "calibrated"


def test_the_almanacs_tau_is_its_presets():
    session = Session()
    session.open("almanac", "memoir")
    assert (session.threshold.tau, session.threshold.origin) == (0.6, "preset")


def test_a_method_without_tau_has_none_to_set():
    session = open_session(method="ft", layer=1, iterations=2)
    assert session.threshold is None and session.dots() == {}
    with pytest.raises(EditError, match="FT has no τ"):
        session.set_tau(0.5)


# Progress ------------------------------------------------------------------------------------------------------------


def test_an_edit_tells_its_steps_with_their_loss():
    seen = []
    session = Session(progress=seen.append)
    session.open(small_model("llama"), "memoir", background=TEXTS, **SETTINGS)
    (report,) = session.edit(request_of(PROMPTS[0], "zebra")).reports
    seen = [at for at in seen if at.unit == "steps"]
    assert [at.done for at in seen] == [1, 2, 3, 4, 5, 5][: len(seen)] and {at.total for at in seen} == {5}
    assert (seen[0].loss, seen[-1].loss) == (report.loss_before, report.loss_after)
    assert all(at.left >= 0 for at in seen)


def test_the_outcome_of_an_edit_is_shown_before_its_other_checks():
    seen = []
    session = Session(progress=lambda at: at.unit == "checks" and seen.append((at, session.edited, session.reply)))
    session.open(small_model("llama"), "memoir", background=TEXTS, **SETTINGS)
    edited = session.edit(request_of(PROMPTS[0], "zebra", rephrase=PROMPTS[1]))
    assert [(at.done, at.total) for at, *_ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert [shown.checks for _, shown, _ in seen] == [edited.checks[:1], edited.checks[:2], edited.checks]
    assert {shown.learned for _, shown, _ in seen} == {edited.learned}
    assert session.edited == edited and session.reply.prompt == PROMPTS[0]
    assert {reply for *_, reply in seen} == {None}  # what the model answers by itself is asked last


def test_the_reply_grows_with_the_answer_and_the_one_without_edits_comes_last():
    seen = []
    session = Session(progress=lambda at: at.unit == "answers" and seen.append((at.done, session.reply)))
    session.open(small_model("llama"), "memoir", background=TEXTS, **SETTINGS)
    session.edit(request_of(PROMPTS[0], "zebra"))
    ((done, first),) = seen
    assert done == 1 and first.before is None
    assert (first.after, first.why) == (session.reply.after, session.reply.why)
    assert "zebra" in page.reply(first, TOP) and ">changed<" not in page.reply(first, TOP)
    assert ">changed<" in page.reply(session.reply, TOP)
    for prompt in PROMPTS[:2]:  # the second one reads nothing
        seen.clear()
        reply = session.ask(prompt)
        assert [done for done, _ in seen] == [0] * (len(seen) - 1) + [1] and len(seen) > 1
        assert all(part.before is None and part.prompt == prompt and part.why == reply.why for _, part in seen)
        texts = [part.after.text for _, part in seen]
        assert texts[-1] == reply.after.text and (len(set(texts)) > 1 or "zebra" not in texts[-1])
        assert all(texts[-1].startswith(text) for text in texts)
        assert {part.after.tokens for _, part in seen} == {reply.after.tokens}


def test_nothing_stays_of_an_answer_that_breaks_off(monkeypatch):
    session, begun = Session(progress=lambda at: begun.append(session.reply)), []
    session.open(small_model("llama"), "memoir", background=TEXTS, **SETTINGS)
    session.edit(request_of(PROMPTS[0], "zebra"))
    begun.clear()

    def break_off(at) -> None:
        begun.append(session.reply)
        raise MemoryError("out of memory")

    monkeypatch.setattr(session, "_progress", break_off)
    with pytest.raises(MemoryError):
        session.ask(PROMPTS[0])
    assert begun[0].prompt == PROMPTS[0] and session.reply is None
    monkeypatch.undo()
    assert session.ask(PROMPTS[0]).before is not None


# Chat ----------------------------------------------------------------------------------------------------------------


def chatty():
    model = small_model("llama")
    model.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return model


def test_chat_makes_the_edits_again_under_the_template():
    session = open_session(model=chatty())
    (request,) = session.edit(request_of(PROMPTS[0], "zebra")).requests
    session.set_chat(True)
    assert session.model.chat and session.editor.model is session.model and session.reply is None
    assert session.search("") == [request] and session.unsaved == 1
    assert session.ask(PROMPTS[0]).why.score == 1.0
    session.set_chat(False)
    assert session.ask(PROMPTS[0]).why.score == 1.0 and not session.model.chat


def test_a_cancelled_change_of_chat_leaves_everything():
    stop = []
    session = Session(cancelled=lambda: bool(stop))
    session.open(chatty(), "memoir", background=TEXTS, **SETTINGS)
    session.edit(request_of(PROMPTS[0], "zebra"))
    before, model = logits(session), session.model
    stop.append(True)
    with pytest.raises(EditCancelled):
        session.set_chat(True)
    assert session.model is model and torch.equal(logits(session), before) and session.unsaved == 1


# Files ---------------------------------------------------------------------------------------------------------------


def test_saving_over_other_edits_is_refused_once(tmp_path):
    folder = str(tmp_path / "memory")
    session = open_session(1)
    session.save(folder)
    session.edit(request_of(PROMPTS[0], "zebra"))
    session.save(folder)  # its own
    other = open_session(2)
    with pytest.raises(WouldOverwrite, match="holds other saved edits"):
        other.save(folder)
    session.load(folder)
    assert len(session.editor.edits) == 2
    other.save(folder, overwrite=True)
    session.load(folder)
    assert len(session.editor.edits) == 2 and session.unsaved == 0


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_folder_without_edits_is_said_to_be_one(tmp_path, kind):
    path = tmp_path / "nothing"
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("")
    with pytest.raises(FileNotFoundError, match=r"no saved edits in .*nothing, expected a folder"):
        open_session().load(str(path))


# Everything ----------------------------------------------------------------------------------------------------------


class Walk:
    """Random actions on a session, beside a plain account of what must be so."""

    def __init__(self, seed: int, folder):
        self.random, self.folder = random.Random(seed), folder
        self.session = open_session(model=chatty(), iterations=2)
        self.edits: list[EditRequest] = []  # in the order of writing
        self.unsaved, self.method, self.chat = 0, "memoir", False
        self.tau: float | str | None = 1.0  # as it was set; None for a method without τ
        self.back: tuple | None = None  # edits, unsaved, logits and τ before the last change
        self.saved: tuple | None = None

    def request(self) -> EditRequest:
        return request_of(self.random.choice(PROMPTS), self.random.choice(["zebra", "apple", "x"]))

    def remember(self) -> None:
        self.back = list(self.edits), self.unsaved, logits(self.session), self.tau

    def write(self, requests: list[EditRequest], conflict: str | None) -> None:
        """What writing them should leave."""
        for request in requests:
            self.edits = [e for e in self.edits if e.id != request.id]
            if conflict == "replace" and self.method == "memoir":
                self.edits = [e for e in self.edits if e.question != request.question]
            self.edits.append(request)
            self.unsaved += 1

    def clash(self, requests: list[EditRequest]) -> bool:
        earlier = list(self.edits)
        for request in requests:
            if any(e.question == request.question and e.target != request.target for e in earlier):
                return self.method == "memoir"
            earlier.append(request)
        return False

    def edit(self) -> None:
        requests = [self.request() for _ in range(self.random.choice([1, 1, 3]))]
        conflict = self.random.choice([None, "replace", "keep-both"])
        clash = conflict is None and self.clash(requests)
        earlier, undoable = self.back, self.session.undoable
        self.remember()
        outcome = self.session.edit(*requests, conflict=conflict)
        assert isinstance(outcome, Pending) == clash
        if clash:
            assert outcome.clashes and self.session.undoable == undoable
            if self.random.random() < 0.3:
                self.session.pending = None
                self.back = earlier
                return
            conflict = self.random.choice(["replace", "keep-both"])
            outcome = self.session.decide(conflict)
        assert not isinstance(outcome, Pending)
        self.write(requests, conflict)

    def retry(self) -> None:
        if self.session.edited is not None and self.session.edited.failed:
            tried = self.session.edited.failed
            self.session.retry()
            self.edits = [edit for edit in self.edits if edit not in tried] + list(dict.fromkeys(tried))
            self.unsaved = max(self.unsaved, 1)

    def undo(self) -> None:
        if self.session.undoable:
            self.session.undo()
            (self.edits, self.unsaved, before, tau), self.back = self.back, None
            if tau == self.tau != "auto":
                assert torch.equal(logits(self.session), before)

    def forget(self) -> None:
        if self.edits and self.session.editor.can_forget:
            edit = self.random.choice(self.edits)
            self.remember()
            self.session.forget(edit)
            self.edits.remove(edit)
            self.unsaved += 1

    def ask(self) -> None:
        self.session.ask(self.random.choice([*PROMPTS, "Something else"]))

    def move(self) -> None:
        if self.tau is not None:
            self.tau = self.random.choice([0.0, 0.3, 0.6, 1.0])
            self.session.set_tau(self.tau)

    def calibrate(self) -> None:
        if self.tau is not None:
            self.tau = "auto"
            self.session.set_tau("auto")

    def turn_chat(self) -> None:
        self.chat = not self.chat
        self.session.set_chat(self.chat)
        self.unsaved, self.back = len(self.edits), None

    def turn_method(self) -> None:
        """As Apply does: the same model, as it is."""
        self.method = "ft" if self.method == "memoir" else "memoir"
        settings = dict(layer=1, iterations=2) if self.method == "ft" else {**SETTINGS, "iterations": 2}
        self.session.open(self.session.model, self.method, background=TEXTS, **settings)
        self.edits, self.unsaved, self.back = [], 0, None
        self.tau = 1.0 if self.method == "memoir" else None

    def save(self) -> None:
        self.session.save(str(self.folder), overwrite=True)
        self.saved, self.unsaved = (list(self.edits), self.tau, self.method, self.chat), 0
        if self.back:
            self.back = (self.back[0], 1, *self.back[2:])

    def load(self) -> None:
        if self.saved and self.saved[-1] != self.chat:
            with pytest.raises(MemoryFileError, match="chat="):
                self.session.load(str(self.folder))
        elif self.saved:
            self.session.load(str(self.folder))
            (edits, self.tau, self.method, _), self.unsaved, self.back = self.saved, 0, None
            self.edits = list(edits)

    def hold(self) -> None:
        """What the session shows is so."""
        session, editor = self.session, self.session.editor
        assert session.search("") == self.edits[::-1]
        assert session.unsaved == self.unsaved
        assert (editor.name, editor.model, session.model.chat) == (self.method, session.model, self.chat)
        assert session.model.editor is editor
        assert bool(session.undoable) == (self.back is not None)
        assert settings_for(self.method, session.model, session.overrides) == editor.config
        self.hold_tau()
        stored = {edit.id for edit in self.edits}
        assert set(session.status) <= stored
        if (reply := session.reply) is not None:
            assert reply.after.text == shown(editor.model, reply.prompt)
            assert [reply.why] == editor.lookup([reply.prompt])
            with editor.detached() as model:
                assert reply.before.text == shown(model, reply.prompt)
        if (edited := session.edited) is not None:
            for check in edited.checks:
                assert check.answer == shown(editor.model, check.prompt)
            there = [request for request in edited.requests[: edited.made] if request.id in stored]
            learned = dict(zip(there, editor.learned(there), strict=True))
            assert {request for request, known in learned.items() if not known} == set(edited.failed)
            assert {request.id: known for request, known in learned.items()}.items() <= session.status.items()
            assert not {edit.id for edit in edited.replaced} & stored
        if session.pending is not None:
            assert all(
                clash.old.id in stored or clash.old in session.pending.requests for clash in session.pending.clashes
            )

    def hold_tau(self) -> None:
        """τ, its origin, and the questions on its scale."""
        session, editor = self.session, self.session.editor
        if self.tau is None:
            assert session.threshold is None and session.dots() == {}
            return
        assert session.threshold.tau == editor.memory.tau and editor.config.tau == self.tau
        assert session.threshold.origin == ("calibrated" if self.tau == "auto" else "hand")
        if self.tau != "auto":
            assert session.threshold.tau == self.tau
        for prompt, overlap in session.dots().items():
            why = editor.explain(prompt)
            assert (overlap, overlap >= session.threshold.tau) == (why.score, why.fired)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_done_what_is_shown_is_so(seed, tmp_path):
    walk = Walk(seed, tmp_path / "memory")
    often = [walk.edit, walk.edit, walk.edit, walk.ask, walk.forget, walk.undo, walk.retry, walk.move]
    seldom = [walk.calibrate, walk.save, walk.load, walk.turn_chat, walk.turn_method]
    for _ in range(20):
        walk.random.choice([*often, *often, *seldom])()
        walk.hold()
