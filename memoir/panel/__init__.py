"""The edit-and-query panel: choose a model and a method, write edits, ask questions, and see what changed and why.

from memoir.panel import Panel
Panel("almanac", "memoir", loaded=10)
"""

from memoir.panel.widgets import Panel

__all__ = ["Panel"]
