"""What the panel shows, as HTML: `page` has the macros of panel.html, which escape every text they are given."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

FOLDER = Path(__file__).parent
CSS = (FOLDER / "panel.css").read_text(encoding="utf-8")
_environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
page = _environment.get_template("panel.html").module
