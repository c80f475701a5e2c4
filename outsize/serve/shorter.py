"""A program's calls, made fewer: each costs Python and torch some 2 us, more than one row takes to compute. What models
write out in many calls torch has in one, or they do it over and over. Rules apply wherever calls are such, whosever model it
is. They keep all numbers where such calls round as usual: a norm that rounds elsewhere would come out as another, so the
recorder compares the whole in the end, and takes the calls as they were where a bit differs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from outsize.serve.calls import Call, Register, renamed

Found = dict[str, Any]


class Made:
    """A pattern: a register made by a call of this name with such arguments. Text stands for anything, the same wherever
    it is the same."""

    def __init__(self, name: str, *args: Any) -> None:
        self.name, self.args = name, args


HALVES = (Ellipsis, slice("half", None, None)), (Ellipsis, slice(None, "half", None))
NORM = Made("mul", "x", Made("rsqrt", Made("add", Made("mean", Made("pow", "x", 2), -1, True), "eps")))
TURN = Made(
    "mul",
    Made("cat", (Made("neg", Made("__getitem__", "x", HALVES[0])), Made("__getitem__", "x", HALVES[1])), -1),
    "sine",
)
CAST = Made("to", Made("norm", Made("to", "x", torch.float32), "eps"), "dtype")
HEADS = Made("transpose", Made("view", "part", "shape"), 1, 2)
ROTATION = Made("add", Made("mul", HEADS, "cosine"), Made("mul", Made("roll", HEADS, "shift", -1), "sine"))


def norm(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dimension, in the precision it comes in."""
    return torch.rms_norm(hidden, hidden.shape[-1:], None, eps)


def norm_as(hidden: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """In float32, as `dtype`."""
    return norm(hidden, eps) if hidden.dtype is dtype else norm(hidden.float(), eps).to(dtype)


def turned(sine: torch.Tensor, half: int) -> torch.Tensor:
    """With the sign that the half of a vector gets that is rotated to the front."""
    return torch.cat((-sine[..., :half], sine[..., half:]), dim=-1)


def shorter(calls: list[Call]) -> list[Call]:
    """The same results, of fewer calls."""
    for rule in (share_views, norm_at_once, turn_once, rotate_together):
        calls = rule(calls)
    return calls


def share_views(calls: list[Call]) -> list[Call]:
    """The same dimension is added to the same tensor once: rotary embeddings do it in every layer."""
    first, same, kept = dict[Any, str](), dict[str, str](), list[Call]()
    for call in calls:
        if call.name == "unsqueeze" and call.args and isinstance(call.args[0], Register):
            known = first.setdefault(renamed((call.args, tuple(call.kwargs.items())), same), call.results[0])
            if known != call.results[0]:
                same[call.results[0]] = known
                continue
        kept.append(replace(call, args=renamed(call.args, same), kwargs=renamed(call.kwargs, same)))
    return kept


def norm_at_once(calls: list[Call]) -> list[Call]:
    """`torch.rms_norm` does what it is written out as."""
    found = _Matches(calls)
    for match in found.all(NORM):
        found.put(match, [replace(match.root, function=norm, args=(match["x"], match["eps"]), kwargs={})])
    found = _Matches(found.edited())
    for match in found.all(CAST):
        args = match["x"], match["eps"], match["dtype"]
        found.put(match, [replace(match.root, function=norm_as, args=args, kwargs={})])
    return found.edited()


def turn_once(calls: list[Call]) -> list[Call]:
    """Rotary embeddings: vectors are rolled, and the sign is the sine's, for all layers."""
    found, signed = _Matches(calls), dict[tuple[Any, int], Register]()
    fresh = 1 + max((int(name[1:]) for call in calls for name in call.results), default=0)
    for match in found.all(TURN):
        sine, half, rolled = match["sine"], match["half"], match.inner("cat")
        new = []
        if (sine, half) not in signed:
            signed[sine, half] = Register(f"r{fresh + len(signed)}")
            new.append(Call(turned, (sine, half), {}, (signed[sine, half].name,), True))
        new.append(replace(rolled, function=torch.roll, args=(match["x"], -half, -1), kwargs={}))
        found.put(match, [*new, replace(match.root, args=(rolled.result, signed[sine, half]))])
    return found.edited()


def rotate_together(calls: list[Call]) -> list[Call]:
    """Queries and keys that come side by side are rotated as one."""
    found = _Matches(calls)
    for one, other in pairwise(found.all(ROTATION)):
        split = found.maker.get(one["part"].name)
        alike = all(one[key] == other[key] for key in ("shape", "cosine", "shift", "sine"))
        if split is None or not alike or not _beside(split, one, other) or found.is_put(one):
            continue
        if found.unused_before(one.root, other.root):
            found.put(one, [])
            found.put(other, _rotated(split, one, other))
    return found.edited()


def _beside(split: Call, one: _Match, other: _Match) -> bool:
    """They begin with two neighbours of those that the last dimension is split into, and make any number of heads of them."""
    last = split.name == "split" and split.kwargs == {"dim": -1} and isinstance(split.args[1], list)
    heads = len(one["shape"]) == 4 and one["shape"][2] == -1 and one["shape"][3] > 0
    return last and heads and (one["part"].name, other["part"].name) in pairwise(split.results)


def _rotated(split: Call, one: _Match, other: _Match) -> list[Call]:
    """Calls that do for two neighbours in a split what those of both matches do for one."""
    at, sizes, size = split.results.index(one["part"].name), split.args[1], one["shape"][-1]
    whole, view, end = other.calls[0].results, one.calls[0], other.calls[1].results
    return [
        Call(torch.narrow, (split.args[0], -1, sum(sizes[:at]), sizes[at] + sizes[at + 1]), {}, whole, True),
        replace(view, args=(Register(whole[0]), one["shape"])),
        *one.calls[1:-1],
        replace(one.root, results=end),
        Call(
            torch.split_with_sizes,
            (Register(end[0]), [sizes[at] // size, sizes[at + 1] // size], 1),
            {},
            (one.root.results[0], other.root.results[0]),
            False,
        ),
    ]


@dataclass(frozen=True)
class _Match:
    """`root` and the calls that only it needs, in order, and what stands for the pattern's texts."""

    root: Call
    calls: list[Call]
    found: Found

    def __getitem__(self, text: str) -> Any:
        return self.found[text]

    def inner(self, name: str) -> Call:
        """The first of this name."""
        return next(call for call in self.calls if call.name == name)


class _Matches:
    """Of patterns among `calls`, and what is to be put in their places."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        self.maker = {name: call for call in calls for name in call.results}
        self._place = {id(call): place for place, call in enumerate(calls)}
        self._users = defaultdict[str, set[int]](set)
        for call in calls:
            for name in call.uses:
                self._users[name].add(id(call))
        self._instead: dict[int, list[Call]] = {}

    def all(self, pattern: Made) -> Iterator[_Match]:
        """Those whose inner results nobody else uses."""
        for call in self.calls:
            found, inner = Found(), dict[int, Call]()
            if self._fits(pattern, call.result if call.results else None, found, inner):
                others = {
                    user for c in inner.values() if c is not call for name in c.results for user in self._users[name]
                }
                if others <= inner.keys():
                    yield _Match(call, sorted(inner.values(), key=lambda c: self._place[id(c)]), found)

    def _fits(self, pattern: Any, value: Any, found: Found, inner: dict[int, Call]) -> bool:
        if isinstance(pattern, str):
            return _same(found.setdefault(pattern, value), value)
        if isinstance(pattern, Made):
            call = self.maker.get(value.name) if isinstance(value, Register) else None
            if call is None or call.name != pattern.name or not call.single:
                return False
            inner[id(call)] = call
            pattern, value = pattern.args, (*call.args, *call.kwargs.values())
        if isinstance(pattern, slice) and isinstance(value, slice):
            pattern, value = (pattern.start, pattern.stop, pattern.step), (value.start, value.stop, value.step)
        if isinstance(pattern, tuple) and isinstance(value, tuple | list):
            return len(pattern) == len(value) and all(
                self._fits(one, other, found, inner) for one, other in zip(pattern, value, strict=True)
            )
        return _same(pattern, value)

    def unused_before(self, call: Call, later: Call) -> bool:
        """What the call makes is not wanted before the later one."""
        return all(self._place[user] > self._place[id(later)] for name in call.results for user in self._users[name])

    def is_put(self, match: _Match) -> bool:
        """Other calls are in its place already."""
        return id(match.root) in self._instead

    def put(self, match: _Match, new: list[Call]) -> None:
        """In place of all that the match is made of, where its root was."""
        self._instead |= {id(call): [] for call in match.calls} | {id(match.root): new}

    def edited(self) -> list[Call]:
        return [new for call in self.calls for new in self._instead.get(id(call), [call])]


def _same(one: Any, other: Any) -> bool:
    """Tensors are themselves only."""
    return one is other or (type(one) is type(other) and not isinstance(one, torch.Tensor) and one == other)
