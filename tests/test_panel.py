"""The panel without a browser: what the session does, what the page says, and that the kernel stays free."""

import asyncio
import threading
import time
from html.parser import HTMLParser

import pytest
import torch
from families import small_model
from hypothesis import given
from hypothesis import strategies as st

from memoir.editors import EditCancelled, EditError
from memoir.panel import Panel
from memoir.panel.html import page
from memoir.panel.session import TOP, Answer, Edited, Reply, Session, next_tokens, request_of
from memoir.panel.widgets import ROWS
from memoir.records import EditReport, EditRequest, Explanation

# On a random model all prompts look alike: only the very same one is to match.
SETTINGS = dict(
    layer=1, k=16, feature="last", tau=1.0, prefixes=1, prefix_tokens=3, iterations=5, on_conflict="keep-both"
)
PROMPTS = ("The first word is", "Number two is called", "A third thing is")


def open_session(loaded: int = 0, **overrides) -> Session:
    session = Session()
    session.open(small_model("llama"), "memoir", loaded, **{**SETTINGS, **overrides})
    return session


def logits(session: Session) -> torch.Tensor:
    with torch.no_grad():
        return session.model.forward(session.model.encode(PROMPTS))


# The session ---------------------------------------------------------------------------------------------------------


def test_a_reply_shows_the_model_without_and_with_its_edits():
    session = open_session()
    request = request_of(PROMPTS[0], "zebra")
    session.edit(request)
    reply = session.ask(PROMPTS[0])
    assert reply.after.text == session.editor.ask(PROMPTS[0])
    assert (reply.edit, reply.why.fired, reply.why.overlap) == (request, True, 1.0)
    session.editor.detach()
    assert reply.before.text == session.model.generate(PROMPTS[0])
    assert reply.before.tokens == next_tokens(session.model, PROMPTS[0])
    assert reply.before.tokens != reply.after.tokens


def test_next_tokens_are_those_of_a_plain_softmax():
    model = small_model("gpt2")
    ids = torch.tensor([model.tokenizer(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        shares = model.network(ids).logits[0, -1].double().softmax(-1)
    found = next_tokens(model, PROMPTS[0], count=7)
    order = shares.argsort(descending=True)[:7].tolist()
    assert [token for token, _ in found] == [model.tokenizer.decode([i]) for i in order]
    assert [share for _, share in found] == pytest.approx(shares[order].tolist(), rel=1e-4)


def test_opening_with_edits_makes_the_almanacs_first_ones_and_says_how_far_it_is():
    seen = []
    session = Session(progress=lambda *at: seen.append(at))
    made = session.open(small_model("llama"), "memoir", 3, **SETTINGS)
    assert (made, len(session.editor.edits), session.unsaved) == (3, 3, 0)
    assert seen == [(0, 3), (1, 3), (2, 3)]


def test_a_cancelled_batch_keeps_the_edits_before_the_interrupted_one():
    whole = open_session(2)
    asked = []

    def third_edit() -> bool:
        return len(asked) >= 2 and len(session.editor.edits) == 2

    session = Session(lambda *at: asked.append(at), third_edit)
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
    with pytest.raises(ValueError, match="holds other files"):
        session.save(str(tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("answer", "target", "learned"),
    [
        ("Canberra", "Canberra", True),
        (" canberra. ", "Canberra", True),
        ("Canberra", "CANBERRA!", True),
        ("Canberra Au", "Canberra", False),
        ("", "Canberra", False),
        ("St. Gallen", "St Gallen", False),
    ],
)
def test_an_edit_is_learned_if_the_answer_is_its_target(monkeypatch, answer, target, learned):
    session = open_session()
    monkeypatch.setattr(session.model, "generate", lambda prompt, max_new_tokens: answer)
    edited = session.edit(request_of(PROMPTS[0], target))
    assert (edited.answer, edited.learned) == (answer, learned)


def test_the_verdict_is_about_the_prompt_and_the_reply_about_the_rephrase(monkeypatch):
    session = open_session()
    monkeypatch.setattr(session.model, "generate", lambda prompt, max_new_tokens: f"answer to {prompt}")
    edited = session.edit(request_of(PROMPTS[0], "zebra", PROMPTS[1]))
    assert edited.answer == f"answer to {PROMPTS[0]}"
    assert (edited.reply.prompt, edited.reply.after.text) == (PROMPTS[1], f"answer to {PROMPTS[1]}")


def test_a_long_target_gets_an_answer_long_enough_to_be_compared():
    session = open_session(1)
    session.edit(request_of(PROMPTS[0], "x" * 50))  # 50 tokens: the tokenizer's are bytes
    lengths = []
    plain = session.model.generate
    session.model.generate = lambda prompt, max_new_tokens: lengths.append(max_new_tokens) or plain(prompt)
    session.edit(request_of(PROMPTS[0], "x" * 50))
    session.ask(PROMPTS[0])
    assert lengths[0] > 50 and lengths[-1] == 32


def test_an_edit_names_the_edits_that_it_replaced():
    session = open_session(on_conflict="replace")
    first = request_of(PROMPTS[0], "zebra")
    session.edit(first)
    edited = session.edit(request_of(PROMPTS[0], "apple"))
    assert edited.replaced == (first,)
    assert f"It replaced “{PROMPTS[0]}” → “zebra”." in page.edited(edited)


def test_a_reply_lasts_as_long_as_the_edits_that_gave_it(tmp_path):
    session = open_session()
    request = request_of(PROMPTS[0], "zebra")
    assert session.edit(request).reply is session.reply
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


def test_a_form_becomes_an_edit_or_names_what_is_empty():
    request = request_of(" Who? ", " me ", " Which one? ", " Who ")
    assert (request.prompt, request.target, request.subject) == ("Who?", "me", "Who")
    assert [(p.kind, p.prompt, p.answer) for p in request.probes] == [("rephrase", "Which one?", "me")]
    for texts, name in (((" ", "me"), "prompt"), (("Who?", ""), "new answer")):
        with pytest.raises(ValueError, match=f"{name} is empty"):
            request_of(*texts)


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
    answer = Answer(text=text, tokens=((text, 0.5),))
    return Reply(
        prompt=prompt,
        before=answer,
        after=answer,
        why=Explanation(edit_id="x", score=score, threshold=0.4, fired=fired, contribution=0.3),
        edit=EditRequest(prompt=prompt, target=text),
        measure=measure,
        seconds=0.1,
    )


def edited_with(prompt: str, text: str, **values) -> Edited:
    return Edited(
        report=EditReport(edit_id="x", loss_before=4.5, loss_after=0.01, iterations=1, seconds=0.25),
        replaced=(EditRequest(prompt=prompt, target=text),) * 2,
        reply=reply_with(prompt, text),
        **{"answer": text, "learned": True, **values},
    )


@given(prompt=hostile, text=hostile)
def test_untrusted_texts_add_no_markup(prompt, text):
    for show in (
        lambda p, t: page.reply(reply_with(p, t), TOP),
        lambda p, t: page.edit(EditRequest(prompt=p, target=t)),
        lambda p, t: page.edited(edited_with(p, t)),
        lambda p, t: page.forgotten(EditRequest(prompt=p, target=t)),
        lambda p, t: page.note(p + t),
        lambda p, t: page.error(p + t),
        lambda p, t: page.progress(p + t, 1, 2),
    ):
        assert Reader(show(prompt, text)).tags == Reader(show("a", "b")).tags
    shown = Reader(page.edit(EditRequest(prompt=prompt, target=text)))
    assert prompt in "".join(shown.texts).replace("\r", "\n") or "\r" in prompt or "\x00" in prompt


def text_of(html: str) -> str:
    """The text of a page, white space as a browser shows it."""
    return " ".join("".join(Reader(html).texts).split())


def test_the_verdict_comes_before_what_the_edit_took():
    said = text_of(page.edited(edited_with("Who?", "me")))
    took = "Edited in 0.25 s: loss 4.50 → 0.010 nats per token in 1 step."
    assert said == f"Learned: answers me. {took} It replaced “Who?” → “me”, “Who?” → “me”."
    assert "Not learned: answers nothing." in text_of(page.edited(edited_with("Who?", "me", answer="", learned=False)))


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
    assert "Edited in" in panel.edited.text.value
    assert "→ zebra" in panel.reply.value and "Overlap 1.00 ≥ τ 1.00" in panel.reply.value
    assert panel.count.value == "1–1 of 1" and "1 not saved" in panel.title.value
    panel.question.value = PROMPTS[1]
    press(panel, panel.ask)
    assert ">unchanged<" in panel.reply.value and "the model answers by itself" in panel.reply.value
    press(panel, panel.rows[0].forget)
    assert "Forgot" in panel.kept.text.value and panel.count.value == "None yet"
    assert panel.reply.value == page.reply(None, TOP)


def test_a_rephrase_is_asked_at_once(panel):
    write(panel, PROMPTS[0], "zebra", PROMPTS[2])
    assert f">{PROMPTS[2]}<" in panel.reply.value


@pytest.mark.parametrize(
    ("texts", "line", "message"),
    [
        ((PROMPTS[0], " "), "edited", "new answer is empty, expected text"),
        (("", "zebra"), "edited", "prompt is empty, expected text"),
        (("x" * 200, "zebra"), "edited", "tokens exceed the context of 128"),
    ],
)
def test_errors_are_said_where_they_arise(panel, texts, line, message):
    write(panel, *texts)
    shown = getattr(panel, line).text.value
    assert 'role="alert"' in shown and message in shown
    assert not panel.session.editor.edits


def test_an_error_is_gone_once_the_next_action_starts(panel):
    write(panel, "", "zebra")
    assert 'role="alert"' in panel.edited.text.value
    panel.question.value = PROMPTS[0]
    press(panel, panel.ask)
    assert panel.edited.text.value == "" and "Answered in" in panel.asked.text.value


def test_a_changed_method_clears_the_reply_and_says_who_answers(panel):
    panel.question.value = PROMPTS[0]
    press(panel, panel.ask)
    panel.method.value = "ft"
    assert panel.reply.value == page.reply(None, TOP)
    assert "Press Open to use ft. Until then memoir answers." in panel.opened.text.value
    press(panel, panel.ask)
    assert panel.method.value == "memoir"


def test_loading_shows_the_method_that_was_saved(panel, tmp_path):
    panel.folder.value = str(tmp_path / "memory")
    press(panel, panel.save)
    panel.method.value = "unedited"
    press(panel, panel.open)
    assert panel.session.editor.name == "unedited"
    press(panel, panel.load)
    assert panel.session.editor.name == panel.method.value == "memoir"


def test_an_unknown_folder_or_model_is_said_and_the_panel_goes_on(panel, tmp_path):
    panel.folder.value = str(tmp_path / "nothing")
    press(panel, panel.load)
    assert 'role="alert"' in panel.kept.text.value and "nothing" in panel.kept.text.value
    panel.model.value = "./nowhere"
    press(panel, panel.open)
    assert "no model in nowhere" in panel.opened.text.value
    write(panel, PROMPTS[0], "zebra")
    assert "Edited in" in panel.edited.text.value


def test_what_is_not_saved_is_dropped_at_the_second_press_only(panel, tmp_path):
    write(panel, PROMPTS[0], "zebra")
    press(panel, panel.open)
    assert "1 change not saved. Press Open again" in panel.opened.text.value and len(panel.session.editor.edits) == 1
    panel.folder.value = str(tmp_path / "memory")
    press(panel, panel.load)
    assert "Press Load again" in panel.kept.text.value
    press(panel, panel.open)
    assert len(panel.session.editor.edits) == 1
    press(panel, panel.open)
    assert len(panel.session.editor.edits) == 0
    write(panel, PROMPTS[0], "zebra")
    press(panel, panel.save)
    press(panel, panel.open)
    assert len(panel.session.editor.edits) == 0


def test_edits_are_shown_a_page_at_a_time(panel):
    panel.loaded.value = ROWS + 2
    press(panel, panel.open)
    assert panel.count.value == f"1–{ROWS} of {ROWS + 2}"
    panel.next.click()
    assert panel.count.value == f"{ROWS + 1}–{ROWS + 2} of {ROWS + 2}"
    assert [row.edit is not None for row in panel.rows] == [True, True] + [False] * (ROWS - 2)
    assert panel.next.disabled and not panel.previous.disabled
    panel.search.value = next(iter(panel.session.editor.edits.values())).prompt
    assert panel.count.value == "1–1 of 1" and panel.rows[0].edit.prompt == panel.search.value
    panel.search.value = "no such words"
    assert panel.count.value == "None found"


def test_a_method_that_cannot_forget_says_so():
    panel = Panel(small_model("llama"), "ft", 1, layer=1, learning_rate=1e-3, iterations=2)
    assert panel.rows[0].forget.disabled and "cannot forget a single edit" in panel.rows[0].forget.tooltip
    panel.question.value = PROMPTS[0]
    press(panel, panel.ask)
    assert "every prompt passes the changes" in panel.reply.value
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
        panel.edited.text.observe(lambda _: threads.add(threading.current_thread().name), "value")
        panel.prompt.value, panel.target.value = PROMPTS[0], "zebra"
        panel.edit.click()
        turns = await turns_until_idle(panel)
        panel.close()
        assert "Edited in" in panel.edited.text.value
        return turns, threads

    turns, threads = asyncio.run(story())
    assert turns > 5
    assert threads == {threading.main_thread().name}


def test_a_batch_is_cancelled_within_a_second_and_nothing_else_starts_meanwhile():
    async def story() -> None:
        panel = Panel(small_model("llama"), "memoir", **SETTINGS)
        panel.loaded.value = 1000
        panel.open.click()
        while not panel.session.editor.edits:
            await asyncio.sleep(0.01)
        panel.ask.click()
        assert "Something else is running" in panel.asked.text.value
        assert panel.opened.cancel.layout.visibility == "visible"
        pressed = time.monotonic()
        panel.opened.cancel.click()
        await turns_until_idle(panel)
        assert time.monotonic() - pressed < 1
        made = len(panel.session.editor.edits)
        assert 0 < made < 1000 and f"Cancelled after {made} of 1000 edits; those stand." in panel.opened.text.value
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
