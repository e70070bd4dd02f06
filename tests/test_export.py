"""Out again: an edited model as a plain checkpoint, and a memory on the same weights in another dtype."""

from __future__ import annotations

import json

import pytest
import torch
from families import small_model
from test_contract import EDITS, METHODS, QUERIES, edit, editor_for, logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from memoir import __main__ as cli
from memoir.editors import EDITORS, MemoryFileError, load_editor
from memoir.editors.export import ExportError
from memoir.models import load_model

FOLDED = ("ft", "rome", "memit", "alphaedit", "ultraedit", "rlsedit")
FOUR = ("llama", "gpt2", "gptj", "gemma3")


def asked(model):
    """(n × V) the model's logits at every token of the queries; padding has none that mean anything."""
    return logits(model)[model.encode(QUERIES).attention_mask]


def plain_logits(folder, model):
    """Logits of a checkpoint, loaded with transformers alone, at the tokens that our model reads."""
    tokenizer, plain = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    batch = model.encode(QUERIES)
    assert tokenizer(QUERIES[0])["input_ids"] == model.tokenizer(QUERIES[0])["input_ids"]
    with torch.no_grad():
        found = plain(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), position_ids=batch.position_ids
        ).logits
    assert found.dtype == plain.dtype
    return found[batch.attention_mask], plain


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize("method", FOLDED)
def test_a_folded_checkpoint_answers_as_the_edited_model(method, family, tmp_path):
    model = small_model(family)
    fresh, before = asked(model), {name: value.clone() for name, value in model.network.state_dict().items()}
    fingerprint = model.fingerprint
    editor = editor_for(method, model)
    edit(editor, EDITS)
    written = editor.export(tmp_path / "folded")
    found, plain = plain_logits(tmp_path / "folded", model)
    expected = asked(model)
    assert (expected - fresh).norm() > 1e-2 * fresh.norm()  # there is something to fold
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (written.dtype, written.edits, plain.dtype) == ("float32", 3, torch.float32) and 0 <= written.rounding < 1e-5
    after = model.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    del model.fingerprint
    assert model.fingerprint == fingerprint  # the model itself is as it was, its configuration included


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rounding_is_measured_and_told(family, tmp_path):
    """In bfloat16 a weight is W0 + ΔW to eight bits, whatever ΔW was."""
    model = small_model(family)
    model.network.to(torch.bfloat16)
    editor = editor_for("ft", model)
    edit(editor, EDITS)
    written = editor.export(tmp_path / "folded")
    found, plain = plain_logits(tmp_path / "folded", model)
    site, delta = editor.site, editor.patch.delta
    stored = dict(plain.named_parameters())[f"{site.name}.weight"].float()
    stored = stored if stored.shape == delta.shape else stored.T
    stored, exact = stored.detach(), site.weight.float() + delta
    assert torch.equal(stored, exact.bfloat16().float())
    assert written.rounding == pytest.approx(float((stored - exact).norm() / delta.norm()), rel=1e-3)
    assert written.dtype == "bfloat16" and written.rounding > 1e-3
    expected = asked(model).float()
    assert (found.float() - expected).norm() < 5e-2 * expected.norm()


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(FOLDED)))
def test_other_methods_say_why_they_do_not_fold_and_what_to_do(method, tmp_path):
    editor = editor_for(method, small_model("llama"))
    why = "decides for each prompt" if EDITORS[method].changes_model else "changes no weights"
    with pytest.raises(ExportError, match=rf"{why}.*editor.save\(folder\), and later mm.load_editor\(folder, model\)"):
        editor.export(tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_a_checkpoint_replaces_nothing_and_is_whole_or_absent(tmp_path, monkeypatch):
    editor = editor_for("ft", small_model("llama"))
    edit(editor, EDITS[:1])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "novel.txt").write_text("Chapter one")
    with pytest.raises(FileExistsError, match="full exists already, expected a new or empty folder"):
        editor.export(tmp_path / "full")
    monkeypatch.setattr(editor.model.tokenizer, "save_pretrained", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        editor.export(tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize(("written", "read"), [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("method", METHODS)
def test_a_memory_loads_on_the_same_weights_in_another_dtype_where_that_is_allowed(method, written, read, tmp_path):
    models = {}
    for dtype in ("float32", "bfloat16"):
        models[dtype] = small_model("llama")
        models[dtype].network.bfloat16().to(getattr(torch, dtype))
    editor = editor_for(method, models[written])
    edit(editor, EDITS)
    editor.save(tmp_path / "memory")
    told = rf"in {written}; this is the same model in {read}: load it with dtype='{written}', or .*allow_dtype=True"
    with pytest.raises(MemoryFileError, match=told):
        load_editor(tmp_path / "memory", models[read])
    loaded = load_editor(tmp_path / "memory", models[read], allow_dtype=True)
    assert loaded.edits == editor.edits
    expected, found = logits(models[written]).float(), logits(models[read]).float()
    assert (found - expected).norm() < 5e-2 * expected.norm()
    if editor.routes:
        prompts = [e.prompt for e in EDITS]
        assert loaded.matches(prompts) == editor.matches(prompts) == list(editor.edits)
    other = small_model("llama", seed=1)
    with pytest.raises(MemoryFileError, match=r"was written on small-llama \(.*…, .*float.*\); this model is"):
        load_editor(tmp_path / "memory", other, allow_dtype=True)


def test_weights_that_are_finer_in_the_file_than_the_model_agree_once_rounded(tmp_path):
    """The memory was written on float32 weights that bfloat16 cannot hold."""
    whole, half = small_model("llama"), small_model("llama")
    half.network.half()
    editor = editor_for("ft", whole)
    edit(editor, EDITS[:1])
    assert load_editor(editor.save(tmp_path / "memory"), half, allow_dtype=True).edits == editor.edits
    bfloat = small_model("llama")
    bfloat.network.bfloat16()
    half.editor.save(tmp_path / "half")
    with pytest.raises(MemoryFileError, match=r"\(.*…, float16\); this model is small-llama \(.*…, bfloat16\)"):
        load_editor(tmp_path / "half", bfloat, allow_dtype=True)  # neither holds the other's values


def test_the_command_writes_a_checkpoint_in_the_dtype_asked_for(tiny_model, tmp_path, capsys):
    folder = str(tiny_model("llama"))
    editor = editor_for("rome", load_model(folder, dtype="float32"))
    edit(editor, EDITS[:1])
    editor.save(tmp_path / "memory")
    command = ["export", "--memory", str(tmp_path / "memory"), "--model", folder, "--dtype"]
    for dtype in ("float32", "bfloat16"):
        assert cli.main([*command, dtype, "--out", str(tmp_path / dtype)]) == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (told["dtype"], told["edits"], told["folder"]) == (dtype, 1, str(tmp_path / dtype))
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / dtype)
        assert str(plain.dtype) == f"torch.{dtype}" and 0 <= told["rounding"] < 1
    assert cli.main([*command, "float32", "--out", str(tmp_path / "float32")]) == 2
    assert "exists already" in capsys.readouterr().err
    routed = editor_for("grace", load_model(folder))
    routed.save(tmp_path / "routed")
    command[2] = str(tmp_path / "routed")
    assert cli.main([*command, "float32", "--out", str(tmp_path / "no")]) == 2
    assert "decides for each prompt" in capsys.readouterr().err
