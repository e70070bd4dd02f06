"""Where a model is found under its name: one function per kind of place."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import model_info, try_to_load_from_cache

from memoir.weights import NAMED, dequantised, installed, source_of


def locate(name: str) -> tuple[str, str]:
    """What `from_pretrained` loads for a name, a file, a folder or a hub id, and how reports call the model.

    FileNotFoundError where nothing has that name.
    """
    return next(place for source in SOURCES if (place := source(name)))


def origin(path: str, revision: str | None) -> dict[str, str] | None:
    """Where a model's weights come from, for reports: the GGUF file that they were in, or their revision on the hub.
    None for a folder, whose path stays private."""
    return {"hub_id": path, "revision": revision} if revision else source_of(Path(path))


def _almanac(name: str) -> tuple[str, str] | None:
    """The model that ships with the package."""
    if name != "almanac":
        return None
    from memoir.almanac import model_path

    return os.fspath(model_path()), name


def _named(name: str) -> tuple[str, str] | None:
    """A small real model, from its package or else from the hub; FileNotFoundError says how to install it."""
    if name not in NAMED:
        return None
    if (file := installed(name)) is not None:
        return os.fspath(dequantised(file)), name
    try:
        return _hub(NAMED[name].hub_id)[0], name
    except FileNotFoundError:
        raise FileNotFoundError(
            f"the weights of {name} are not installed, and the hub's {NAMED[name].hub_id} cannot be loaded; "
            f"`{NAMED[name].install}` installs them"
        ) from None


def _gguf(name: str) -> tuple[str, str] | None:
    """A GGUF file."""
    path = Path(name).expanduser()
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return os.fspath(dequantised(path)), path.stem


def _folder(name: str) -> tuple[str, str] | None:
    """A transformers folder; FileNotFoundError where the name is a path but holds no model."""
    path = Path(name).expanduser()
    if not (path.is_dir() or path.is_absolute() or name.startswith((".", "~"))):
        return None
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"no model in {path}: expected a transformers folder with a config.json, or the path of a .gguf file"
        )
    return os.fspath(path), path.resolve().name


def _hub(name: str) -> tuple[str, str]:
    """A model of the Hugging Face hub; FileNotFoundError where neither the hub's cache nor the hub has one."""
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            model_info(name, timeout=10)
    except Exception as error:  # no connection, no such model, no permission, or no possible id
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"no such folder: {name}; as a hub id it cannot be loaded: {reason}") from None
    return name, Path(name).name


SOURCES = (_almanac, _named, _gguf, _folder, _hub)  # the first one that knows a name has it
