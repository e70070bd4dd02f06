"""The panel without a browser: what the page says, what the widgets do, and that the kernel stays free."""

import asyncio
import datetime
import threading
from html.parser import HTMLParser

import pytest
import torch
from families import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from memoir.panel import Panel
from memoir.panel.asking import TOP
from memoir.panel.outcomes import Answer, Check, Clash, Edited, Pending, Progress, Reply
from memoir.panel.parts import marked, page
from memoir.panel.session import Session
from memoir.panel.widgets import ROWS
from memoir.records import EditReport, EditRequest, Explanation

# On a random model all prompts look alike: only the very same one is to match.
SETTINGS = dict(layer=1, k=16, feature="last", tau=1.0, prefixes=1, prefix_tokens=3, iterations=5, same_question=1.0)
FRIDAY = datetime.datetime(2026, 11, 27, tzinfo=datetime.UTC)
PROMPTS = ("The first word is", "Number two is called", "A third thing is")


def open_session(**overrides) -> Session:
    session = Session()
    session.open(small_model("llama"), "memoir", **{**SETTINGS, **overrides})
    return session


# The page ------------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.tags, self.texts, self.attributes = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [value for _, value in attributes]

    def handle_data(self, data):
        self.texts.append(data)


hostile = st.text(st.sampled_from("<>&\"'/=ab ;#\n→") | st.characters(codec="utf-8"), min_size=1).filter(str.strip)


def reply_with(prompt: str, text: str, *, score: float = 0.9, measure: str = "overlap", fired: bool = True) -> Reply:
    answer = Answer(text=text, whole=text, tokens=((text, 0.5),))
    return Reply(
        prompt=prompt,
        before=answer,
        after=answer,
        why=Explanation(edit_id="x", score=score, threshold=0.4, fired=fired, contribution=0.3),
        edit=EditRequest(prompt=prompt, target=text),
        measure=measure,
        seconds=0.1,
    )


REPORT = EditReport(edit_id="x", loss_before=4.5, loss_after=0.01, iterations=1, seconds=0.25)


def edited_with(prompt: str, text: str, *, learned: bool = True, unrelated: bool = True) -> Edited:
    request = EditRequest(prompt=prompt, target=text)
    return Edited(
        requests=(request,),
        made=1,
        failed=() if learned else (request,),
        reports=(REPORT,),
        replaced=(request,) * 2,
        checks=(
            Check(kind="prompt", prompt=prompt, answer=text if learned else "", passed=learned),
            Check(kind="rephrase", prompt=prompt, answer=text, passed=False),
            Check(kind="unrelated", prompt=prompt, answer=text, passed=unrelated),
        ),
    )


def pending_with(prompt: str, text: str) -> Pending:
    request = EditRequest(prompt=prompt, target=text)
    return Pending(requests=(request,), unrelated="", clashes=(Clash(new=request, old=request, overlap=0.97),))


def list_with(prompt: str, text: str, *, failed: int = 1, made: int = 10, again: int = 0) -> Edited:
    request = EditRequest(prompt=prompt, target=text)
    fields = dict(requests=(request,) * 10, failed=(request,) * failed, replaced=(request,), reports=(REPORT,) * 8)
    return Edited(made=made, again=again, **fields)


@settings(deadline=None)
@given(prompt=hostile, text=hostile)
def test_untrusted_texts_add_no_markup(prompt, text):
    for show in (
        lambda p, t: page.reply(reply_with(p, t), TOP),
        lambda p, t: page.edit(EditRequest(prompt=p, target=t)),
        lambda p, t: page.edited(edited_with(p, t)),
        lambda p, t: page.forgotten(EditRequest(prompt=p, target=t)),
        lambda p, t: page.note(p + t),
        lambda p, t: page.error(p + t),
        lambda p, t: page.progress(p + t, Progress(unit="steps", done=1, total=2, loss=0.5, left=1.0)),
        lambda p, t: page.pending(pending_with(p, t)),
        lambda p, t: page.edited(list_with(p, t)),
        lambda p, t: page.undone(p + t),
        lambda p, t: page.scale(reply_with(p, t), 0.4, {p + t: 0.3}),
    ):
        harmless = "a" * max(1, len(prompt)), "b" * max(1, len(text))  # a long answer can be unfolded, whatever it says
        assert Reader(show(prompt, text)).tags == Reader(show(*harmless)).tags
    shown = Reader(page.edit(EditRequest(prompt=prompt, target=text)))
    assert prompt in "".join(shown.texts).replace("\r", "\n") or "\r" in prompt or "\x00" in prompt


def text_of(html: str) -> str:
    """The text of a page, white space as a browser shows it."""
    return " ".join("".join(Reader(html).texts).split())


def test_the_verdict_comes_first_then_the_checks_then_what_it_took():
    said = text_of(page.edited(edited_with("Who?", "me")))
    checks = "✓ This prompt: me⚠ Its rephrase: me✓ Unrelated: unchanged, “Who?” → me"
    took = "Edited in 0.25 s, 1 step, loss 4.50 → 0.010. It replaced “Who?” → “me”, “Who?” → “me”."
    assert said == f"✓ Learned: answers me {checks} {took}"
    failed = text_of(page.edited(edited_with("Who?", "me", learned=False, unrelated=False)))
    assert "⚠ Not learned: answers nothing" in failed and "⚠ Unrelated: changed, “Who?” → me" in failed


def test_a_conflict_names_both_edits_and_how_near_they_are():
    said = text_of(page.pending(pending_with("Who?", "me")))
    assert said == "“Who?” → me: looks like “Who?” → me (overlap 0.97).Nothing is written yet."


def test_a_list_names_the_edits_that_failed():
    said = text_of(page.edited(list_with("Who?", "me")))
    assert said == "⚠ Learned 9 of 10 ⚠ Who? → me Edited in 2.00 s. It replaced “Who?” → “me”."
    said = text_of(page.edited(list_with("Who?", "me", failed=7, again=1)))
    assert "⚠ Learned 3 of 10" in said and "and 2 more" in said and "tried 2 times" in said
    assert "✓ Learned 10 of 10" in text_of(page.edited(list_with("Who?", "me", failed=0)))
    said = text_of(page.edited(list_with("Who?", "me", failed=0, made=4)))
    assert "⚠ Learned 4 of 10 Cancelled after 4 of 10 edits; those are kept." in said


def test_progress_tells_steps_loss_and_time_left():
    at = Progress(unit="steps", done=3, total=15, loss=0.5, left=2.2)
    assert text_of(page.progress("Editing", at)) == "Editing: step 3 of at most 15 · loss 0.500 · at most 3 s left"
    at = Progress(unit="edits", done=3, total=15, left=None)
    assert text_of(page.progress("Editing", at)) == "Editing: 3 of 15 edits"
    at = Progress(unit="checks", done=1, total=3)
    assert text_of(page.progress("Editing", at)) == "Editing: 1 of 3 checks"


def test_an_answer_that_stops_at_once_is_no_blank_and_a_long_one_opens():
    def answers(text: str, cut: bool = False) -> str:
        reply = reply_with("Who?", text or "x")
        return page.reply(Reply(**{**vars(reply), "after": Answer(text=text, whole=text, tokens=(), cut=cut)}), TOP)

    assert "stopped at once" in text_of(answers("")) and "stopped at once" not in text_of(answers("me"))
    assert "details" in Reader(answers("word " * 30)).tags and "details" not in Reader(answers("me")).tags
    assert "me …" in text_of(answers("me", cut=True))


@settings(deadline=None)
@given(st.text(), st.text())
def test_marked_pieces_make_the_text_and_what_is_not_marked_is_common(text, other):
    pieces = marked(text, other)
    assert "".join(piece for piece, _ in pieces) == text
    rest = other
    for piece in (piece for piece, new in pieces if not new):
        assert piece in rest
        rest = rest.partition(piece)[2]


def test_what_differs_is_marked():
    assert marked("in Canberra today", "in Sydney today") == [("in ", False), ("Canberra", True), (" today", False)]


def test_the_scale_shows_which_questions_reach_tau():
    dots = {str(i): i / 10 for i in range(10)}
    html = page.scale(None, 0.65, dots)
    assert "τ 0.65 · 10 earlier questions, 3 at or beyond τ" in text_of(html)
    assert html.count("mm-dot mm-fired") == 3


@pytest.mark.parametrize(
    ("tau", "words"),
    [(0.25, "τ 0.25, set by hand"), ("auto", "calibrated on this model")],
)
def test_the_chip_says_where_tau_comes_from(tau, words):
    session = open_session(tau="auto")
    if tau != "auto":
        session.set_tau(tau)
    said = text_of(page.chips(session))
    assert words in said and "Method MEMOIR" in said and "Edits 0" in said


@pytest.mark.parametrize(
    ("measure", "score", "fired", "words"),
    [
        ("overlap", 0.9, True, "Overlap 0.90 ≥ τ 0.40: the edit answers."),
        ("overlap", 0.3, False, "Overlap 0.30 < τ 0.40: the model answers by itself."),
        ("distance", 0.3, True, "Distance 0.30 ≤ τ 0.40: the edit answers."),
        ("distance", 0.9, False, "Distance 0.90 > τ 0.40: the model answers by itself."),
    ],
)
def test_a_distance_fires_at_or_below_its_threshold_and_all_else_at_or_above(measure, score, fired, words):
    assert words in text_of(page.reply(reply_with("Who?", "me", score=score, measure=measure, fired=fired), TOP))


def test_an_empty_reply_takes_the_same_room():
    def rows(html: str) -> int:
        return Reader(html).tags.count("tr")

    session = open_session()
    assert rows(page.reply(None, TOP)) == rows(page.reply(session.ask(PROMPTS[0]), TOP)) == 10


@pytest.fixture
def panel():
    panel = Panel(small_model("llama"), "memoir", **SETTINGS)
    yield panel
    panel.close()


def press(panel: Panel, button) -> None:
    """Outside an event loop the panel works at once."""
    button.click()
    assert panel.wait(0)


def write(panel: Panel, prompt: str, target: str, rephrase: str = "") -> None:
    panel.prompt.value, panel.target.value, panel.rephrase.value = prompt, target, rephrase
    press(panel, panel.edit)


def test_the_story(panel):
    write(panel, PROMPTS[0], "zebra")
    assert "Edited in" in panel.verdict.value
    assert "→ zebra" in panel.reply.value and "Overlap 1.00 ≥ τ 1.00" in text_of(panel.reply.value)
    assert panel.count.value == "1–1 of 1" and "Unsaved 1" in text_of(panel.chips.value)
    panel.question.value = PROMPTS[1]
    press(panel, panel.ask)
    assert ">unchanged<" in panel.reply.value and "the model answers by itself" in panel.reply.value
    press(panel, panel.rows[0].forget)
    assert "Forgot" in panel.kept.text.value and panel.count.value == "None yet"
    assert panel.reply.value == page.reply(None, TOP) and panel.verdict.value == ""
    assert panel.undo_here.layout.visibility == "visible"
    press(panel, panel.undo_here)
    assert panel.count.value == "1–1 of 1" and "Undid forgetting" in panel.kept.text.value


def learn(panel: Panel, monkeypatch, *answers: str) -> None:
    """Let the model answer everything with the answers, in turn, the last one for ever."""
    left = list(answers)
    answer = lambda prompt, **_: left.pop(0) if len(left) > 1 else left[0]  # noqa: E731
    monkeypatch.setattr(panel.session.model, "generate", answer)


def test_a_learned_edit_clears_the_form_and_the_question_is_what_the_reply_answers(panel, monkeypatch):
    learn(panel, monkeypatch, "zebra")
    write(panel, PROMPTS[0], "zebra", PROMPTS[2])
    assert panel.prompt.value == panel.target.value == panel.rephrase.value == ""
    assert panel.question.value == panel.session.reply.prompt == PROMPTS[0]
    assert "✓ Learned: answers zebra" in text_of(panel.verdict.value) and panel.retry.layout.display == "none"


def test_a_failed_edit_says_so_keeps_the_form_and_offers_retry_and_undo(panel, monkeypatch):
    learn(panel, monkeypatch, "horse")
    write(panel, PROMPTS[0], "zebra")
    assert (
        "⚠ Not learned: answers horse" in text_of(panel.verdict.value)
        and 'title="Not learned"' in panel.rows[0].text.value
    )
    assert panel.prompt.value == PROMPTS[0] and panel.retry.layout.display is None
    learn(panel, monkeypatch, "zebra")
    press(panel, panel.retry)
    assert "✓ Learned" in panel.verdict.value and "tried 2 times" in panel.verdict.value
    press(panel, panel.undo)
    assert panel.count.value == "None yet" and panel.verdict.value == "" and panel.undo.layout.display == "none"


def test_what_a_list_did_not_learn_is_tried_again_in_one_click(panel, monkeypatch):
    panel.mode.value = "Paste or upload"
    panel.table.value = "".join(f"{prompt},zebra\n" for prompt in PROMPTS)
    known = {PROMPTS[0]}
    answers = lambda prompts: ["zebra" if prompt in known else "horse" for prompt in prompts]  # noqa: E731
    monkeypatch.setattr(panel.session.model, "generate", lambda prompts, **_: answers(prompts))
    press(panel, panel.edit)
    assert "⚠ Learned 1 of 3" in text_of(panel.verdict.value) and panel.retry.layout.display is None
    known.update(PROMPTS)
    press(panel, panel.retry)
    assert "✓ Learned 3 of 3" in text_of(panel.verdict.value) and "tried 2 times" in text_of(panel.verdict.value)
    assert panel.retry.layout.display == "none" and panel.count.value == "1–3 of 3"
    press(panel, panel.undo)
    assert panel.count.value == "None yet"


def test_a_learned_edit_leaves_a_table_that_was_only_pasted(panel, monkeypatch):
    panel.table.value = "Who?,me"
    learn(panel, monkeypatch, "zebra")
    write(panel, PROMPTS[0], "zebra")
    assert panel.prompt.value == "" and panel.table.value == "Who?,me"


def test_a_conflict_asks(panel):
    write(panel, PROMPTS[0], "zebra")
    write(panel, PROMPTS[0], "apple")
    assert "looks like" in panel.verdict.value and len(panel.session.editor.edits) == 1
    assert panel.replace.layout.display is panel.keep_both.layout.display is None
    press(panel, panel.drop)
    assert panel.verdict.value == "" and panel.replace.layout.display == "none"
    write(panel, PROMPTS[0], "apple")
    press(panel, panel.keep_both)
    assert len(panel.session.editor.edits) == 2 and panel.replace.layout.display == "none"


def test_a_pasted_table_is_three_actions_and_a_bad_one_is_said(panel):
    panel.mode.value = "Paste or upload"
    panel.table.value = "prompt,target\n" + "".join(f"Question {i} is,answer\n" for i in range(10))
    press(panel, panel.edit)
    assert "of 10" in panel.verdict.value and len(panel.session.editor.edits) == 10 and panel.table.value == ""
    panel.table.value = "prompt,target\nWho?,"
    press(panel, panel.edit)
    assert (
        "line 2: key &#39;target&#39; is missing" in panel.edit_line.text.value
        and len(panel.session.editor.edits) == 10
    )


def test_an_uploaded_file_fills_the_table(panel):
    def file(name: str, content: bytes) -> dict:
        return dict(name=name, type="text/csv", size=len(content), content=memoryview(content), last_modified=FRIDAY)

    panel.upload.value = (file("a.csv", "Who?,mé\n".encode()),)
    assert panel.table.value == "Who?,mé\n"
    panel.upload.value = (file("b.csv", b"\xff\xfe"),)
    assert "b.csv is not UTF-8 text" in panel.edit_line.text.value


def test_moving_tau_changes_which_questions_read_the_memory(panel):
    write(panel, PROMPTS[0], "zebra")
    panel.question.value = PROMPTS[1]
    press(panel, panel.ask)
    assert "the model answers by itself" in panel.reply.value
    panel.tau.value = 0.0
    assert panel.session.editor.memory.tau == 0.0 and "the edit answers" in panel.reply.value
    assert "set by hand" in panel.chips.value and panel.calibrate.layout.display is None
    fired = panel.scale.value.count("mm-dot mm-fired")
    assert fired == panel.scale.value.count("mm-dot")
    press(panel, panel.calibrate)
    assert panel.calibrate.layout.display == "none"


def test_a_slider_that_rounds_moves_no_tau():
    panel = Panel(small_model("llama"), "memoir", **{**SETTINGS, "tau": "auto"})
    press(panel, panel.calibrate)
    tau = panel.session.threshold.tau
    for value in (0.0, round(tau, 2), tau):
        panel._syncing = value == 0.0  # so that what follows is a change
        panel.tau.value = value
        panel._syncing = False
    assert panel.session.threshold.tau == tau and panel.session.threshold.origin == "calibrated"
    panel.close()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((PROMPTS[0], " "), "new answer is empty, expected text"),
        (("", "zebra"), "prompt is empty, expected text"),
        (("x" * 200, "zebra"), "tokens exceed the context of 128"),
    ],
)
def test_errors_are_said_where_they_arise(panel, texts, message):
    write(panel, *texts)
    shown = panel.edit_line.text.value
    assert 'role="alert"' in shown and message in shown
    assert not panel.session.editor.edits


def test_an_error_is_gone_once_the_next_action_starts(panel):
    press(panel, panel.ask)
    assert "the question is empty" in panel.asked.text.value
    write(panel, "", "zebra")
    assert 'role="alert"' in panel.edit_line.text.value and panel.asked.text.value == ""
    panel.question.value = PROMPTS[0]
    press(panel, panel.ask)
    assert panel.edit_line.text.value == "" and "Answered in" in panel.asked.text.value


def test_a_method_that_is_only_chosen_does_not_answer_yet(panel):
    panel.change.click()
    panel.drawer.method.value = "ft"
    assert "Method MEMOIR" in text_of(panel.chips.value)
    press(panel, panel.drawer.apply)
    assert "Method FT" in text_of(panel.chips.value) and panel.session.editor.name == "ft"
    assert panel.reply.value == page.reply(None, TOP) and panel._scale.layout.display == "none"


def test_the_drawer_shows_what_is_in_force_and_refuses_what_is_none(panel):
    panel.change.click()
    assert panel.drawer.tau.value == "1.0" and "k = 16" in panel.drawer.settings.value
    panel.drawer.tau.value = "auto"
    press(panel, panel.drawer.apply)
    assert panel.session.editor.config.tau == "auto" and panel.session.editor.config.k == 16
    panel.drawer.settings.value = "k 12"
    press(panel, panel.drawer.apply)
    assert "expected name=value" in panel.opened.text.value and panel.session.editor.config.k == 16
    for setting in ("dtype = bfloat16", "background = x.txt", "loaded = 3"):
        panel.drawer.settings.value = setting
        press(panel, panel.drawer.apply)
        assert f"{setting.split()[0]} is no setting of the method" in panel.opened.text.value


def test_background_texts_given_from_python_outlast_apply():
    texts = [f"Number {i} is not a colour." for i in range(30)]
    panel = Panel(small_model("llama"), "memoir", background=texts, **SETTINGS)
    panel.change.click()
    assert panel.drawer.background.placeholder == "30 texts given"
    press(panel, panel.drawer.apply)
    assert list(panel.session.editor.background) == texts


def test_an_open_drawer_follows_what_is_in_force_and_else_keeps_what_is_typed(panel, tmp_path):
    panel.change.click()
    panel.folder.value = str(tmp_path / "memory")
    press(panel, panel.save)
    panel.drawer.settings.value = "k = 12"
    panel.question.value = PROMPTS[0]
    press(panel, panel.ask)
    assert panel.drawer.settings.value == "k = 12"
    press(panel, panel.drawer.apply)
    assert panel.drawer.settings.value == "k = 12" and "<td>k</td><td>12</td>" in panel.drawer.inforce.value
    panel.tau.value = 0.25
    assert panel.drawer.tau.value == "0.25"
    press(panel, panel.load)
    assert panel.drawer.tau.value == "1.0" and "k = 16" in panel.drawer.settings.value
    assert "<td>k</td><td>16</td>" in panel.drawer.inforce.value
    press(panel, panel.drawer.apply)
    assert panel.session.editor.config.k == 16


def test_loading_shows_the_method_that_was_saved(panel, tmp_path):
    panel.folder.value = str(tmp_path / "memory")
    press(panel, panel.save)
    panel.drawer.method.value, panel.drawer.settings.value, panel.drawer.tau.value = "unedited", "", ""
    press(panel, panel.drawer.apply)
    assert panel.session.editor.name == "unedited"
    press(panel, panel.load)
    assert panel.session.editor.name == "memoir" and "Method MEMOIR" in text_of(panel.chips.value)
    panel.change.click()
    assert panel.drawer.method.value == "memoir"


def test_an_unknown_folder_or_model_is_said_and_the_panel_goes_on(panel, tmp_path):
    panel.folder.value = str(tmp_path / "nothing")
    press(panel, panel.load)
    assert 'role="alert"' in panel.opened.text.value and "no saved edits in" in panel.opened.text.value
    panel.drawer.model.value = "./nowhere"
    press(panel, panel.drawer.apply)
    assert "no model in nowhere" in panel.opened.text.value
    write(panel, PROMPTS[0], "zebra")
    assert "Edited in" in panel.verdict.value


def test_saving_over_other_edits_asks_once_more(panel, tmp_path):
    folder = str(tmp_path / "memory")
    other = open_session()
    other.save(folder)
    panel.folder.value = folder
    write(panel, PROMPTS[0], "zebra")
    press(panel, panel.save)
    assert "Press Save again to overwrite" in panel.opened.text.value and panel.session.unsaved == 1
    press(panel, panel.save)
    assert "Saved 1 edit" in panel.opened.text.value and panel.session.unsaved == 0


def test_what_is_not_saved_is_dropped_at_the_second_press_only(panel, tmp_path):
    panel.change.click()
    write(panel, PROMPTS[0], "zebra")
    press(panel, panel.drawer.apply)
    assert "1 change not saved. Press Apply again" in panel.opened.text.value and len(panel.session.editor.edits) == 1
    panel.folder.value = str(tmp_path / "memory")
    press(panel, panel.load)
    assert "Press Load again" in panel.opened.text.value
    press(panel, panel.drawer.apply)
    assert len(panel.session.editor.edits) == 1
    press(panel, panel.drawer.apply)
    assert len(panel.session.editor.edits) == 0


def test_edits_are_shown_a_page_at_a_time(panel):
    panel.drawer.follow(panel.session)
    panel.drawer.loaded.value = ROWS + 2
    press(panel, panel.drawer.apply)
    assert panel.count.value == f"1–{ROWS} of {ROWS + 2}"
    panel.next.click()
    assert panel.count.value == f"{ROWS + 1}–{ROWS + 2} of {ROWS + 2}"
    assert [row.edit is not None for row in panel.rows] == [True, True] + [False] * (ROWS - 2)
    assert panel.next.disabled and not panel.previous.disabled
    panel.search.value = next(iter(panel.session.editor.edits.values())).prompt
    assert panel.count.value == "1–1 of 1" and panel.rows[0].edit.prompt == panel.search.value
    panel.search.value = "no such words"
    assert panel.count.value == "None found"
    assert not any(row.text.value or row.ask.tooltip or row.forget.tooltip for row in panel.rows)


def test_a_method_that_cannot_forget_says_so():
    panel = Panel(small_model("llama"), "ft", 1, layer=1, learning_rate=1e-3, iterations=2)
    assert panel.rows[0].forget.disabled and "cannot forget a single edit" in panel.rows[0].forget.tooltip
    panel.question.value = PROMPTS[0]
    press(panel, panel.ask)
    assert "every prompt goes through the changed weights" in panel.reply.value
    panel.close()


async def turns_until_idle(panel: Panel) -> int:
    """How often the event loop ran meanwhile."""
    turns = 0
    while not panel.wait(0):
        await asyncio.sleep(0.005)
        turns += 1
    return turns


def test_the_loop_stays_free_and_outcomes_arrive_in_its_thread():
    async def story() -> tuple[int, set[str]]:
        panel = Panel(small_model("llama"), "memoir", **{**SETTINGS, "iterations": 50, "stop_loss": 0.0})
        threads = set()
        panel.verdict.observe(lambda _: threads.add(threading.current_thread().name), "value")
        panel.prompt.value, panel.target.value = PROMPTS[0], "zebra"
        panel.edit.click()
        turns = await turns_until_idle(panel)
        panel.close()
        assert "Edited in" in panel.verdict.value
        return turns, threads

    turns, threads = asyncio.run(story())
    assert turns > 5
    assert threads == {threading.main_thread().name}


def test_a_batch_is_cancelled_at_the_next_step_and_nothing_else_starts_meanwhile():
    """After Cancel the edit at hand takes no further step: its loss is told once more at most."""

    async def story() -> None:
        panel = Panel(small_model("llama"), "memoir", **SETTINGS)
        panel.drawer.loaded.value = 1000
        panel.drawer.apply.click()
        while not panel.session.editor.edits:
            await asyncio.sleep(0.01)
        panel.ask.click()
        assert "Something else is running" in panel.asked.text.value
        panel.drawer.apply.click()  # its line shows the progress, and Cancel
        assert "Something else" not in panel.opened.text.value
        assert panel.opened.cancel.layout.visibility == "visible"
        assert panel.opened.cancel.layout.visibility == "visible"
        editor, steps = panel.session.editor, []
        plain = editor.check_losses
        editor.check_losses = lambda *given: steps.append(len(editor.edits)) or plain(*given)
        panel.opened.cancel.click()
        pressed, before = len(editor.edits), len(steps)
        assert "Cancelling" in panel.opened.text.value
        await turns_until_idle(panel)
        made = len(editor.edits)
        assert len(steps) <= before + 1 and pressed <= made <= pressed + 1
        assert f"Cancelled after {made} of 1000 edits; those are kept." in panel.opened.text.value
        assert panel.opened.cancel.layout.visibility == "hidden"
        panel.close()

    asyncio.run(story())


def test_enter_acts_on_the_text_that_arrives_after_it():
    async def story() -> None:
        panel = Panel(small_model("llama"), "memoir", **SETTINGS)
        panel.question._handle_custom_msg({"event": "submit"}, [])
        panel.question.value = PROMPTS[0]
        await asyncio.sleep(0.2)
        await turns_until_idle(panel)
        assert panel.session.reply.prompt == PROMPTS[0]
        panel.close()

    asyncio.run(story())


def test_closing_gives_the_model_back():
    model = small_model("llama")
    with torch.no_grad():
        before = model.forward(model.encode(PROMPTS))
    panel = Panel(model, "memoir", 2, **SETTINGS)
    panel.close()
    with torch.no_grad():
        assert torch.equal(model.forward(model.encode(PROMPTS)), before)
    assert model.editor is None
