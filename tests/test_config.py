"""Settings are checked and converted by the types of their fields, in one place, for every method."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memoir import __main__ as cli
from memoir.editors import EDITORS, make_config
from memoir.editors.config import settings_from
from memoir.editors.settings import settings_of

LITERALS = st.one_of(
    st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.none(), st.text()
)
# Values that no setting of this name takes, whatever the method, and what the message says was expected.
BAD = [
    ("seed", "abc", "a valid integer"),
    ("batch_size", 0, "greater than or equal to 1"),
    ("learn_stop", "maybe", "a valid boolean"),
    ("layer", "two", "a valid integer"),
    ("layer", -1, "greater than or equal to 0"),
    ("layers", (), "one or more blocks, ascending"),
    ("layers", (2, 1), "one or more blocks, ascending"),
    ("layers", (1, 1), "one or more blocks, ascending"),
    ("layers", (0.5,), "a valid integer"),
    ("k", 100.5, "a valid integer"),
    ("k", 0, "greater than or equal to 1"),
    ("tau", "0,5", "a valid number"),
    ("tau", 1.5, "less than or equal to 1"),
    ("threshold", -0.1, "greater than or equal to 0"),
    ("learning_rate", 0.0, "greater than 0"),
    ("learning_rate", 1e30, "less than or equal to 1000000"),
    ("learning_rate", float("nan"), "a finite number"),
    ("value_rate", float("inf"), "a finite number"),
    ("stop_loss", -1.0, "greater than or equal to 0"),
    ("scope_loss", -1.0, "greater than or equal to 0"),
    ("norm_limit", -1.0, "greater than or equal to 0"),
    ("iterations", 0, "greater than or equal to 1"),
    ("value_steps", 0, "greater than or equal to 1"),
    ("prefixes", -1, "greater than or equal to 0"),
    ("prefix_tokens", 0, "greater than or equal to 1"),
    ("moment_samples", 0, "greater than or equal to 1"),
    ("clamp", 0.0, "greater than 0"),
    ("ridge", 0.0, "greater than 0"),
    ("null_threshold", 0.0, "greater than 0"),
    ("moment_weight", 0.0, "greater than 0"),
    ("mask_ratio", 0.0, "greater than 0"),
    ("density", 1.5, "less than or equal to 1"),
    ("irrelevant", 0, "greater than or equal to 1"),
    ("radius", 0.0, "greater than 0"),
    ("random_mask", "maybe", "a valid boolean"),
    ("where", "subject", "'subject_last', 'prompt_last' or 'target'"),
    ("variant", "FT", "'FT-M' or 'FT-L'"),
    ("replace", "first", "'last', 'prompt' or 'onward'"),
    ("value_init", "hot", "'cold' or 'warm'"),
    ("margin_unit", "inch", "'absolute' or 'output'"),
    ("step_rule", "wild", "'constant' or 'relative'"),
    ("feature", "median", "'last'"),
]
TEXTS = [
    ("seed", "12", 12),
    ("batch_size", "2", 2),
    ("learn_stop", "false", False),
    ("learn_stop", "True", True),
    ("random_mask", "false", False),
    ("layer", "12", 12),
    ("layers", ["1", 2], (1, 2)),
    ("k", "12", 12),
    ("k", 12.0, 12),
    ("tau", "0.5", 0.5),
    ("learning_rate", "5e-4", 5e-4),
    ("clamp", 4, 4.0),
]


def smallest(method: str) -> dict:
    """A value for each setting that has no default."""
    known = {"layer": 1, "layers": (1,), "k": 4}
    return {name: value for name, value in known.items() if name in settings(method)}


def settings(method: str) -> set[str]:
    return {field.name for field in fields(EDITORS[method].Config)}


def cases(table):
    return [(method, *entry) for method in EDITORS for entry in table if entry[0] in settings(method)]


@pytest.mark.parametrize(("method", "name", "value", "expected"), cases(BAD))
def test_a_bad_value_is_one_line_with_setting_value_and_expectation(method, name, value, expected):
    with pytest.raises(ValueError, match=f"^{name} = ") as refused:
        make_config(method, smallest(method) | {name: value})
    message = str(refused.value)
    assert message.startswith(f"{name} = {value!r}, expected ") and expected in message and "\n" not in message


@pytest.mark.parametrize(("method", "name", "text", "value"), cases(TEXTS))
def test_texts_and_json_become_what_the_field_says(method, name, text, value):
    found = getattr(make_config(method, smallest(method) | {name: text}), name)
    assert found == value and type(found) is type(value)


def test_every_entry_of_the_tables_is_a_setting_of_some_method():
    assert {entry[0] for entry in BAD + TEXTS} <= set().union(*map(settings, EDITORS))


@pytest.mark.parametrize("method", EDITORS)
def test_a_config_is_what_its_own_values_make_again(method):
    """As when a memory file is loaded: no default is changed by its own check."""
    config = make_config(method, smallest(method))
    assert type(config)(**vars(config)) == config


@pytest.mark.parametrize("method", EDITORS)
def test_an_unknown_setting_is_named_with_those_there_are(method):
    with pytest.raises(TypeError, match=f"{method} has no setting knob; expected .*batch_size"):
        make_config(method, smallest(method) | {"knob": 1})


@pytest.mark.parametrize("method", EDITORS)
def test_every_setting_says_what_it_means(method, capsys):
    found = settings_of(EDITORS[method])
    assert [setting.name for setting in found] == [field.name for field in fields(EDITORS[method].Config)]
    assert all(len(setting.meaning.split()) > 1 for setting in found), [s.name for s in found if not s.meaning]
    assert cli.main(["settings", method]) == 0
    printed = capsys.readouterr().out
    assert all(f"{setting.name} = " in printed and setting.meaning in printed for setting in found)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), LITERALS))
def test_settings_read_python_literals(values):
    assert settings_from(f"{name}={value!r}" for name, value in values.items()) == values


def test_settings_read_the_rest_as_text():
    assert settings_from(["write=rls", "a=b=c", "path=/x y", "k = 12"]) == {
        "write": "rls",
        "a": "b=c",
        "path": "/x y",
        "k": 12,
    }


@pytest.mark.parametrize("pair", ["tau", "=1", "a b=1", ""])
def test_settings_refuse_what_is_no_pair(pair):
    with pytest.raises(ValueError, match="expected name=value"):
        settings_from([pair])
