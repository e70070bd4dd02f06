"""The embedded default: an invented world, a small model that knows it, and edits to try on both."""

from .edits import background_prompts, corpus, edit_requests, model_path
from .world import Fact, World

__all__ = ["Fact", "World", "background_prompts", "corpus", "edit_requests", "model_path"]
