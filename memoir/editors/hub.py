"""A memory on the Hugging Face hub, and the model card that says what it is."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.utils import HFValidationError, validate_repo_id

from memoir.editors.storage import CARD, FILES
from memoir.models import LanguageModel


def push(editor: Any, repo_id: str, *, private: bool, token: str | None) -> str:
    """Upload an editor's memory and a model card; returns the repository's address."""
    api = huggingface_hub.HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = editor.save(Path(scratch) / "memory")
        (folder / CARD).write_text(model_card(editor, url.repo_id), encoding="utf-8")
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload memory")
    return str(url)


def pull(repo_id: str, *, revision: str | None, token: str | None) -> Path:
    """Download a memory's files; returns the local folder."""
    wanted = list(FILES)
    return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, token=token, allow_patterns=wanted))


def model_card(editor: Any, repo_id: str) -> str:
    """The README of a memory on the hub: its base model, how to load it, and its edits."""
    base, count = hub_id(editor.model), len(editor.edits)
    name = base or Path(editor.model.name).name
    base_line = f"base_model: {base}\n" if base else ""
    rows = [f"| {_cell(edit.prompt)} | {_cell(edit.target)} |\n" for edit in list(editor.edits.values())[:10]]
    return f"""---
library_name: memoir
{base_line}tags: [model-editing, {editor.name}]
---

# {count} edits of {name} by {editor.name}

This repository holds an editor's memory, not a model. It loads on the base model with the fingerprint
`{editor.model.fingerprint}` and on no other.

```python
import memoir as mm

model = mm.load_model("{name}", dtype="{editor.model.dtype_name}"{", chat=True" if editor.model.chat else ""})
editor = mm.from_hub("{repo_id}", model)
```

Settings: `{json.dumps(asdict(editor.config))}`

| prompt | new answer |
|---|---|
{"".join(rows)}
{"The first ten edits are shown; `edits.jsonl` holds all of them." if count > 10 else ""}
"""


def hub_id(model: LanguageModel) -> str | None:
    """The id under which the model was loaded from the Hugging Face hub. None for a local model: paths stay private."""
    given = model.network.config.name_or_path or ""
    try:
        validate_repo_id(given)
    except HFValidationError:
        return None
    return None if os.path.exists(given) else given


def _cell(text: str) -> str:
    """A text as one cell of a Markdown table."""
    return " ".join(text.replace("|", "∣").split())
