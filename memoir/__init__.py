"""memoir: a workbench for lifelong editing of language models.

import memoir as mm
model  = mm.load_model("almanac")
editor = mm.make_editor("memoir", model)
editor.edit(mm.EditRequest(prompt="What is the capital of Australia?", target="Canberra"))
editor.ask("Which city is Australia's capital?")
"""

import lazy_loader

# What is not asked for is not imported: torch and transformers take seconds, which workers that only start notebooks
# do without. The names, for editors of code and people too, stand in __init__.pyi.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
