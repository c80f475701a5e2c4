"""A model as units: the parts that run at once, found by looking for a repeated block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import nn

from outsize.errors import ModelError
from outsize.model.route import Absent


@dataclass(frozen=True)
class Unit:
    """A part of a model that runs at once. `parameters` are (name in the model, parameter); a tied one stands in every
    unit that uses it, under its first name. `encloses`: other units run inside its forward."""

    name: str
    module: nn.Module
    parameters: tuple[tuple[str, nn.Parameter], ...]
    repeated: bool
    encloses: bool


def find_units(model: nn.Module, block_class: str | None = None) -> list[Unit]:
    """Cut a module into units, in the order of its definition: each repeated block, and each other outermost module that
    owns parameters of its own. One within which blocks run has those alone, and what is beside the blocks is cut on its own.

    Repeated blocks are the outermost lists (`ModuleList`, `Sequential`) of two or more modules of one class, or every
    outermost module of the class named `block_class`. Raises ModelError when there are none."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks = _named_blocks(model, block_class) if block_class else _repeated_blocks(model)
    if not blocks:
        raise ModelError(_nothing_repeats(model, block_class))
    units = []
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        repeated = path in blocks
        if not repeated and not any(True for _ in module.parameters(recurse=False)):
            continue
        encloses = not repeated and any(path == "" or block.startswith(path + ".") for block in blocks)
        if not encloses:
            inside = (*inside, path + ".")
        own = list(module.parameters(recurse=not encloses))
        if own:
            units.append(Unit(path, module, tuple((names[id(p)], p) for p in own), repeated, encloses))
    return units


def divide(unit: Unit, parts: Collection[str]) -> list[Unit]:
    """A repeated unit with what it uses for as long as it runs, and after it each of its modules that `parts` names, as they
    are called in it, with what that alone uses: parameters that lie in it and in no other module of the unit."""
    if not unit.repeated or not parts:
        return [unit]
    modules = dict(unit.module.named_modules())
    # Other objects than in the unit, perhaps, since they left the meta device; in the same order.
    left = dict(zip(map(id, unit.module.parameters()), unit.parameters, strict=True))
    found: list[Unit] = []
    for name in parts:
        if name in modules:
            inside = set(modules[name].modules())
            own = _owned(inside) - _owned(set(modules.values()) - inside)
            parameters = tuple(left.pop(key) for key in list(left) if key in own)
            found.append(Unit(f"{unit.name}.{name}", modules[name], parameters, False, False))
    return [replace(unit, parameters=tuple(left.values())), *found]


def _owned(modules: set[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}


def parts_of(units: Sequence[Unit], small: Collection[str]) -> tuple[str, ...]:
    """What repeated units can be divided into: each outermost module within one that owns parameters of its own, not all of
    them among the `small` ones. None, where that would leave a unit in one piece."""
    found: dict[str, None] = {}
    names = {id(p): name for unit in units for name, p in unit.parameters}
    for unit in (unit for unit in units if unit.repeated):
        inside: tuple[str, ...] = ()
        for path, module in unit.module.named_modules():
            if path and not path.startswith(inside) and any(True for _ in module.parameters(recurse=False)):
                inside = (*inside, path + ".")
                if any(names[id(parameter)] not in small for parameter in module.parameters()):
                    found[path] = None
    outermost = [name for name in found if not name.startswith(tuple(other + "." for other in found))]
    return tuple(outermost) if len(outermost) > 1 else ()


def called_parts(parts: Sequence[str], units: Sequence[Unit], called: Collection[str]) -> tuple[str, ...]:
    """Those that are `called` (by names in the model) in every repeated unit that has them: of one that is not, somebody else
    uses the weights, and would find nothing there."""
    repeated = [(unit.name, dict(unit.module.named_modules())) for unit in units if unit.repeated]
    return tuple(
        part for part in parts if all(f"{name}.{part}" in called for name, modules in repeated if part in modules)
    )


def _repeated_blocks(model: nn.Module) -> set[str]:
    found: set[str] = set()
    for path, module in model.named_modules():
        if path.startswith(tuple(block + "." for block in found)) or path in found:
            continue
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        children = [(name, child) for name, child in module.named_children() if not isinstance(child, Absent)]
        if len({type(child) for _, child in children}) == 1 and all(
            any(True for _ in c.parameters()) for _, c in children
        ):
            found.update(f"{path}.{name}" if path else name for name, _ in children)
    return found


def _named_blocks(model: nn.Module, block_class: str) -> set[str]:
    found: set[str] = set()
    for path, module in model.named_modules():
        if type(module).__name__ == block_class and not path.startswith(tuple(block + "." for block in found)):
            found.add(path)
    return found


def _nothing_repeats(model: nn.Module, block_class: str | None) -> str:
    counts = Counter(type(module).__name__ for module in model.modules() if any(True for _ in module.parameters()))
    classes = ", ".join(f"{name} ({count})" for name, count in counts.most_common(8))
    looked_for = f"No module of class {block_class!r}" if block_class else "No list of two or more blocks of one class"
    return f"{looked_for} in {type(model).__name__}. Name the class of the repeated block; it has: {classes}."


def describe_units(units: list[Unit]) -> str:
    """One line for people: '24 LlamaDecoderLayer (model.layers.0 ... model.layers.23), 3 other: model.embed_tokens, ...'."""
    parts = []
    repeated = [unit for unit in units if unit.repeated]
    for kind in dict.fromkeys(type(unit.module).__name__ for unit in repeated):
        same = [unit.name for unit in repeated if type(unit.module).__name__ == kind]
        parts.append(f"{len(same)} {kind} ({same[0]} ... {same[-1]})")
    others = [unit.name or "(the model itself)" for unit in units if not unit.repeated]
    if others:
        parts.append(f"{len(others)} other: {', '.join(others)}")
    return ", ".join(parts)
