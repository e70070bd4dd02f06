"""Models that accelerate spreads over memory and disk are edited as whole ones are."""

from __future__ import annotations

import pytest
import torch
from families import BACKGROUND

from memoir.editors import load_editor, make_editor
from memoir.models import load_model
from memoir.records import EditRequest

EDITS = [
    EditRequest(prompt="The tower of Ostrava stands in", target="Brno", subject="tower of Ostrava"),
    EditRequest(prompt="Ida Verne plays the", target="oboe", subject="Ida Verne"),
]
KEY_VALUE = dict(moments="background", where="prompt_last", prefixes=0, value_steps=5)
SETTINGS = {
    "memoir": dict(layer=2, k=16, feature="mean_centred", tau=0.6, prefixes=1, prefix_tokens=3, iterations=5),
    "ft": dict(layer=1, iterations=5),
    "memit": KEY_VALUE | dict(layers=(0, 1), moment_weight=0.1),
}
# Where each block's weights lie between calls: "meta" is on disk. GPT-2 has Conv1D layers, Gemma tied embeddings.
PLACES = {"llama": ["cpu", "meta", "meta"], "gpt2": ["meta"] * 3, "gemma": ["cpu", "meta", "meta"]}


@pytest.fixture(scope="module", params=PLACES)
def models(request, tiny_model, tmp_path_factory):
    """A model whole, and spread by `device_map="auto"` over too little memory and the disk."""
    folder = tiny_model(request.param)
    whole = load_model(folder, dtype="float32")
    size = sum(parameter.numel() * 4 for parameter in whole.network.parameters())
    split = load_model(
        folder,
        dtype="float32",
        device_map="auto",
        max_memory={"cpu": int(0.75 * size)},
        offload_folder=tmp_path_factory.mktemp("offload"),
    )
    return whole, split


@torch.no_grad()
def logits(model):
    return model.forward(model.encode([*(edit.prompt for edit in EDITS), "A prompt about nothing"]))


def test_blocks_lie_in_memory_and_on_disk(models):
    whole, split = models
    assert set(split.network.hf_device_map.values()) == {"cpu", "disk"} and split.device.type == "cpu"
    for layer, place in enumerate(PLACES[split.name.removeprefix("tiny-")]):
        site = split.site(layer)
        assert (site.module.weight.device.type, site.device.type) == (place, "cpu")
        if place == "cpu":
            assert torch.equal(site.weight, whole.site(layer).weight)
        else:
            with pytest.raises(RuntimeError, match=rf"weight of {site.name} is offloaded between calls"):
                site.weight  # noqa: B018


def test_a_fingerprint_is_that_of_the_weights_wherever_they_lie(models):
    whole, split = models
    logits(split)
    assert split.fingerprint == whole.fingerprint


@pytest.mark.parametrize("method", SETTINGS)
def test_an_edit_is_the_edit_of_the_whole_model(models, method, tmp_path):
    editors, before = [], logits(models[1])
    assert torch.equal(before, logits(models[0]))
    for model in models:
        editor = make_editor(method, model, background=BACKGROUND, **SETTINGS[method])
        reports = editor.edit(EDITS)
        assert all(report.loss_after < report.loss_before for report in reports)
        editors.append(editor)
    whole, split = editors
    assert whole.state().keys() == split.state().keys()
    for name, tensor in whole.state().items():
        torch.testing.assert_close(split.state()[name], tensor, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(models[1]), logits(models[0]), rtol=1e-5, atol=1e-5)
    assert split.ask(EDITS[0].prompt, max_new_tokens=4) == whole.ask(EDITS[0].prompt, max_new_tokens=4)

    edited = logits(models[1])
    load_editor(whole.save(tmp_path / "memory"), models[1])  # written on the whole model
    torch.testing.assert_close(logits(models[1]), edited, rtol=1e-5, atol=1e-5)
    for model in models:
        model.editor.detach()
    assert not torch.equal(edited, before) and torch.equal(logits(models[1]), before)
