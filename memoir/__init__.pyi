from .audits import audit
from .data import load_background, load_edits
from .editors import (
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
from .models import LanguageModel, load_model
from .records import EditRequest, Probe, Result
from .run import run_edits

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
    "audit",
    "from_hub",
    "load_background",
    "load_editor",
    "load_edits",
    "load_model",
    "make_editor",
    "merge_memories",
    "run_edits",
]
