from __future__ import annotations

import pytest
import torch
from families import CONFIGS, byte_tokenizer, network, small_model
from transformers import BertConfig, BertLMHeadModel

from memoir.models import FAMILIES, LanguageModel, load_model, predicting


def test_encoding_marks_prompt_target_and_padding():
    model = small_model("llama")
    batch = model.encode(["Zinc is", "The tower stands in"], ["Xy", "Brno"], end=True)
    decode = lambda mask, i: model.tokenizer.decode(batch.input_ids[i][mask[i]])  # noqa: E731
    assert decode(batch.prompt_mask, 0) == "Zinc is" and decode(batch.target_mask, 0) == " Xy"
    assert decode(batch.learn_mask, 1) == " Brno</s>" and decode(batch.target_mask, 1) == " Brno"
    assert batch.attention_mask.sum(1).tolist() == [7 + 3 + 1, 19 + 5 + 1]
    assert not batch.attention_mask[0, :14].any() and batch.position_ids[0, 14:].tolist() == list(range(11))
    assert batch.last_prompt.tolist() == [20, 18]
    assert torch.equal(predicting(batch.target_mask)[:, :-1], batch.target_mask[:, 1:])


def test_the_prompt_has_the_same_tokens_with_and_without_a_target():
    model = small_model("gpt2")
    for target in ("Brno", " Brno ", "1"):
        alone, followed = model.encode(["It stands in "]), model.encode(["It stands in "], [target])
        assert torch.equal(alone.input_ids[0], followed.input_ids[0][followed.prompt_mask[0]])


def test_generation_in_a_batch_is_generation_one_by_one():
    model = small_model("llama")
    prompts = ["Zinc is", "The tower of Ostrava stands in", "x"]
    assert model.generate(prompts, max_new_tokens=6) == [model.generate(p, max_new_tokens=6) for p in prompts]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.encode(["x" * 200]), ValueError, "200 tokens exceed the context of 128"),
        (lambda m: m.encode("text"), TypeError, "prompts is one text, expected a sequence"),
        (lambda m: m.encode(["a"], ["b", "c"]), ValueError, "1 prompts, but 2 targets"),
        (lambda m: m.encode([" "]), ValueError, "prompt is empty"),
        (lambda m: m.encode(["a"], [" "]), ValueError, "target of prompt 'a' is empty"),
        (lambda m: m.site(7), IndexError, "layer 7 does not exist; small-llama has blocks 0 to 2"),
        (lambda m: m.generate("x" * 128), ValueError, "fills the context of 128 tokens"),
        (lambda m: LanguageModel(m.network, m.tokenizer, "m", chat=True), ValueError, "has no chat template"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(small_model("llama"))


def test_an_unsupported_family_is_named():
    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, is_decoder=True
    )
    with pytest.raises(ValueError, match="family 'bert' is not supported; expected one of gemma, gemma2"):
        LanguageModel(BertLMHeadModel(config), byte_tokenizer())


@pytest.mark.parametrize("family", CONFIGS)
def test_a_local_folder_loads_as_it_was_saved(family, tmp_path):
    original = network(family)
    original.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model", dtype="float32")
    assert loaded.family in FAMILIES and loaded.name == "model" and loaded.dtype == torch.float32
    assert loaded.fingerprint == LanguageModel(original, byte_tokenizer()).fingerprint
    assert not any(p.requires_grad for p in loaded.network.parameters()) and not loaded.network.training
    batch = loaded.encode(["Zinc is"])
    with torch.no_grad():
        torch.testing.assert_close(loaded.forward(batch), original.eval()(input_ids=batch.input_ids).logits)


def test_loading_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model in .*nowhere: expected a transformers folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dtype 'float33' is unknown"):
        load_model("almanac", dtype="float33")


def test_one_changed_weight_changes_the_fingerprint():
    one, two = small_model("llama"), small_model("llama")
    assert one.fingerprint == two.fingerprint
    two = LanguageModel(network("llama"), byte_tokenizer())
    two.network.model.layers[1].mlp.up_proj.weight.data[3, 3] += 1e-3
    assert one.fingerprint != two.fingerprint != small_model("llama", seed=1).fingerprint


TEMPLATE = (
    "{% for m in messages %}<user>{{ m['content'] }}</user>{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)


def test_a_chat_template_leaves_the_users_words_as_the_prompt():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = LanguageModel(network("llama"), tokenizer, "chatty", chat=True)
    batch = model.encode(["Where is Brno?"], ["Moravia"])
    assert tokenizer.decode(batch.input_ids[0]) == "<user>Where is Brno?</user><model>Moravia"
    assert tokenizer.decode(batch.input_ids[0][batch.prompt_mask[0]]) == "Where is Brno?"
    assert tokenizer.decode(batch.input_ids[0][batch.target_mask[0]]) == "Moravia"


TRIMMING = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("prompt", ["Where is Brno?", " Where is Brno? ", "assistant", "user", "s", "<user>"])
def test_the_users_words_are_found_whatever_the_template_makes_of_spaces_and_whatever_they_are(prompt):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TRIMMING
    model = LanguageModel(network("llama"), tokenizer, "chatty", chat=True)
    (row,) = model.encoder.prompts([prompt])
    tokens, own = row.tokens, row.own
    assert tokenizer.decode(tokens) == f"<user>{prompt.strip()}</user><assistant>"
    start = len("<user>")  # one token a byte
    assert [i for i, mine in enumerate(own) if mine] == list(range(start, start + len(prompt.strip())))
    for character, letter in enumerate(prompt):
        if letter != " ":
            place = model.token_at(prompt, character)
            assert own[place] and tokenizer.decode(tokens[place]) == letter


def test_a_template_that_changes_the_users_words_is_named():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TRIMMING.replace("trim", "upper")
    model = LanguageModel(network("llama"), tokenizer, "chatty", chat=True)
    with pytest.raises(ValueError, match="template of chatty changes a user's words: 'WHO', expected 'who'"):
        model.encode(["who"])
