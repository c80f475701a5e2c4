"""Who computes how many tokens in the next step. A policy says who goes before whom; the rest is the same for all.

The rule: every sequence that decodes gets its one token, and prompts get what is left of the step's token budget, in
chunks. So a long prompt never holds up the others for longer than one step. When pages run out, the sequence that the
policy puts last gives up its own, never for one that the policy puts after it: whoever is first always gets on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from outsize.serve.far import Coming, FarPages
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
    fewer than seats. `copy(source, target)` fills a page with what another holds; `far` is where pages come back from."""

    def __init__(
        self,
        pages: Pages,
        policy: Policy,
        seats: int,
        step_tokens: int,
        copy: Callable[[int, int], None] = lambda source, target: None,
        far: FarPages | None = None,
    ) -> None:
        self.pages, self.policy, self.copy, self.far = pages, policy, copy, far
        self.seats, self.step_tokens = seats, step_tokens
        self.sequences: list[Sequence] = []
        self.preemptions = 0
        self.sharing = True
        self.coming: list[tuple[Coming, Sequence]] = []

    def add(self, sequence: Sequence) -> None:
        self.policy.arrived(sequence, self.sequences)
        self.sequences.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It is finished, or nobody wants it any more: its pages are let go."""
        self._let_go(sequence, State.FINISHED)
        self.sequences.remove(sequence)

    def schedule(self) -> list[Turn]:
        """The turns of the next step; none when there is nothing to do. Waits for pages only when nobody else gets on."""
        self._arrive(wait=False)
        turns = self._turns()
        while not turns and self.coming:
            self._arrive(wait=True)
            turns = self._turns()
        return turns

    def _turns(self) -> list[Turn]:
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
            elif not closed and sequence.state is not State.COMING:
                count = self._admit(sequence, left - reserved, order, turns)
                # Nobody overtakes: whoever is first would wait for ever. Whose pages are coming has them already.
                closed = count == 0 and sequence.state is not State.COMING
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
        waits = sequence.state is State.WAITING and not self.policy.preempts
        return (waits, *self.policy.rank(sequence))

    def _admit(self, sequence: Sequence, left: int, order: list[Sequence], turns: list[Turn]) -> int:
        """Give the sequence pages for its next tokens, and say for how many."""
        if left == 0 or sequence.state is State.FINISHED:
            return 0
        if sequence.state is State.WAITING and self.sharing and not self._find_prefix(sequence, order, turns):
            return 0
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

    def _find_prefix(self, sequence: Sequence, order: list[Sequence], turns: list[Turn]) -> bool:
        """Hold the pages of the known prefix. False when some of them have to come first, or there is no place yet where
        they could: bringing them later is better than computing them now."""
        found = self.pages.find(sequence.tokens)
        if self.far is None or not self.far.worth_loading:
            found = list(takewhile(lambda known: known[1] is not None, found))
        near = {key: self.pages.hold(page) for key, page in found if page is not None}
        missing = [key for key, page in found if page is None]
        while len(missing) > self.pages.available:
            if not self._make_room(sequence, order, turns):
                self.pages.release(list(near.values()))
                return False
        wanted = [(key, self.pages.take()) for key in missing]
        places = near | dict(wanted)
        sequence.pages = [places[key] for key, _ in found]
        if wanted and self.far is not None:
            self.coming.append((self.far.load(wanted), sequence))
            sequence.state = State.COMING
            return False
        self._know_prefix(sequence)
        return True

    def _know_prefix(self, sequence: Sequence) -> None:
        sequence.computed = len(sequence.pages) * self.pages.page_tokens
        if sequence.new_tokens == 0 and sequence.index == 0:
            sequence.request.cached_tokens = max(sequence.request.cached_tokens, sequence.computed)

    def _arrive(self, wait: bool) -> None:
        """Take in the pages that have come; `wait` for the first."""
        for coming, sequence in list(self.coming):
            if not (wait or coming.arrived) or self.far is None:
                continue
            wait = False
            self.coming.remove((coming, sequence))
            sound = self.far.finish(coming)
            for key, page in sound:
                self.pages.learn(key, page)
            if sequence.state is State.COMING:
                lost = set(coming.pages) - {page for _, page in sound}
                self._resume(sequence, lost)
            else:  # nobody waits for them any more
                self.pages.release(coming.pages)

    def _resume(self, sequence: Sequence, lost: set[int]) -> None:
        """Go on behind the pages that have come; what comes after one that was lost is computed again."""
        whole = list(takewhile(lambda page: page not in lost, sequence.pages))
        self.pages.release(sequence.pages[len(whole) :])
        sequence.pages, sequence.state = whole, State.RUNNING if whole else State.WAITING
        self._know_prefix(sequence)

    def close(self) -> None:
        """Wait until nothing comes any more."""
        while self.coming:
            self._arrive(wait=True)

    def holding(self) -> list[list[int]]:
        """The pages of all who hold some."""
        abandoned = [list(c.pages) for c, sequence in self.coming if sequence.state is not State.COMING]
        return [*(sequence.pages for sequence in self.sequences), *abandoned]

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
            self.copy(source, sequence.pages[number])
            self.pages.release([source])
        sequence.pages += [self.pages.take() for _ in range(missing)]
        return True

    def _make_room(self, sequence: Sequence, order: list[Sequence], turns: list[Turn]) -> bool:
        """The last in the order that holds pages, and has no turn yet, gives them up. False when that is `sequence`."""
        taken = {id(turn.sequence) for turn in turns}
        for other in reversed(order):
            if other is sequence:
                return False
            if other.pages and other.state is State.RUNNING and id(other) not in taken:
                self._let_go(other, State.WAITING)
                self.preemptions += 1
                return True
        return False

    def _let_go(self, sequence: Sequence, state: State) -> None:
        """Pages that are still coming stay held until they have come."""
        coming = {page for c, whose in self.coming if whose is sequence for page in c.pages}
        self.pages.release([page for page in sequence.pages if page not in coming])
        sequence.pages, sequence.computed, sequence.state = [], 0, state
