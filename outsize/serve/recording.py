"""A model's forward as the straight list of calls that it makes: what a step runs when no weight streams.

Python's part of a small model's step (modules, their keyword arguments, shapes) takes as long as its arithmetic. The calls
are written down while the unchanged module runs, with few tokens, some, and as many as a step can have. All runs must make
the same calls, in the same order, to the same results; numbers that differ must follow from the numbers of tokens, the same
way every time; nothing may look at values or have a size that depends on them. A last run compares the program's numbers
with the module's. Where any of that does not hold, the module keeps running itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

Inputs = dict[str, Any]
Forward = Callable[..., torch.Tensor]
NOT_REPEATED = {
    "__get__",
    "size",
    "dim",
    "numel",
    "stride",
    "__len__",
    "is_floating_point",
    "is_contiguous",
    "ndimension",
}
NOT_REPEATED |= {"_set_grad_enabled"}  # a step has no gradients
SHAPED_BY_VALUES = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "one_hot"}
SHAPED_BY_ARGUMENTS = {"repeat_interleave": 1, "tensor_split": 1, "arange": 0, "linspace": 0}  # by more tensors


class NotAlike(Exception):
    """The calls depend on more than the numbers of tokens."""


@dataclass(frozen=True)
class Register:
    """A tensor that an earlier call gave, or an input by its name."""

    name: str


@dataclass(frozen=True)
class Call:
    """`results`: of one tensor, or of a tuple of them."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[str, ...]
    single: bool


class Recorder(TorchFunctionMode):
    """Writes down what is called within it. Raises NotAlike for a call that looks at values."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._inputs = {id(value): name for name, value in inputs.items()}
        self._names = WeakTensorKeyDictionary()  # tensors that are gone cost nothing, and no other is taken for them
        self._count = 0

    def name_of(self, value: Any) -> str | None:
        named = value in self._names if isinstance(value, torch.Tensor) else False
        return self._names[value] if named else self._inputs.get(id(value))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, named = self._registers(args), self._registers(kwargs or {})
        found = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if _is_tensors(found) and not _shaped_by_values(name, args, kwargs or {}):
            tensors = (found,) if isinstance(found, torch.Tensor) else tuple(found)
            results = tuple(f"r{self._count + number}" for number in range(len(tensors)))
            self.calls.append(Call(func, given, named, results, isinstance(found, torch.Tensor)))
            self._count += len(tensors)
            self._names.update(zip(tensors, results, strict=True))
        elif name == "__setitem__":
            self.calls.append(Call(func, given, named, (), False))
        elif name not in NOT_REPEATED:
            raise NotAlike(name)
        return found

    def _registers(self, value: Any) -> Any:
        """With registers in place of tensors that are known; others are the model's own."""
        if (name := self.name_of(value)) is not None:
            return Register(name)
        if isinstance(value, dict):
            return {key: self._registers(part) for key, part in value.items()}
        if isinstance(value, tuple | list):
            return (list if isinstance(value, list) else tuple)(self._registers(part) for part in value)
        if isinstance(value, slice):
            return slice(*map(self._registers, (value.start, value.stop, value.step)))
        return value


def _is_tensors(found: Any) -> bool:
    several = isinstance(found, tuple | list) and len(found) > 0 and all(isinstance(t, torch.Tensor) for t in found)
    return several or isinstance(found, torch.Tensor)


def _shaped_by_values(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """What comes out is as large as some values say."""
    if name == "__getitem__":
        parts = args[1] if isinstance(args[1], tuple) else args[1:]
        bounds = [bound for part in parts if isinstance(part, slice) for bound in (part.start, part.stop, part.step)]
        masked = any(isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8) for part in parts)
        return masked or _tensors_in(bounds) > 0
    given = [*args, *kwargs.values()]
    if name == "where":
        return len(given) == 1
    return name in SHAPED_BY_VALUES or _tensors_in(given) > SHAPED_BY_ARGUMENTS.get(name, len(given))


def _tensors_in(values: Sequence[Any]) -> int:
    return sum(isinstance(value, torch.Tensor) for value in values)


def record(forward: Forward, trials: Sequence[Inputs], sizes: Callable[[Inputs], tuple[int, ...]]) -> Forward | None:
    """`forward` as a function of the same keyword arguments, or None when its calls are not always the same. The last of
    `trials` only compares both. `sizes` gives the numbers that calls may depend on."""
    written: list[list[Call]] = []
    lasts: set[str | None] = set()
    try:
        for inputs in trials[:-1]:
            with Recorder(inputs) as recorder:
                lasts.add(recorder.name_of(forward(**inputs)))
            written.append(recorder.calls)
        (last,) = lasts if len(lasts) == 1 else (None,)
        if last is None:
            raise NotAlike("what comes out")
        program = _Writer([sizes(inputs) for inputs in trials[:-1]]).write(written, list(trials[0]), last, sizes)
    except NotAlike:
        return None
    return program if torch.equal(program(**trials[-1]), forward(**trials[-1])) else None


class _Writer:
    """Writes calls that were made with several `sizes` as one function."""

    def __init__(self, sizes: list[tuple[int, ...]]) -> None:
        self._sizes = sizes
        self._constants: dict[str, Any] = {}
        self._by_identity: dict[int, str] = {}

    def write(
        self, written: list[list[Call]], inputs: list[str], last: str, sizes: Callable[[Inputs], tuple[int, ...]]
    ) -> Forward:
        if len({len(calls) for calls in written}) != 1:
            raise NotAlike("more calls")
        lines = [self._line(calls) for calls in zip(*written, strict=True)]
        names = [f"n{number}" for number in range(len(self._sizes[0]))]
        head = f"    {', '.join(names)}, = _sizes(dict({', '.join(f'{name}={name}' for name in inputs)}))"
        body = [f"    {line}" for line in _dropping(lines, written[0], last)]
        source = [f"def program({', '.join(inputs)}):", head, *body, f"    return {last}"]
        scope = {**self._constants, "_sizes": sizes}
        exec("\n".join(source), scope)
        return scope["program"]

    def _line(self, calls: tuple[Call, ...]) -> str:
        first = calls[0]
        if any((call.function, call.results) != (first.function, first.results) for call in calls):
            raise NotAlike("another call")
        args = [self._text([call.args[i] for call in calls]) for i in range(self._same([len(c.args) for c in calls]))]
        self._same([list(call.kwargs) for call in calls])
        named = [f"{name}={self._text([call.kwargs[name] for call in calls])}" for name in first.kwargs]
        called = f"{self._constant(first.function)}({', '.join(args + named)})"
        targets = ", ".join(first.results) + ("" if first.single else ",")
        return f"{targets} = {called}" if first.results else called

    def _text(self, values: list[Any]) -> str:
        """What was passed in one place of all calls."""
        first = values[0]
        self._same([type(value) for value in values])
        if isinstance(first, Register):
            return self._same([value.name for value in values])
        if isinstance(first, tuple | list):
            count = self._same([len(value) for value in values])
            parts = "".join(self._text([value[i] for value in values]) + ", " for i in range(count))
            return f"[{parts}]" if isinstance(first, list) else f"({parts})"
        if isinstance(first, slice):
            parts = ([getattr(value, part) for value in values] for part in ("start", "stop", "step"))
            return f"slice({', '.join(map(self._text, parts))})"
        if type(first) is int:
            return self._number(values)
        if isinstance(first, dict):
            raise NotAlike("a dictionary")
        if isinstance(first, torch.Tensor):
            if any(value is not first for value in values):
                raise NotAlike("a tensor from elsewhere")
        else:
            self._same(values)
        return self._constant(first)

    def _number(self, values: list[int]) -> str:
        """The same every time, or what follows from one of the sizes."""
        if len(set(values)) == 1:
            return repr(values[0])
        for place, own in enumerate(zip(*self._sizes, strict=True)):
            factor, rest = divmod(values[1] - values[0], own[1] - own[0])
            offset = values[0] - factor * own[0]
            if not rest and all(value == factor * size + offset for value, size in zip(values, own, strict=True)):
                return f"{factor} * n{place} + {offset}"
        raise NotAlike(f"a number: {values}")

    def _same(self, values: list[Any]) -> Any:
        if any(value != values[0] for value in values):
            raise NotAlike(f"not the same: {values}")
        return values[0]

    def _constant(self, value: Any) -> str:
        name = self._by_identity.setdefault(id(value), f"c{len(self._by_identity)}")
        self._constants[name] = value
        return name


def _dropping(lines: list[str], calls: list[Call], last: str) -> list[str]:
    """With each tensor forgotten after its last use."""
    used: dict[str, int] = {}
    for number, call in enumerate(calls):
        used.update(dict.fromkeys([*_registers_in(call.args), *_registers_in(call.kwargs), *call.results], number))
    dead: dict[int, list[str]] = {}
    for name, number in used.items():
        if name.startswith("r") and name[1:].isdigit() and name != last:
            dead.setdefault(number, []).append(name)
    return [f"{line}; del {', '.join(dead[n])}" if n in dead else line for n, line in enumerate(lines)]


def _registers_in(value: Any) -> list[str]:
    if isinstance(value, Register):
        return [value.name]
    if isinstance(value, slice):
        return _registers_in((value.start, value.stop, value.step))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [name for part in parts for name in _registers_in(part)]
