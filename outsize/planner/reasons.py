"""The plan of what a search has chosen, and what it says of itself: why its bytes are where they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from outsize.distributed.arrangement import CLOSE, PEER, REMOTE
from outsize.machine.machine import Machine
from outsize.plan import INPUT_TO_HOST, KEEP, KEEP_ATTENTION, MOVE, MOVE_TO_HOST, RECOMPUTE, Activations, Plan
from outsize.planner.predict import host_bytes, near_bytes, predicted
from outsize.planner.script import Stepped
from outsize.planner.search import Choice, Placement, Search
from outsize.sizes import format_size

SAID = {
    KEEP: "all kept",
    KEEP_ATTENTION: "results of attention (scaled_dot_product_attention) kept and the rest recomputed",
    RECOMPUTE: "recomputed from the input",
    MOVE: "moved to disk",
    MOVE_TO_HOST: "moved to the host's memory",
    INPUT_TO_HOST: "recomputed from the input, which moves to the host's memory",
    Activations("products"): "all but products recomputed",
    Activations("products", "disk"): "products moved to disk and the rest recomputed",
}

NEIGHBOURS = {
    CLOSE: "the workers that are close",
    PEER: "workers of the same node",
    REMOTE: "workers of other nodes",
}


def finished(search: Search, choice: Choice) -> Plan:
    """Raises BudgetError when the choice, looked at closely, finds no room."""
    search.need_room(choice.placement)
    closely = replace(choice, forecast=search.foretell(choice.placement, closely=True))
    plan = replace(search.plan(choice.placement), commit_every=closely.forecast.commit_every)
    return replace(
        plan, predicted=predicted(search, closely), reasons=_reasons(search, closely, choice.forecast.seconds)
    )


def _reasons(search: Search, choice: Choice, seconds: float) -> tuple[str, ...]:
    """`seconds`: of the choice as it was played beside others."""
    placement, needs = choice.placement, search.needs
    work = search.rehearsed.work
    played = [tried.forecast.seconds for tried in search.tried]
    why = "no other placement was worth playing"
    if len(played) > 1:
        why = f"the fastest of {len(played)} placements played; the slowest takes {max(played):.2f} s"
    faster = [tried.forecast.seconds for tried in search.tried if tried.tight and tried.forecast.seconds < seconds]
    if faster and not choice.tight:
        why = (
            f"of {len(played)} placements played the fastest takes {min(faster):.2f} s instead of {seconds:.2f}, with so "
            "small an arena that the disk must be just as fast as measured"
        )
    named = "compute and update" if search.request.workers == 1 else "compute, update and exchange"
    return (
        f"baseline: {format_size((needs.beside or needs).baseline)} are held by Python and its libraries already",
        f"near: {format_size(near_bytes(search, placement))} stay in {_where(search)}, {placement.filled} first: {why}",
        *_say_host(search, placement),
        f"arena: {format_size(placement.arena_bytes)} for what streams; {format_size(needs.least_arena)} is the least",
        *_say_parts(search.bare.parts, search.request.accumulate),
        f"activations: {told(search.bare.activations)}; a step's tensors take " + format_size(needs.tensors),
        "loss: over blocks of the vocabulary (rounding)" if search.job.blocked else "loss: the module's own",
        f"update: second pass, gradients wait in {placement.gradient_home}"
        if search.job.hold
        else "update: in backward, no gradient waits",
        *_say_host_updates(search, placement),
        f"time: {choice.forecast.seconds:.2f} s a step, {work:.2f} s of them {named}, which no placement "
        f"makes shorter: at most {max(choice.forecast.seconds / max(work, 1e-9) - 1, 0):.0%} above the best there can be",
        f"commit: {_say_commit(search, choice)}",
        *_say_workers(search),
    )


def _where(search: Search) -> str:
    return "memory" if search.needs.beside is None else "the device's memory"


def _say_host(search: Search, placement: Placement) -> tuple[str, ...]:
    """Of a device's host, what lives in its memory, and what is left for the disk."""
    if search.needs.beside is None:
        return ()
    names, sizes = search.job.sizes.keys(), search.job.sizes
    weights = names - placement.near_weights - placement.host_weights
    states = names - placement.near_states - placement.host_states
    left = sum(sizes[name].bytes for name in weights) + sum(sizes[name].state_bytes for name in states)
    left += search.gradient_bytes() if placement.gradient_home == "disk" else 0
    waiting = ", and gradients that wait" if placement.gradient_home == "host" and search.gradient_bytes() else ""
    rest = f"{format_size(left)} live on disk alone" if left else "none lives on disk alone"
    return (
        f"host: {format_size(host_bytes(search, placement))} live in the memory of the device's host, "
        f"{len(placement.host_weights)} weights and the state of {len(placement.host_states)}{waiting}; {rest}",
    )


def _say_parts(parts: tuple[str, ...], accumulate: int) -> tuple[str, ...]:
    if not parts:
        return ()
    often = f", for each of {accumulate} micro-batches anew" if accumulate > 1 else ""
    return (
        f"parts: of each layer {', '.join(parts)} are leased one after the other: it need not be near whole{often}",
    )


def of_machine(machine: Machine) -> str:
    """What a plan says of where its rates come from."""
    return f"machine: {machine.name}, {machine.origin}"


def _say_workers(search: Search) -> tuple[str, ...]:
    request, plan = search.request, search.bare
    if request.workers == 1:
        return ()
    if request.legs:
        return (
            f"pipeline: legs of {', '.join(map(str, request.legs))} layers, of which this worker has number "
            f"{' and '.join(str(number + 1) for number in request.own_legs)}; the "
            f"{request.accumulate} micro-batches of a step go through them in the order of {plan.schedule}",
            *_say_sharers(search),
        )
    return _say_sharers(search)


def _say_sharers(search: Search) -> tuple[str, ...]:
    """Who divides state and batch, and how what they exchange gets from one to the other."""
    request, plan = search.request, search.bare
    if request.sharers == 1:
        return ()
    who = (
        f"{request.sharers} of each leg, neighbours,"
        if request.legs
        else f"{request.workers} on {request.nodes} nodes,"
    )
    divided = ", ".join(("optimizer state", "gradients", "weights")[: request.zero])
    holders = (
        "nodes" if plan.weight_copies == request.nodes else f"groups of {request.workers // plan.weight_copies} workers"
    )
    copies = f"; of the weights each of {plan.weight_copies} {holders} has a copy" if plan.weight_copies > 1 else ""
    ahead = f"; {format_size(plan.gather_ahead_bytes)} of them are gathered before they are needed"
    links = (
        f"{format_size(int(link.bytes_per_second))}/s and {1e6 * link.latency:.0f} us to {NEIGHBOURS[tier]}"
        for tier, link in search.wire.items()
    )
    return (
        f"workers: {who} who divide {divided}{copies}{ahead * (plan.gather_ahead_bytes > 0)}; of a step's sequences they "
        f"take {', '.join(map(str, request.sequences)) or 'equally many'}",
        f"wire: {'; '.join(links) or 'taken for infinitely fast'}",
    )


def _say_commit(search: Search, choice: Choice) -> str:
    every, snapshot = choice.forecast.commit_every, format_size(sum(search.snapshot(choice.placement).values()))
    if choice.placement.shared:
        held = f"a crash of this process loses no step: a keeper process holds the last in {snapshot} more"
    else:
        held = f"a crash loses {every} at most" if every > 1 else "a crash loses the step under way"
    often = f"every {every} steps" if every > 1 else "every step"
    return f"{often}, {snapshot} from memory while the next computes; {held}"


def _say_host_updates(search: Search, placement: Placement) -> tuple[str, ...]:
    """Of what lives in the memory of a device's host, what is updated there, and what that costs and saves."""
    tried = [each.forecast.seconds for each in search.tried if each.placement.host_updates]
    if not tried:
        return ()
    if not placement.host_updates:
        return (
            f"update on the host: of nothing; with a part of what lives there a step takes {min(tried):.2f} s at least",
        )
    sizes = [search.job.sizes[name] for name in placement.host_updates]
    stepped = next(event for event in search.rehearsed.script.steps[-1] if isinstance(event, Stepped))
    seconds = sum(size.whole for size in sizes) / search.bare.sharers * stepped.there / stepped.weight_bytes
    link, state = search.ways["host"], sum(size.state_bytes for size in sizes)
    return (
        f"update on the host: of {len(sizes)} of the {len(placement.host_states)} weights whose state lives there: "
        f"{seconds:.2f} s of its processors for {state / link.read + state / link.write:.2f} s of state over the link, there "
        "and back; the device waits meanwhile, and AdamW may round otherwise there than on the device (rounding)",
    )


def told(activations: tuple[tuple[str, Activations], ...]) -> str:
    """What is done with those of how many units."""
    counts = Counter(SAID.get(choice, f"{choice.saved} saved in {choice.home}") for _, choice in activations)
    return ", ".join(f"of {count} units {what}" for what, count in counts.items()) or "all kept"
