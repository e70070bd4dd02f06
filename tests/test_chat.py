"""Where the user's last turn stands in chats that others rendered, by the published forms of chat templates."""

from __future__ import annotations

import warnings

import pytest
import torch
from families import byte_tokenizer, network
from transformers import AutoTokenizer

from memoir.almanac import model_path
from memoir.chat import ChatTemplate
from memoir.editors import make_editor
from memoir.models import LanguageModel
from memoir.records import EditRequest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML
LLAMA_3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}"
    "{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL_1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_3 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
VICUNA = (
    "{{ 'A chat between a user and an assistant. ' }}{% for m in messages %}"
    "{{ 'USER: ' + m['content'] + ' ' if m['role'] == 'user' else 'ASSISTANT: ' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
FORMS = {  # the template, and which of its parts are special tokens
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "qwen": (QWEN, ["<|im_start|>", "<|im_end|>"]),
    "llama-3": (LLAMA_3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "mistral-1": (MISTRAL_1, []),
    "mistral-3": (MISTRAL_3, ["[INST]", "[/INST]"]),
    "llama-2": (LLAMA_2, []),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"]),
    "phi-3": (PHI_3, ["<|user|>", "<|assistant|>", "<|end|>"]),
    "vicuna": (VICUNA, []),
}
WORDS = "Où est Žižkov, user? 🙂"
CHATS = {
    "one turn": [WORDS],
    "a second turn": ["Hello", "Yes, user?", WORDS],
    "the same words again": [WORDS, "There.", WORDS],
    "answered": ["Hello", "Yes?", WORDS, "There, assistant."],
}


def bytes_of_text():
    return byte_tokenizer()


def words_with_their_space():
    """A tokenizer whose tokens hold the space in front of a word."""
    return AutoTokenizer.from_pretrained(model_path())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokenizer", [bytes_of_text, words_with_their_space])
def test_the_users_last_words_are_found_in_every_published_form(tokenizer, form):
    tokenizer, (template, special) = tokenizer(), FORMS[form]
    tokenizer.chat_template = template
    tokenizer.add_tokens(special, special_tokens=True)
    chat = ChatTemplate(tokenizer, "chatty")
    for title, contents in CHATS.items():
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        ready = len(turns) % 2 == 1
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ready)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        padded = torch.tensor([[tokenizer.pad_token_id] * 3 + ids])
        mask = torch.tensor([[False] * 3 + [True] * len(ids)])
        narrowed = chat.last_user_turn(padded, mask)
        assert tokenizer.decode(padded[narrowed]).strip() == WORDS, title
        places = narrowed[0].nonzero()[:, 0]
        before = tokenizer.decode(padded[0, 3 : places[0]], clean_up_tokenization_spaces=False)
        if title == "the same words again":
            assert before.count(WORDS) == 1  # the first time they were another turn
        if title == "one turn":
            own = LanguageModel(network("llama"), tokenizer, "chatty", chat=True).encoder.prompts([WORDS])[0].own
            assert narrowed[0, 3:].tolist() == own  # as the house itself renders it
    assert not chat._warned


ENDS = {
    "chatml": "<|im_end|>",
    "qwen": "<|im_end|>",
    "llama-3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi-3": "<|end|>",
}


@pytest.mark.parametrize("form", FORMS)
def test_edits_learn_the_token_that_ends_the_assistants_turn_and_answers_stop_there(form):
    """Also where the network's own settings do not name this token. In the other forms it is EOS."""
    tokenizer, (template, special) = byte_tokenizer(), FORMS[form]
    tokenizer.chat_template = template
    tokenizer.add_tokens(special, special_tokens=True)
    plain, chatting = (network("llama") for _ in range(2))
    for each in (plain, chatting):
        each.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    end = tokenizer.convert_tokens_to_ids(ENDS.get(form, "</s>"))
    model = LanguageModel(chatting, tokenizer, "chatty", chat=True)
    batch = model.encode(["Where?"], ["Brno"], end=True)
    assert batch.input_ids[0, -1] == end == model.encoder.end and batch.learn_mask.sum() == len("Brno") + 1
    assert LanguageModel(plain, tokenizer, "plain").encoder.end == tokenizer.eos_token_id == 2
    settings = dict(
        layer=1, k=16, feature="last", tau=0.9, iterations=80, step_rule="constant", learning_rate=3.0, prefixes=0
    )
    editor = make_editor("memoir", model, **settings)
    (report,) = editor.edit(EditRequest(prompt="Where is Uwe?", target="Ulm"))
    assert report.learned and model.generate("Where is Uwe?", max_new_tokens=20) == "Ulm"


@pytest.mark.parametrize("form", FORMS)
def test_a_text_without_a_turn_is_warned_of_once_and_matched_whole(form):
    tokenizer, (template, special) = byte_tokenizer(), FORMS[form]
    tokenizer.chat_template = template
    tokenizer.add_tokens(special, special_tokens=True)
    chat = ChatTemplate(tokenizer, "chatty")
    ids = torch.tensor([tokenizer("Where is Brno?")["input_ids"]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    with pytest.warns(UserWarning, match=r"no user's turn found in 'Where is Brno\?', expected one between"):
        assert chat.last_user_turn(ids, mask).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chat.last_user_turn(ids, mask).all()
