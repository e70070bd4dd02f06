"""Quantised hosts: bitsandbytes' keep the laws of the contract, and a projection that cannot be edited is refused."""

from __future__ import annotations

import importlib.util

import pytest
import test_contract
import torch
from families import CONFIGS, byte_tokenizer, network, small_model
from test_contract import METHODS, WITHOUT_WEIGHTS, editor_for, logits, with_edits
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from memoir.editors import load_editor
from memoir.models import LanguageModel, load_model
from memoir.records import BadInput
from memoir.text import Batch


class PackedLinear(nn.Module):
    """Stands for the projections of quantisers that keep no `weight`."""

    def __init__(self, whole: nn.Linear):
        super().__init__()
        self.whole = [whole]

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return self.whole[0](a)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in WITHOUT_WEIGHTS])
def test_a_projection_of_an_unknown_kind_is_refused_by_its_class(method):
    packed = network("llama")
    for block in packed.model.layers:
        block.mlp.down_proj = PackedLinear(block.mlp.down_proj)
    model = LanguageModel(packed, byte_tokenizer(), "packed")
    expected = logits(small_model("llama"))
    with pytest.raises(BadInput, match=r"mlp\.down_proj of layer \d of packed is a PackedLinear, expected nn\.Linear"):
        editor_for(method, model)
    assert torch.equal(logits(model), expected)


@pytest.fixture(params=["load_in_8bit", "load_in_4bit"])
def quantised(request, tmp_path):
    """Loads a small Llama, wide enough for bitsandbytes' blocks of 64 weights."""
    if not importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    settings = CONFIGS["llama"][1] | dict(hidden_size=128, intermediate_size=256, eos_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=259, **settings)).save_pretrained(tmp_path / "wide")
    byte_tokenizer().save_pretrained(tmp_path / "wide")
    how = BitsAndBytesConfig(**{request.param: True}, bnb_4bit_compute_dtype=torch.float32)
    return lambda: load_model(tmp_path / "wide", quantization_config=how)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("method", METHODS)
def test_bitsandbytes_hosts_keep_the_laws(quantised, method, tmp_path):
    """In 8 bits bitsandbytes rounds the prompts of a batch together, so a batch need not answer as its members do."""
    if method not in WITHOUT_WEIGHTS:
        test_contract.test_an_edit_lowers_its_own_loss(method, quantised())
    editor = with_edits(method, quantised())
    test_contract.test_detached_it_leaves_the_model_as_it_was_bit_by_bit(editor, quantised())
    expected = logits(editor.model)
    editor.save(tmp_path / "memory")
    assert torch.equal(logits(load_editor(tmp_path / "memory", quantised()).model), expected)


@pytest.mark.parametrize("quantised", ["load_in_4bit"], indirect=True)  # 8 bits round the activations as well
def test_gradients_pass_through_bitsandbytes_weights(quantised):
    """Against finite differences of what is added to the output of a site."""
    model = quantised()
    batch: Batch = model.encode(["Ida plays the"], ["oboe"])
    tail = model.tail(model.site(1), batch)
    at = batch.counted.flatten().nonzero()[:, 0]
    change = torch.zeros(len(at), 128, requires_grad=True)
    loss = lambda change: batch.losses(tail.logits(change, at, at)).sum()  # noqa: E731
    loss(change).backward()
    way, rate = change.grad / change.grad.norm(), 0.02
    with torch.no_grad():
        rise = (loss(rate * way) - loss(-rate * way)) / (2 * rate)
    assert float(rise) == pytest.approx(float(change.grad.norm()), rel=0.2)
