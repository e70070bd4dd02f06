"""An edited model generates as users generate: batches, sampling, beams, streams, pipelines, chats."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from families import byte_tokenizer, network, small_model
from transformers import GenerationConfig, TextGenerationPipeline, TextIteratorStreamer

from memoir.editors import make_editor
from memoir.models import LanguageModel
from memoir.records import EditRequest

EDITS = [EditRequest(prompt=f"{i} stones, {i * i}", target=f"weigh {i}") for i in range(20, 36)]
SETTINGS = dict(
    layer=1, k=16, feature="last", tau=0.97, iterations=15, step_rule="constant", learning_rate=5.0, prefixes=0
)
SIX = dict(max_new_tokens=6, min_new_tokens=6)
GREEDY = dict(**SIX, do_sample=False, pad_token_id=0)
PROMPTS = [EDITS[3].prompt, "something else entirely", EDITS[7].prompt]


@pytest.fixture(scope="module", params=["last", "mean"])  # a mean shows where the prompt's tokens are mistaken
def edited(request):
    model = small_model("llama")
    editor = make_editor("memoir", model, **SETTINGS | {"feature": request.param}, on_conflict="keep-both")
    editor.edit(EDITS)
    return editor


def dense(editor, prompt):
    """An oracle for one prompt, without hooks: a model of its own whose weights hold what the prompt's match wrote."""
    model, memory, explained = small_model("llama"), editor.memory, editor.explain(prompt)
    if explained.fired:
        mask = memory.bank.masks(np.array([memory.bank.ids.index(explained.edit_id)]))
        model.site(SETTINGS["layer"]).weight.add_(memory.weight * mask)
    return model


def tokens_of(model, prompts, **options):
    batch = model.encode(prompts)
    with torch.no_grad():
        out = model.network.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), **{**GREEDY, **options}
        )
    return out[:, batch.input_ids.shape[1] :]


def test_64_prompts_in_a_batch_are_64_single_calls(edited):
    prompts = [*(e.prompt for e in EDITS), *(f"{'very ' * (i % 7)}unlike {i}" for i in range(48))]
    together = edited.model.generate(prompts, **SIX)
    fired = [edited.explain(prompt).fired for prompt in prompts]
    assert sum(fired) >= 16 and not all(fired)
    assert together == [edited.model.generate(prompt, **SIX) for prompt in prompts]
    with edited.detached() as model:
        plain = model.generate(prompts, **SIX)
    for answer, before, read in zip(together, plain, fired, strict=True):
        assert read or answer == before


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(use_cache=False),
        dict(num_beams=3),
        dict(num_beams=3, use_cache=False),
        dict(num_beams=4, num_return_sequences=2),
    ],
    ids=str,
)
def test_an_edited_model_generates_as_one_whose_weights_hold_the_edit(edited, options):
    together = edited.model.generate(PROMPTS, **SIX, **options)
    assert together == [dense(edited, prompt).generate(prompt, **SIX, **options) for prompt in PROMPTS]
    assert together == [edited.model.generate(prompt, **SIX, **options) for prompt in PROMPTS]
    with edited.detached() as model:
        plain = model.generate(PROMPTS, **SIX, **options)
    assert [answer != before for answer, before in zip(together, plain, strict=True)] == [True, False, True]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_samples_are_those_of_a_model_whose_weights_hold_the_edit(edited, prompt):
    drawn = []
    for model in (edited.model, dense(edited, prompt)):
        torch.manual_seed(3)
        drawn.append(model.generate(prompt, do_sample=True, top_k=0, num_return_sequences=5, **SIX))
    assert drawn[0] == drawn[1] and len(drawn[0]) == 5 and len(set(drawn[0])) > 1
    torch.manual_seed(3)
    texts = edited.model.generate([prompt, prompt], do_sample=True, top_k=0, num_return_sequences=2, **SIX)
    assert [len(each) for each in texts] == [2, 2]


def test_beams_under_the_networks_own_generate_keep_the_decision_of_their_sequence(edited):
    together = tokens_of(edited.model, PROMPTS[:2], num_beams=3)
    assert torch.equal(together, torch.cat([tokens_of(edited.model, [p], num_beams=3) for p in PROMPTS[:2]]))
    texts = [text.strip() for text in edited.model.tokenizer.batch_decode(together, skip_special_tokens=True)]
    assert texts == edited.model.generate(PROMPTS[:2], num_beams=3, **SIX)


def test_sampling_draws_from_the_edited_distribution(edited):
    prompt = EDITS[5].prompt
    torch.manual_seed(0)
    drawn = tokens_of(edited.model, [prompt] * 400, do_sample=True, top_k=0, max_new_tokens=1, min_new_tokens=1)
    with torch.no_grad():
        logits = edited.model.forward(edited.model.encode([prompt]))[0, -1]
    logits[2] = -torch.inf  # min_new_tokens forbids the end
    expected = logits.softmax(-1)
    frequency = torch.bincount(drawn[:, 0], minlength=len(expected)) / 400
    distance = float((frequency - expected).abs().sum()) / 2
    # Total variation of n = 400 draws: its mean is at most ½ Σ √(p (1 − p) / n); McDiarmid: 0.1 more once in 3000.
    assert distance < float((expected * (1 - expected) / 400).sqrt().sum()) / 2 + 0.1


def test_a_stream_says_what_a_call_says(edited):
    model, prompt = edited.model, EDITS[7].prompt
    inputs = model.tokenizer(prompt, return_tensors="pt")
    for generate, given in (
        (model.network.generate, {**inputs, **GREEDY}),
        (model.generate, dict(prompts=prompt, **SIX)),
    ):
        streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=generate, kwargs={**given, "streamer": streamer})
        thread.start()
        pieces = list(streamer)
        thread.join()
        assert "".join(pieces).strip() == model.generate(prompt, **SIX) == dense(edited, prompt).generate(prompt, **SIX)


def test_a_second_turn_on_the_same_cache_keeps_the_decision(edited):
    """Past the prefill, several tokens at once are read under the decision that was taken on the prompt."""
    model = edited.model
    batch = model.encode([EDITS[2].prompt])
    more = torch.tensor([[30, 31, 32]])
    with torch.no_grad():
        first = model.network(input_ids=batch.input_ids, use_cache=True)
        found = model.network(input_ids=more, past_key_values=first.past_key_values, use_cache=True).logits
        mask = torch.zeros(1, batch.input_ids.shape[1] + 3, dtype=torch.bool)
        mask[:, :-3] = True
        with model.scope.prompt(mask):
            expected = model.network(input_ids=torch.cat([batch.input_ids, more], dim=1)).logits[:, -3:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_pipeline_answers_with_the_edit(edited):
    pipeline = TextGenerationPipeline(model=edited.model.network, tokenizer=edited.model.tokenizer)
    options = GenerationConfig(**GREEDY, bos_token_id=1, eos_token_id=2)
    for prompt in (EDITS[1].prompt, "something else entirely"):
        text = pipeline(prompt, generation_config=options, return_full_text=False)[0]["generated_text"]
        assert text == edited.model.tokenizer.decode(tokens_of(edited.model, [prompt])[0], skip_special_tokens=True)


def test_generate_answers_or_says_why_not(edited):
    model = edited.model
    assert model.generate([]) == []
    for options in (dict(return_dict_in_generate=True), dict(return_dict_in_generate=True, output_scores=True)):
        assert model.generate(PROMPTS, **SIX, **options) == model.generate(PROMPTS, **SIX)
    for options in (dict(guidance_scale=1.5), dict(generation_config=GenerationConfig(guidance_scale=1.5))):
        with pytest.raises(
            ValueError, match=r"guidance_scale = 1\.5: guidance also runs the answer without its prompt"
        ):
            model.generate(PROMPTS, **SIX, **options)
    assert model.generate(PROMPTS, guidance_scale=1, **SIX) == model.generate(PROMPTS, **SIX)


TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}:{{ m['content'] }}:{{ m['role'] }}]{% endfor %}"
    "{% if add_generation_prompt %}[assistant:{% endif %}"
)


def chat_model() -> LanguageModel:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return LanguageModel(network("llama"), tokenizer, "chatty", chat=True)


def test_a_chat_is_answered_alike_with_and_without_a_cache():
    """Without one every step shows the whole turn again, and the header that opens the answer."""
    model = chat_model()
    editor = make_editor("memoir", model, **SETTINGS | {"feature": "mean", "tau": 0.99})
    editor.edit(EDITS[0])
    answer = model.generate(EDITS[0].prompt, **SIX)
    assert answer == model.generate(f" {EDITS[0].prompt} ", use_cache=False, **SIX)
    with editor.detached():
        assert answer != model.generate(EDITS[0].prompt, **SIX)


def test_a_chat_is_routed_on_the_users_turn():
    model = chat_model()
    editor = make_editor("memoir", model, **SETTINGS | {"feature": "mean", "tau": 0.99})
    editor.edit(EDITS[0])
    messages = [{"role": "user", "content": EDITS[0].prompt}]
    rendered = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    coded = model.tokenizer(rendered, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        model.network(**coded)
    prompt = model.scope.span.prompt[0]
    assert model.tokenizer.decode(coded["input_ids"][0][prompt]) == EDITS[0].prompt
    assert model.scope.span.memo[editor.memory].fired.tolist() == [True]
    # The same words after an earlier exchange: still the user's last turn, and nothing else.
    longer = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}, *messages]
    rendered = model.tokenizer.apply_chat_template(longer, tokenize=False, add_generation_prompt=True)
    coded = model.tokenizer(rendered, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        model.network(**coded)
    assert model.tokenizer.decode(coded["input_ids"][0][model.scope.span.prompt[0]]) == EDITS[0].prompt
