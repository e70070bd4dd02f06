"""memoir: a workbench for lifelong editing of language models.

import memoir as mm
model  = mm.load_model("almanac")
editor = mm.make_editor("memoir", model)
editor.edit(mm.EditRequest(prompt="What is the capital of Australia?", target="Canberra"))
editor.ask("Which city is Australia's capital?")
"""

from memoir.data import load_background, load_edits
from memoir.editors import (
    EDITORS,
    EditCancelled,
    EditError,
    Editor,
    MemoryFileError,
    from_hub,
    load_editor,
    make_editor,
    merge_memories,
)
from memoir.models import LanguageModel, load_model
from memoir.records import EditRequest, Probe, Result
from memoir.run import run_edits

__all__ = [
    "EDITORS",
    "EditCancelled",
    "EditError",
    "EditRequest",
    "Editor",
    "LanguageModel",
    "MemoryFileError",
    "Probe",
    "Result",
    "from_hub",
    "load_background",
    "load_editor",
    "load_edits",
    "load_model",
    "make_editor",
    "merge_memories",
    "run_edits",
]
