"""Our own texts: enough of them, of many shapes, and the default background of every model but the almanac's."""

from __future__ import annotations

import re

from families import small_model

from memoir import texts
from memoir.almanac import background_prompts
from memoir.editors import make_editor
from memoir.models import LanguageModel


def test_half_of_the_background_are_questions_with_varied_openings():
    background = texts.background()
    assert len(background) == len(set(background)) >= 200
    questions = [text for text in background if text.endswith("?")]
    assert 0.4 < len(questions) / len(background) < 0.6
    assert len({text.split()[0] for text in questions}) > 25
    assert all(text == text.strip() and 4 < len(text) < 80 for text in background)


def test_passages_are_some_three_thousand_tokens_of_prose():
    passages = texts.passages()
    assert 12 <= len(passages) <= 15
    assert all(150 < len(passage.split()) < 250 and "\n" not in passage for passage in passages)
    tokens = sum(len(re.findall(r"\w+|[^\w\s]", passage)) for passage in passages)
    assert 2500 < tokens < 3500


def test_they_are_the_default_background_and_the_almanac_keeps_its_own():
    model = small_model("llama")
    assert make_editor("ft", model).background == tuple(texts.background())
    assert make_editor("ft", model, background=["%"]).background == ("%",)
    named = LanguageModel(model.network, model.tokenizer, "almanac")
    assert make_editor("ft", named).background == tuple(background_prompts())
