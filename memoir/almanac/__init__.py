"""The built-in example: an invented world, a small model that knows this world, and edits to try on the model."""

from .atlas import atlas_edits
from .edits import background_prompts, corpus, edit_requests, model_path, passages
from .world import Fact, World

__all__ = ["Fact", "World", "atlas_edits", "background_prompts", "corpus", "edit_requests", "model_path", "passages"]
