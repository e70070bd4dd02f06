"""Where a model is found under its name: one function per kind of place."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import model_info, try_to_load_from_cache


def locate(name: str) -> tuple[str, str]:
    """What `from_pretrained` loads for a name, a folder or a hub id, and how reports call the model.

    FileNotFoundError where nothing has that name.
    """
    return next(place for source in SOURCES if (place := source(name)))


def _almanac(name: str) -> tuple[str, str] | None:
    """The model that ships with the package."""
    if name != "almanac":
        return None
    from memoir.almanac import model_path

    return os.fspath(model_path()), name


def _folder(name: str) -> tuple[str, str] | None:
    """A transformers folder; FileNotFoundError where the name is a path but holds no model."""
    path = Path(name).expanduser()
    if not (path.is_dir() or path.is_absolute() or name.startswith((".", "~"))):
        return None
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"no model in {path}: expected a transformers folder with a config.json")
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


SOURCES = (_almanac, _folder, _hub)  # the first one that knows a name has it
