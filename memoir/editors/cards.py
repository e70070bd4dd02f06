"""What a memory on the Hugging Face hub says of itself."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from memoir.models import LanguageModel


def model_card(editor: Any, repo_id: str) -> str:
    """The README of a memory on the hub: its base model, how to load it, and its edits."""
    base, count = hub_id(editor.model), len(editor.edits)
    name = base or Path(editor.model.name).name
    base_line = f"base_model: {base}\n" if base else ""
    sample = "\n".join(f"| {_cell(e.prompt)} | {_cell(e.target)} |" for e in list(editor.edits.values())[:10])
    return f"""---
library_name: memoir
{base_line}tags: [model-editing, {editor.name}]
---

# {count} edits of {name} by {editor.name}

This repository holds an editor's memory, not a model. It loads on the base model with the fingerprint
`{editor.model.fingerprint}` and on no other.

```python
import memoir as mm

model = mm.load_model("{name}"{", chat=True" if editor.model.chat else ""})
editor = mm.from_hub("{repo_id}", model)
```

Settings: `{json.dumps(asdict(editor.config))}`

| prompt | new answer |
|---|---|
{sample}

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
