"""Who computes how many tokens in the next step. A policy says who goes before whom; the rest is the same for all.

The rule: every sequence that decodes gets its one token, and prompts get what is left of the step's token budget, in
chunks. So a long prompt never holds up the others for longer than one step. When pages run out, the sequence that the
policy puts last gives up its own, never for one that the policy puts after it: whoever is first always gets on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from outsize.serve.pages import Pages
from outsize.serve.request import Sequence, State


class Policy(Protocol):
    """An order of sequences. With `preempts` one that waits may take the place of one that runs; else it waits until
    somebody finishes."""

    preempts: bool

    def rank(self, sequence: Sequence) -> tuple[float, ...]:
        """The lowest goes first."""
        ...

    def served(self, sequence: Sequence, tokens: int) -> None:
        """The sequence had this many tokens computed."""
        ...

    def arrived(self, sequence: Sequence, others: list[Sequence]) -> None:
        """A sequence joins these others."""
        ...


class FirstCome:
    """First come, first served."""

    preempts = False

    def rank(self, sequence: Sequence) -> tuple[float, ...]:
        return (sequence.arrival,)

    def served(self, sequence: Sequence, tokens: int) -> None: ...

    def arrived(self, sequence: Sequence, others: list[Sequence]) -> None: ...


class Priority(FirstCome):
    """The request with the highest `priority` first; among equals, first come, first served."""

    preempts = True

    def rank(self, sequence: Sequence) -> tuple[float, ...]:
        return (-sequence.request.priority, sequence.arrival)


class FeedbackQueues(FirstCome):
    """Skip-join multi-level feedback (FastServe, arXiv 2305.05920): short jobs go first without anybody knowing lengths.
    A level's quantum is twice that of the level before; a prompt joins at the level whose quantum it fits."""

    preempts = True

    def __init__(self, quantum: int = 64, levels: int = 8) -> None:
        self._quantum, self._levels = quantum, levels

    def rank(self, sequence: Sequence) -> tuple[float, ...]:
        used = max(len(sequence.request.prompt), sequence.served)
        level = 0
        while level < self._levels - 1 and used > self._quantum * ((2 << level) - 1):
            level += 1
        return (level, sequence.arrival)


class FairShare(FirstCome):
    """By virtual token counters (Sheng et al., OSDI 2024): the key that has been served least goes first, and a key that
    was away starts level with the least served of those that were not."""

    preempts = False

    def __init__(self) -> None:
        self._counters: Counter[str] = Counter()

    def rank(self, sequence: Sequence) -> tuple[float, ...]:
        return (self._counters[sequence.request.key], sequence.arrival)

    def served(self, sequence: Sequence, tokens: int) -> None:
        self._counters[sequence.request.key] += tokens

    def arrived(self, sequence: Sequence, others: list[Sequence]) -> None:
        key = sequence.request.key
        present = {other.request.key for other in others}
        if key not in present:
            least = min((self._counters[other] for other in present), default=max(self._counters.values(), default=0))
            self._counters[key] = max(self._counters[key], least)


POLICIES = {"fcfs": FirstCome, "feedback": FeedbackQueues, "fair": FairShare, "priority": Priority}


@dataclass(frozen=True)
class Turn:
    """A sequence's part of a step: its next `count` tokens."""

    sequence: Sequence
    count: int


class Scheduler:
    """Chooses turns and hands out pages. `seats`: sequences in a step, `step_tokens`: tokens in a step, at most, and no
    fewer than seats. `copies` are (from, to) of pages to be copied before the step runs."""

    def __init__(self, pages: Pages, policy: Policy, seats: int, step_tokens: int) -> None:
        self.pages, self.policy = pages, policy
        self.seats, self.step_tokens = seats, step_tokens
        self.sequences: list[Sequence] = []
        self.preemptions = 0
        self.sharing = True
        self.copies: list[tuple[int, int]] = []

    def add(self, sequence: Sequence) -> None:
        self.policy.arrived(sequence, self.sequences)
        self.sequences.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It is finished, or nobody wants it any more: its pages are let go."""
        self._let_go(sequence, State.FINISHED)
        self.sequences.remove(sequence)

    def schedule(self) -> list[Turn]:
        """The turns of the next step; none when there is nothing to do."""
        self.copies.clear()
        order = sorted(self.sequences, key=self._rank)
        seated = order[: self.seats]
        decoding = {id(s) for s in seated if s.state is State.RUNNING and s.pending == 1}
        turns: list[Turn] = []
        left, reserved, closed = self.step_tokens, len(decoding), False
        for sequence in seated:
            before, count = self.preemptions, 0
            if id(sequence) in decoding:
                reserved -= 1
                count = self._admit(sequence, 1, order, turns) if sequence.state is State.RUNNING else 0
            elif not closed:
                count = self._admit(sequence, left - reserved, order, turns)
                closed = count == 0  # nobody overtakes: whoever is first would wait for ever
            closed = closed or self.preemptions > before
            if count:
                turns.append(Turn(sequence, count))
                left -= count
        return turns

    def done(self, turns: list[Turn]) -> None:
        """The turns were computed."""
        for turn in turns:
            sequence = turn.sequence
            full = sequence.computed // self.pages.page_tokens
            sequence.computed += turn.count
            sequence.served += turn.count
            if self.sharing:
                self.pages.know(sequence.tokens, sequence.pages, full, sequence.computed)
            self.policy.served(sequence, turn.count)

    def fork(self, sequence: Sequence, sibling: Sequence) -> None:
        """`sibling` continues what `sequence` has computed; a page that both hold is copied when one writes into it."""
        sibling.pages = [self.pages.hold(page) for page in sequence.pages]
        sibling.computed, sibling.state = sequence.computed, State.RUNNING
        self.add(sibling)

    def _rank(self, sequence: Sequence) -> tuple[float, ...]:
        waits = sequence.state is not State.RUNNING and not self.policy.preempts
        return (waits, *self.policy.rank(sequence))

    def _admit(self, sequence: Sequence, left: int, order: list[Sequence], turns: list[Turn]) -> int:
        """Give the sequence pages for its next tokens, and say for how many."""
        if left == 0 or sequence.state is State.FINISHED:
            return 0
        if sequence.state is State.WAITING and self.sharing:
            self._find_prefix(sequence)
        count = min(left, sequence.pending)
        while not self._provide(sequence, count):
            if not self._make_room(sequence, order, turns):
                count = self._fitting(sequence, count)
                if count == 0 or not self._provide(sequence, count):
                    self._unless_running(sequence)
                    return 0
                break
        sequence.state = State.RUNNING
        return count

    def _find_prefix(self, sequence: Sequence) -> None:
        sequence.pages = self.pages.find(sequence.tokens)
        sequence.computed = len(sequence.pages) * self.pages.page_tokens
        if sequence.new_tokens == 0 and sequence.index == 0:
            sequence.request.cached_tokens = max(sequence.request.cached_tokens, sequence.computed)

    def _unless_running(self, sequence: Sequence) -> None:
        if sequence.state is State.WAITING:
            self._let_go(sequence, State.WAITING)

    def _fitting(self, sequence: Sequence, count: int) -> int:
        """Tokens that fit into the pages still free."""
        room = (len(sequence.pages) + self.pages.available) * self.pages.page_tokens - sequence.computed
        return max(0, min(count, room))

    def _provide(self, sequence: Sequence, count: int) -> bool:
        """Pages for `count` more tokens, the last one its own; False when there are too few."""
        missing = self.pages.needed(sequence.computed + count) - len(sequence.pages)
        number = sequence.computed // self.pages.page_tokens
        shared = number < len(sequence.pages) and self.pages.holders[sequence.pages[number]] > 1
        if missing + shared > self.pages.available:
            return False
        if shared:
            source = sequence.pages[number]
            sequence.pages[number] = self.pages.take()
            self.copies.append((source, sequence.pages[number]))
            self.pages.release([source])
        sequence.pages += [self.pages.take() for _ in range(missing)]
        return True

    def _make_room(self, sequence: Sequence, order: list[Sequence], turns: list[Turn]) -> bool:
        """The last in the order that holds pages, and has no turn yet, gives them up. False when that is `sequence`."""
        taken = {id(turn.sequence) for turn in turns}
        for other in reversed(order):
            if other is sequence:
                return False
            if other.pages and id(other) not in taken:
                self._let_go(other, State.WAITING)
                self.preemptions += 1
                return True
        return False

    def _let_go(self, sequence: Sequence, state: State) -> None:
        self.pages.release(sequence.pages)
        sequence.pages, sequence.computed, sequence.state = [], 0, state
