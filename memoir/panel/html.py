"""What the panel shows, as HTML: `page` has the macros of panel.html, which escape every text they are given."""

import difflib
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

FOLDER = Path(__file__).parent
CSS = (FOLDER / "panel.css").read_text(encoding="utf-8")
LEAVING = f"<script>{(FOLDER / 'leaving.js').read_text(encoding='utf-8')}</script>"


def marked(text: str, other: str) -> list[tuple[str, bool]]:
    """A text in pieces, with whether a piece is not in the other text; word by word."""
    words, others = re.findall(r"\S+|\s+", text), re.findall(r"\S+|\s+", other)
    pieces = difflib.SequenceMatcher(None, others, words, autojunk=False).get_opcodes()
    return [("".join(words[i:j]), tag != "equal") for tag, _, _, i, j in pieces if j > i]


_environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
_environment.globals["marked"] = marked
page = _environment.get_template("panel.html").module
