"""Second moments against a plain sum over tokens, and a cache that is whole or refused."""

from __future__ import annotations

import json
import time

import pytest
import torch
from families import REQUESTS, small_model

from memoir import moments
from memoir.editors import load_editor, make_editor
from memoir.editors.ft import FT
from memoir.moments import CacheError, available, reachable, sampled_texts, second_moments, texts_of
from memoir.records import BadInput, EditRequest
from memoir.run import run_edits
from memoir.sites import watching

TEXTS = ["A river runs to the sea.", "Two plus two", "", "The weather is mild today, they say.", "Zinc"]


@pytest.fixture
def model():
    return small_model("llama")


def plain(model, layer, texts):
    """E[k kᵀ] in float64, text by text, token by token."""
    site, total, count = model.site(layer), 0, 0
    for text in texts:
        if text:
            with watching(site) as seen, torch.no_grad():
                model.network(torch.tensor([model.tokenizer(text)["input_ids"]]))
            for key in seen[0][0][0].double():
                total, count = total + torch.outer(key, key), count + 1
    return total / count


def cached_file(home):
    (path,) = (home / "moments").iterdir()
    return path


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_a_plain_sum_over_tokens(family, batch_size):
    model = small_model(family)
    found = second_moments(model, model.site(1), TEXTS, progress=False, batch_size=batch_size)
    torch.testing.assert_close(found.double(), plain(model, 1, TEXTS), rtol=1e-4, atol=1e-6)


def test_takes_the_first_samples_and_cuts_at_the_context(model):
    site = model.site(0)
    found = second_moments(model, site, TEXTS, samples=2, progress=False)
    torch.testing.assert_close(found.double(), plain(model, 0, TEXTS[:2]), rtol=1e-4, atol=1e-6)
    long = "abcdefghij" * 20
    found = second_moments(model, site, [long], progress=False)
    torch.testing.assert_close(found.double(), plain(model, 0, [long[: model.context_length]]), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="no text"):
        second_moments(model, site, ["", " "], progress=False)


def test_measures_the_unedited_model_and_leaves_the_editor_attached(model):
    site = model.site(1)
    before = second_moments(model, site, TEXTS, progress=False)
    editor = FT(model, FT.Config(layer=0, learning_rate=0.1, iterations=3))
    editor.edit(EditRequest(prompt="Zinc is", target="odd"))
    assert torch.equal(second_moments(model, site, TEXTS, progress=False), before)
    assert model.editor is editor


def test_is_measured_once_and_read_back_bit_by_bit(model, home):
    first = second_moments(model, model.site(1), TEXTS, name="rivers", samples=4, progress=False)
    again = second_moments(model, model.site(1), iter(()), name="rivers", samples=4, progress=False)  # without texts
    assert torch.equal(first, again)
    assert cached_file(home).suffix == ".safetensors"


def test_another_model_site_dataset_or_sample_count_is_another_entry(home, tmp_path):
    model, other = small_model("llama"), small_model("llama", seed=1)
    rivers = tmp_path / "rivers.txt"
    rivers.write_text("A river runs.\n")
    calls = [
        (model, 0, "rivers", 2),
        (model, 1, "rivers", 2),
        (other, 0, "rivers", 2),
        (model, 0, "seas", 2),
        (model, 0, "rivers", 3),
        (model, 0, str(rivers), 2),
    ]
    for m, layer, name, samples in calls:
        found = second_moments(m, m.site(layer), TEXTS, name=name, samples=samples, progress=False)
        torch.testing.assert_close(
            found.double(), plain(m, layer, TEXTS[: samples + (samples > 2)]), rtol=1e-4, atol=1e-6
        )
    rivers.write_text("A river runs to the sea.\n")  # another file under the same name
    second_moments(model, model.site(0), TEXTS, name=str(rivers), samples=2, progress=False)
    assert len(list((home / "moments").iterdir())) == len(calls) + 1


@pytest.mark.parametrize("damage", ["byte", "torn", "empty"])
def test_a_damaged_file_is_refused_by_name(model, home, damage):
    second_moments(model, model.site(1), TEXTS, name="rivers", progress=False)
    path = cached_file(home)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes({"byte": bytes(data), "torn": data[: len(data) // 2], "empty": b""}[damage])
    with pytest.raises(CacheError, match=path.name):
        second_moments(model, model.site(1), TEXTS, name="rivers", progress=False)


def test_a_file_of_something_else_is_refused(model, home):
    second_moments(model, model.site(1), TEXTS, name="rivers", progress=False)
    path = cached_file(home)
    second_moments(model, model.site(0), TEXTS, name="rivers", progress=False)
    (other,) = set((home / "moments").iterdir()) - {path}
    other.rename(path)
    with pytest.raises(CacheError, match="site"):
        second_moments(model, model.site(1), TEXTS, name="rivers", progress=False)


def test_an_interrupted_measurement_leaves_no_file_and_a_whole_model(model, home):
    def stop():
        raise KeyboardInterrupt

    before = model.forward(model.encode(["Zinc is"]))
    with pytest.raises(KeyboardInterrupt):
        second_moments(model, model.site(1), TEXTS, name="rivers", progress=False, check=stop)
    assert not home.exists() or not list(home.rglob("*.*"))
    second_moments(model, model.site(1), TEXTS, progress=False)
    assert torch.equal(model.forward(model.encode(["Zinc is"])), before)


def test_texts_of_local_files(tmp_path):
    text, lines = tmp_path / "rivers.txt", tmp_path / "rivers.jsonl"
    text.write_text("A river runs.\nTo the sea.\nAnd back.\n")
    lines.write_text("".join(json.dumps({"id": i, "text": f"River {i}"}) + "\n" for i in range(3)))
    assert list(texts_of(str(text), 2)) == ["A river runs.", "To the sea."]
    assert list(texts_of(str(lines), 10)) == ["River 0", "River 1", "River 2"]
    lines.write_text(json.dumps({"id": 0, "passage": "River"}) + "\n")
    with pytest.raises(ValueError, match=r"rivers.jsonl has columns id, passage"):
        list(texts_of(str(lines), 10))
    with pytest.raises(BadInput, match="rivers2"):
        list(texts_of(str(tmp_path / "rivers2.txt"), 10))
    (tmp_path / "rivers.doc").write_text("x")
    with pytest.raises(BadInput, match=r"rivers\.doc"):
        list(texts_of(str(tmp_path / "rivers.doc"), 10))


def test_texts_of_the_almanac():
    texts = list(texts_of("almanac", 50))
    assert len(texts) == len(set(texts)) == 50
    assert texts == list(texts_of("almanac", 50))


# Which texts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(moments, "reachable", lambda dataset: False)


def test_wikipedia_where_it_can_be_reached(model, monkeypatch):
    monkeypatch.setattr(moments, "reachable", lambda dataset: dataset == moments.WIKIPEDIA)
    assert available(model, [model.site(0)], 500) == ("wikimedia/wikipedia:20231101.en", 500)


def test_else_twenty_tokens_of_its_own_for_each_dimension(model, offline):
    sites = [model.site(0), model.site(1)]  # D = 64
    assert available(model, sites, 100_000) == ("sampled", 10)
    assert available(model, sites, 3) == ("sampled", 3)


def test_moments_of_wikipedia_that_are_measured_need_no_connection(model, offline):
    sites = [model.site(0), model.site(1)]
    for site, expected in zip(sites, ("sampled", "wikimedia/wikipedia:20231101.en"), strict=True):
        second_moments(model, site, TEXTS, name=moments.WIKIPEDIA, samples=4, progress=False)
        assert available(model, sites, 4)[0] == expected


@pytest.mark.parametrize("hub", ["silent", "refusing", "offline"])
def test_a_hub_that_does_not_answer_costs_seconds_only(monkeypatch, hub):
    def ask(dataset, timeout):
        if hub == "silent":
            time.sleep(30)
        raise ConnectionError(hub)

    if hub == "offline":  # what HF_HUB_OFFLINE=1 sets
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(moments, "dataset_info", ask)
    monkeypatch.setattr(moments, "PATIENCE", 0.2)
    began = time.perf_counter()
    assert reachable.__wrapped__(moments.WIKIPEDIA) is False
    assert time.perf_counter() - began < 5


def test_sampled_texts_are_seeded_and_sampled_once(model, home, monkeypatch):
    torch.manual_seed(5)
    texts = list(sampled_texts(model, 3, progress=False))
    assert len(set(texts)) == 3 and min(map(len, texts)) > 20
    (path,) = (home / "texts").glob("*.json")
    path.unlink()
    torch.manual_seed(6)
    assert list(sampled_texts(model, 3, progress=False)) == texts
    monkeypatch.setattr(type(model), "sample", None)
    assert list(sampled_texts(model, 3, progress=False)) == texts


def test_sampled_texts_are_the_unedited_models(model, home):
    texts = list(sampled_texts(model, 2, progress=False))
    (path,) = (home / "texts").glob("*.json")
    path.unlink()
    editor = FT(model, FT.Config(layer=0, learning_rate=0.1, iterations=3))
    editor.edit(EditRequest(prompt="Zinc is", target="odd"))
    assert list(sampled_texts(model, 2, progress=False)) == texts
    assert model.editor is editor


def test_interrupted_sampling_leaves_no_file(model, home):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(sampled_texts(model, 2, progress=False, check=stop))
    assert not list(home.rglob("*.json"))


@pytest.mark.parametrize("method", ["rome", "memit", "alphaedit", "rlsedit"])
def test_by_default_a_method_takes_what_is_there_and_its_result_says_which(method, model, offline, home, tmp_path):
    editor = make_editor(method, model, where="prompt_last", prefixes=0, value_steps=2, moment_samples=4)
    assert editor.config.moments == "sampled" and editor.config.moment_samples == 4
    site = editor.sites[0]
    texts = sampled_texts(model, 4, progress=False)
    assert torch.equal(editor.moment(site), second_moments(model, site, texts, samples=4, progress=False))
    result = run_edits(editor, REQUESTS[:1], progress=False)
    assert result.info.config["moments"] == "sampled"
    folder = editor.save(tmp_path / "memory")
    assert load_editor(folder, model).config == editor.config
