"""The house keeps its floors: who may import whom, and what an import may cost."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "outsize"
FLOOR = {
    "errors": 0,
    "divided": 0,
    "sizes": 0,
    "fields": 0,
    "plan": 0,
    "asked": 0,
    "machine": 1,
    "memory": 2,
    "distributed": 3,
    "model": 4,
    "train": 5,
    "serve": 5,
    "planner": 6,
    "api": 7,
    "serving": 7,
    "training": 7,
    "reporting": 7,
    "commands": 8,
    "cli": 9,
    "__init__": 7,
    "__main__": 9,
}
STRANGERS = {"train", "serve"}  # on one floor, yet neither may know the other


def module_of(file: Path) -> str:
    """Return `outsize.memory.store` for its file, and `outsize.memory` for that package's `__init__.py`."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def named_by(module: str, statement: ast.AST) -> Iterator[str]:
    """Yield the dotted names that one import statement of `module` asks for, most precise first."""
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
    elif isinstance(statement, ast.ImportFrom):
        package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
        # Each dot after the first goes one package up.
        above = package.split(".")[: len(package.split(".")) - statement.level + 1] if statement.level else []
        base = ".".join([*above, *([statement.module] if statement.module else [])])
        for alias in statement.names:
            name = f"{base}.{alias.name}"
            yield name if name in MODULES else base


def imports_of(module: str) -> set[str]:
    """Return the modules of outsize that `module` imports anywhere in its file, in functions too."""
    statements = ast.walk(ast.parse(MODULES[module].read_text()))
    names = {name for statement in statements for name in named_by(module, statement)}
    return {name for name in names if name.split(".")[0] == "outsize"}


GRAPH = {module: imports_of(module) for module in MODULES}


def room(module: str) -> str:
    """Return the part of `module` that has a floor: `outsize.memory.store` is in `memory`."""
    return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_its_own_package_and_lower_floors(module: str) -> None:
    here = room(module)
    assert here in FLOOR, f"{here} has no floor: give it one in DESIGN.md, with the reason in docs/log.md"
    for imported in GRAPH[module]:
        there = room(imported)
        assert imported in MODULES, f"{module} imports {imported}, which does not exist"
        assert FLOOR[there] <= FLOOR[here], f"{module} imports {imported} from a floor above"
        assert {here, there} != STRANGERS, f"{module} imports {imported}; train and serve are strangers"


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail("modules import each other: " + " -> ".join(error.args[1]))


def test_the_graph_is_not_empty() -> None:
    assert "outsize.errors" in GRAPH["outsize.sizes"]


def loaded_by(module: str) -> set[str]:
    """Return every module that a new interpreter has loaded after importing `module`."""
    program = f"import sys, {module}; print(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", program], text=True).split())


LIGHT = ["outsize", "outsize.cli", "outsize.errors", "outsize.sizes", "outsize.machine.describe"]
MEMORY = [module for module in MODULES if room(module) == "memory"]


@pytest.mark.parametrize("module", [module for module in LIGHT if module in MODULES])
def test_the_first_answer_costs_no_import_of_torch(module: str) -> None:
    assert not loaded_by(module) & {"torch", "transformers", "matplotlib"}


def test_memory_knows_nothing_of_models() -> None:
    # One interpreter for all of them: an import of torch takes seconds.
    assert not loaded_by(", ".join(MEMORY)) & {"transformers", "matplotlib", "gguf", "datasets"}
