"""Newer families keep the laws of the contract; mixtures of experts are edited in their dense blocks, or refused."""

from __future__ import annotations

import pytest
import test_contract
from families import NEWER, byte_tokenizer, small_model
from test_contract import EDITS, METHODS, edit, editor_for, with_edits
from test_run import answers_by_hand
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from memoir.editors import make_editor
from memoir.models import LanguageModel

LAWS_OF_THE_EDITED = (
    test_contract.test_a_batch_answers_as_its_members_do,
    test_contract.test_the_answer_does_not_enter_the_decision,
    test_contract.test_what_many_prompts_read_is_what_each_of_them_reads,
)
OFTEN = ("memoir", "rome", "grace")


@pytest.mark.parametrize("family", NEWER)
@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in OFTEN else pytest.mark.slow) for m in METHODS])
def test_newer_families_keep_the_laws(method, family):
    if method in test_contract.WITHOUT_WEIGHTS:
        pytest.skip(f"{method} touches no family's blocks")
    test_contract.test_an_edit_lowers_its_own_loss(method, small_model(family))
    editor = with_edits(method, small_model(family))
    test_contract.test_detached_it_leaves_the_model_as_it_was_bit_by_bit(editor, small_model(family))
    for law in LAWS_OF_THE_EDITED:
        law(editor)


@pytest.mark.parametrize("family", NEWER)
def test_a_newer_family_generates_and_its_edit_is_read_while_it_does(family):
    model = small_model(family)
    editor = editor_for("memoir", model, iterations=60)
    edit(editor, EDITS[:1])
    (answer,) = editor.free_answers(EDITS[:1])
    assert answer == answers_by_hand(model, EDITS[0].prompt, len(f" {EDITS[0].target}") + 4) != ""


def mixture(dense: list[int]) -> LanguageModel:
    """A small Qwen 3 of three blocks, of which these are dense."""
    settings = dict(hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=3, head_dim=8)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2)
    config = Qwen3MoeConfig(
        vocab_size=len(byte_tokenizer()), eos_token_id=2, mlp_only_layers=dense, **settings, **heads
    )
    return LanguageModel(AutoModelForCausalLM.from_config(config), byte_tokenizer(), "small-mixture")


def test_of_a_mixture_the_dense_blocks_are_edited_and_the_others_refused_by_name():
    model = mixture(dense=[0, 2])
    assert model.dense == [0, 2]
    with pytest.raises(ValueError, match=r"layer 1 of small-mixture is a mixture of experts.*dense blocks: 0, 2"):
        make_editor("ft", model, layer=1)
    for method in ("memoir", "ft", "grace", "memit"):  # without a layer, each takes dense ones
        editor = make_editor(method, model, background=test_contract.BACKGROUND)
        assert {site.layer for site in editor.patches} <= {0, 2}
    with pytest.raises(ValueError, match=r"small-mixture \(qwen3_moe\) is a mixture of exp.*a model with dense"):
        mixture(dense=[])


def test_a_family_that_is_nothing_but_mixtures_is_refused_as_what_it_is():
    config = MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    network = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"'mixtral' is a mixture of experts: several down-projections"):
        LanguageModel(network, byte_tokenizer())


def test_the_text_part_of_a_multimodal_model_is_edited():
    model = small_model("gemma3-multimodal")
    assert model.site(1).name == "model.language_model.layers.1.mlp.down_proj" and model.context_length == 128
