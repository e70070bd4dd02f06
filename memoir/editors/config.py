"""Settings whose values are checked by the types of their fields, in this one place.

A method's `Config` is a frozen dataclass. Its annotations say which values a setting takes:

    k: Count              # a whole number, at least 1
    tau: Share            # 0 to 1
    write: Literal["sgd", "rls"]

Python callers, `--set name=value` and notebook parameters all end here, so "false" is False wherever a bool is wanted.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

_FINITE = ConfigDict(allow_inf_nan=False)


def _ascending(layers: tuple[int, ...]) -> tuple[int, ...]:
    if not layers or any(a >= b for a, b in pairwise(layers)):
        raise ValueError("one or more blocks, ascending")
    return layers


Count = Annotated[int, Field(ge=1)]  # a whole number, at least 1
Natural = Annotated[int, Field(ge=0)]  # a whole number, 0 included
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, le=1)]  # 0 to 1
PositiveShare = Annotated[float, Field(gt=0, le=1)]  # 0 to 1, 0 excluded
Rate = Annotated[float, Field(gt=0, le=1e6)]  # a step size; beyond 1e6 no optimiser stays finite
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Layer = Annotated[int, Field(ge=0)]  # a block of the model, counted from 0
Layers = Annotated[tuple[Layer, ...], AfterValidator(_ascending)]  # several blocks, ascending


@dataclass(frozen=True, kw_only=True)
class EditorConfig:
    """Settings that every method has."""

    seed: Seed = 0  # of everything the method draws at random
    batch_size: Count = 1  # edits written together; the papers' lifelong setting is 1
    learn_stop: bool = True  # also learn the token that ends an answer, so that generation stops behind the target

    def __post_init__(self) -> None:
        """Convert each value to its field's type; ValueError names the setting, its value and what was expected."""
        for field in fields(self):
            object.__setattr__(self, field.name, _converted(type(self), field.name, getattr(self, field.name)))


def check_values(config: type[EditorConfig], settings: Mapping[str, Any]) -> None:
    """Check some settings alone, before there is a model that gives the others. ValueError as from the Config."""
    for name, value in settings.items():
        _converted(config, name, value)


def settings_from(pairs: Iterable[str]) -> dict[str, Any]:
    """Settings of `name=value` pairs. A value that reads as a Python literal is one; any other value is text."""
    settings = {}
    for pair in pairs:
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not name.isidentifier():
            raise ValueError(f"{pair!r} is no setting, expected name=value")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings


def _converted(config: type[EditorConfig], name: str, value: Any) -> Any:
    try:
        return _adapters(config)[name].validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{name} = {value!r}, expected {_expected(error)}") from None


@cache
def _adapters(config: type[EditorConfig]) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(config, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name], config=_FINITE) for field in fields(config)}


def _expected(error: ValidationError) -> str:
    """What pydantic wanted, without its "Input should be"."""
    problem = error.errors()[0]
    return problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
