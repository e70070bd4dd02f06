"""Texts of our own that ship with the package: what users ask in general, and ordinary English prose."""

from importlib.resources import files


def background() -> list[str]:
    """Some 200 short texts about nothing in particular: questions, requests, statements and unfinished sentences.

    Half of them are questions, with many openings, so that a mean over their features is the mean over what users ask.
    None comes from a data set of edits. They are the default background of every model but the almanac's.
    """
    return _read("background.txt").splitlines()


def answered() -> list[str]:
    """A hundred questions, each with its answer behind it, as MEMOIR's release has them to centre features."""
    return _read("answered.txt").splitlines()


def passages() -> list[str]:
    """Thirteen passages of ordinary English, about 200 words each, whose perplexity shows what edits do to a model."""
    return [passage.strip() for passage in _read("passages.txt").split("\n\n")]


def _read(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")
