from __future__ import annotations

import time
import unicodedata

import pytest
import torch
from families import CONFIGS, byte_tokenizer, network, small_model
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel

from memoir.models import FAMILIES, LanguageModel, load_model
from memoir.sites import watching
from memoir.text import predicting, subject_span, subject_tokens


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


def test_an_answer_of_one_line_ends_once_a_second_one_begins():
    model = small_model("llama")
    scripts = ["\n\n Brno.\n \nPrague", "Ulm\n\n\n\n\n\n\n\n\n\n"]

    def scripted(ids, scores):
        at = ids.shape[1] - length
        wanted = model.tokenizer([script[at] for script in scripts], add_special_tokens=False)["input_ids"]
        return torch.full_like(scores, -1e9).scatter(1, torch.tensor(wanted), 0.0)

    options = dict(max_new_tokens=13, logits_processor=[scripted])
    length = model.encode(["Zinc is"] * 2).input_ids.shape[1]
    assert model.generate(["Zinc is"] * 2, **options) == ["Brno.\n \nPr", "Ulm"]
    assert model.generate(["Zinc is"] * 2, one_line=True, **options) == ["Brno.\n \nP", "Ulm"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.encode(["x" * 200]), ValueError, "200 tokens exceed the context of 128"),
        (lambda m: m.encode("text"), TypeError, "prompts is one text, expected a sequence"),
        (lambda m: m.encode(["a"], ["b", "c"]), ValueError, "1 prompts, but 2 targets"),
        (lambda m: m.encode([" "]), ValueError, "prompt is empty"),
        (lambda m: m.encode([]), ValueError, "no prompts, expected at least one"),
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
            place = model.encoder.tokens_of(prompt, character, character + 1)[1]
            assert own[place] and tokenizer.decode(tokens[place]) == letter


def test_a_template_that_changes_the_users_words_is_named():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TRIMMING.replace("trim", "upper")
    model = LanguageModel(network("llama"), tokenizer, "chatty", chat=True)
    with pytest.raises(ValueError, match="template of chatty changes a user's words: 'WHO', expected 'who'"):
        model.encode(["who"])


def test_site_inputs_are_what_the_site_sees_prompt_by_prompt():
    model = small_model("llama")
    site, prompts = model.site(1), ["Zinc is", "x", "The tower of Ostrava stands in", "Two plus two"]
    seen = []
    for rows, a, mask in model.site_inputs(site, prompts, size=3):
        for row, inputs, own in zip(rows, a, mask, strict=True):
            with watching(site) as alone, torch.no_grad():
                model.forward(model.encode([prompts[row]]))
            torch.testing.assert_close(inputs[own], alone[0][0][0], rtol=1e-4, atol=1e-5)
            seen.append(row)
    assert sorted(seen) == [0, 1, 2, 3]


def framed(front: str, behind: str):
    """A tokenizer that frames every text: with `add_bos_token` and `add_eos_token`, say."""
    tokenizer = byte_tokenizer()
    frame = f"{front} $A {behind}".strip()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (front, behind) if token]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("front", ["", "<s>"])
def test_an_end_token_that_the_tokenizer_adds_is_dropped(front):
    model = LanguageModel(network("llama"), framed(front, "</s>"), "ended")
    plain = LanguageModel(network("llama"), framed(front, ""), "plain")
    assert model.tokenizer("Zinc")["input_ids"][-1] == model.tokenizer.eos_token_id
    for call in (["Zinc is", "x"],), (["Zinc is", "x"], ["Xy", "a b"]):
        for end in (False, True):
            one, other = model.encode(*call, end=end), plain.encode(*call, end=end)
            assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.learn_mask, other.learn_mask)
    assert model.generate("Zinc is", max_new_tokens=5) == plain.generate("Zinc is", max_new_tokens=5)
    prompt = "Zinc is here"
    tokens = model.encoder.prompts([prompt])[0].tokens
    for character in (0, 5, 11):
        assert (
            model.tokenizer.decode(tokens[model.encoder.tokens_of(prompt, character, character + 1)[0]])
            == prompt[character]
        )


def test_a_missing_token_is_named_with_what_then_happens():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.warns(UserWarning, match="tokenizer of bare has no EOS token: answers end at max_new_tokens"):
        model = LanguageModel(network("llama"), tokenizer, "bare")
    with pytest.raises(ValueError, match="bare has no BOS and no EOS token, one of which a sampled text starts with"):
        model.start_token  # noqa: B018
    with pytest.raises(ValueError, match="no EOS token that could be learned; expected learn_stop=False"):
        model.encode(["Zinc is"], ["Xy"], end=True)
    prompts = ["Zinc is", "The tower of Ostrava stands in"]
    model.network.generation_config.eos_token_id = None
    for stop in (None, 40, [40, 41], *model.encoder.tokens([model.generate(prompts[0], max_new_tokens=3)])[0][:1]):
        model.network.generation_config.eos_token_id = stop  # the network may know an end that its tokenizer does not
        together = model.generate(prompts, max_new_tokens=6)
        assert together == [model.generate(prompt, max_new_tokens=6) for prompt in prompts]
    tokenizer.eos_token = "</s>"
    other = LanguageModel(network("llama"), tokenizer, "ended")
    assert other.start_token == other.tokenizer.pad_token_id == 2


SUBJECTS = [
    ("Where was Ann, the sister of Anna Annand, born?", "Ann", 10, "Ann"),
    ("Anna Annand", "Ann", 5, "Ann"),  # no whole word: inside the last one
    ("Ida met Ida.", "Ida", 8, "Ida"),
    ("Who runs C++, the successor of C?", "C++", 9, "C++"),
    ("東京の人口は", "東京", 0, "東京"),  # no spaces between words
    ("R2 and R2_D2", "R2", 0, "R2"),
    ("Zoë ok", " Zoë ", 0, "Zoë"),
]


@pytest.mark.parametrize(("prompt", "subject", "start", "text"), SUBJECTS)
@pytest.mark.parametrize("forms", [("NFC", "NFC"), ("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")], ids="-".join)
def test_a_subject_is_found_as_whole_words_and_in_any_unicode_form(prompt, subject, start, text, forms):
    prompt, subject = (unicodedata.normalize(form, part) for form, part in zip(forms, (prompt, subject), strict=True))
    first, end = subject_span(prompt, subject)
    assert first == start and unicodedata.normalize("NFC", prompt[first:end]) == text
    model = small_model("llama")
    first_token, last_token = subject_tokens(model, prompt, subject)
    tokens = model.encoder.prompts([prompt])[0].tokens[first_token : last_token + 1]
    assert model.tokenizer.decode(tokens) == prompt[first:end]


def test_a_subject_that_is_not_there_is_named():
    for prompt, subject in [("Zoe ok", "Zoë"), ("Zoë ok", "Zoe"), ("Ida", "Ada")]:
        with pytest.raises(ValueError, match=f"subject '{subject}' does not occur in prompt '{prompt}'"):
            subject_span(prompt, subject)
    with pytest.raises(ValueError, match="the edit of 'Ida' has no subject; add one, or edit at another token"):
        subject_span("Ida", " ")


def test_what_concerns_the_hub_reaches_the_look_up_the_tokenizer_and_the_network(tiny_model, monkeypatch):
    asked, folder = {}, tiny_model("llama")

    def recorded(part, real):
        def call(name, *args, **options):
            asked[part] = name, options
            return real(folder, **{key: options[key] for key in ("dtype", "output_loading_info") if key in options})

        return call

    monkeypatch.setattr("memoir.sources.try_to_load_from_cache", recorded("cache", lambda folder: None))
    monkeypatch.setattr("memoir.sources.model_info", recorded("hub", lambda folder: None))
    for kind in (AutoTokenizer, AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", recorded(kind.__name__, kind.from_pretrained))
    options = dict(revision="v2", token="hf_x", trust_remote_code=True, cache_dir="kept")
    assert load_model("someone/llama", dtype="float32", **options, attn_implementation="eager").name == "llama"
    assert {name for name, _ in asked.values()} == {"someone/llama"}
    assert asked["cache"][1] == {"cache_dir": "kept", "revision": "v2"}
    assert asked["hub"][1] == {"revision": "v2", "token": "hf_x", "timeout": 10}
    assert asked["AutoTokenizer"][1] == options
    assert asked["AutoModelForCausalLM"][1].items() >= (options | {"attn_implementation": "eager"}).items()


@pytest.mark.parametrize("name", ["modles/llama", "modles/llama/8b", "no such model"])
def test_a_name_of_nothing_is_refused_at_once(name, monkeypatch, tmp_path):
    def model_info(name, timeout, **options):
        raise ConnectionError("cannot be reached\nMore of it.")

    monkeypatch.setattr("memoir.sources.model_info", model_info)
    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=f"no such folder: {name}; as a hub id it cannot be loaded: [^\n]*$"):
        load_model(name)
    assert time.perf_counter() - began < 2
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="expected a transformers folder with a config"):
        load_model(name)
