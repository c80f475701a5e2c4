"""Pages of keys and values that leave memory and come back: the same tokens, nothing twice, and after a kill too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from models import tiny_model
from serving import COMPUTE, LONGEST, PROMPTS, Bound, ask, bound, run

import outsize
from outsize.errors import StorageError
from outsize.memory.disk import DiskTier
from outsize.serve.engine import Engine

TURNS = [
    PROMPTS[2],
    PROMPTS[4],
    PROMPTS[7],
    [(11 * n) % 240 + 5 for n in range(70)],
    [(5 * n) % 200 + 9 for n in range(52)],
]


@pytest.fixture(scope="module")
def llama() -> Iterator[Bound]:
    with bound("llama", streamed=True) as found:
        yield found


def talk(engine: Engine, rounds: int) -> tuple[list[list[int]], int]:
    """Conversations in turns, each prompt being all that was said and one token more: what was said at the end, and how
    many tokens of prompts were known already."""
    said, known = [list(turn) for turn in TURNS], 0
    for number in range(rounds):
        asked = [ask(engine, words, max_new_tokens=8) for words in said]
        run(engine)
        for words, (request, heard) in zip(said, asked, strict=True):
            words += [*heard.tokens(), 100 + number]
            known += request.cached_tokens
    return said, known


def moved(model: Bound, source: str, target: str) -> int:
    return model.store.ledger.moved[source, target, "kv"]


def test_conversations_that_do_not_fit_near_are_not_computed_again(llama: Bound) -> None:
    with llama.engine(60, 4, 64) as engine:
        expected, known = talk(engine, 4)
    before = moved(llama, "host", "disk"), moved(llama, "disk", "host")
    with llama.engine(13, 4, 64, far_pages=60) as engine:
        assert engine.far is not None
        found, again = talk(engine, 4)
        assert found == expected and again >= known, "nothing that was known has to be computed again"
        full = {tuple(words[: 16 * n]) for words in expected for n in range(1, (len(words) - 2) // 16 + 1)}
        written = moved(llama, "host", "disk") - before[0]
        assert 0 < written <= len(full) * engine.cache.page_bytes, "no page is written twice"
        assert moved(llama, "disk", "host") > before[1]
        assert engine.pages.available == 13


def test_pages_stay_where_they_are_when_computing_is_cheaper(llama: Bound) -> None:
    with llama.engine(60, 4, 64) as engine:
        expected, _ = talk(engine, 2)
    before = moved(llama, "host", "disk")
    with llama.engine(13, 4, 64, far_pages=60, token_seconds=COMPUTE) as engine:
        assert talk(engine, 2)[0] == expected
    assert moved(llama, "host", "disk") == before


def test_a_ring_too_small_for_all_forgets_the_oldest(llama: Bound) -> None:
    with llama.engine(60, 4, 64) as engine:
        expected, known = talk(engine, 3)
    for far_pages in (1, 4):
        with llama.engine(13, 4, 64, far_pages=far_pages) as engine:
            found, fewer = talk(engine, 3)
            assert found == expected and fewer < known


def test_a_disk_without_room_is_used_as_far_as_it_goes(llama: Bound, tmp_path: Path) -> None:
    with llama.engine(60, 4, 64) as engine:
        expected, _ = talk(engine, 3)
    disk, size = llama.store.tiers["disk"], 0
    for capacity in (0, 1):
        with llama.engine(13, 4, 64, far_pages=60) as engine:
            size = engine.cache.page_bytes * 60
            assert engine.far is not None
            llama.store.tiers["disk"] = small = DiskTier(tmp_path / f"small{capacity}", capacity * size)
            assert talk(engine, 3)[0] == expected
            engine.check()
            assert small.used == capacity * size
        small.close()
        llama.store.tiers["disk"] = disk


def test_what_was_damaged_on_disk_is_computed_again(llama: Bound, tmp_path: Path) -> None:
    answers = []
    for _ in range(4):  # two sequences ask for the same damaged pages at once, and either may hear of it first
        with llama.engine(20, 2, 64, far_pages=40, directory=tmp_path) as engine:
            asked = [ask(engine, turn, max_new_tokens=8) for turn in TURNS]
            run(engine)
            answers.append([heard.tokens() for _, heard in asked])
            assert sum(request.cached_tokens for request, _ in asked) <= 32, "of one prompt that begins as another"
        with (tmp_path / "pages").open("r+b") as file:
            for position in range(100, file.seek(0, os.SEEK_END), 4096):
                file.seek(position)
                file.write(b"\xff\xff")
    assert all(found == answers[0] for found in answers)


def test_a_torn_index_is_read_as_far_as_it_goes(llama: Bound, tmp_path: Path) -> None:
    cached = []
    for tear in (0, 0, 60, 10_000):
        if (tmp_path / "index").exists():
            size = (tmp_path / "index").stat().st_size
            os.truncate(tmp_path / "index", max(0, size - tear))
        with llama.engine(20, 1, 64, far_pages=40, directory=tmp_path) as engine:
            request, heard = ask(engine, PROMPTS[7], max_new_tokens=4)
            run(engine)
            assert heard.tokens() == llama.answers[7][:4]
            cached.append(request.cached_tokens)
            with (
                pytest.raises(StorageError, match="in use by another process"),
                llama.engine(20, 1, 64, far_pages=40, directory=tmp_path),
            ):
                pass
    assert cached == [0, 48, 32, 0]


KILLED = """
import os, signal, sys, time
from pathlib import Path
import outsize
from outsize.serve.far_index import SIZE

def wait_for(pages):  # a disk may be slow
    end = time.monotonic() + 60
    (index,) = Path(sys.argv[2]).rglob("index")
    while index.stat().st_size < pages * SIZE and time.monotonic() < end:
        time.sleep(0.01)

with outsize.Engine(sys.argv[1], memory="1GiB", context=128, kv_directory=sys.argv[2]) as engine:
    for prompt in eval(sys.argv[3]):
        engine.generate([prompt], max_new_tokens=20, ignore_end=True)
    for number, event in enumerate(engine.stream(list(range(3, 50)), max_new_tokens=60, ignore_end=True)):
        if number == 20:
            wait_for(3 + 3 + 2)
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_prefixes_survive_a_kill(tmp_path: Path) -> None:
    tiny_model("llama", tied=False).save_pretrained(tmp_path / "model")
    prompts = [PROMPTS[7], PROMPTS[2]]
    arguments = [str(tmp_path / "model"), str(tmp_path / "kv"), repr(prompts)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with outsize.Engine(arguments[0], memory="4GiB", context=128) as engine:
        expected = [one.tokens for one in engine.generate(prompts, max_new_tokens=LONGEST, ignore_end=True)]
    with outsize.Engine(arguments[0], memory="4GiB", context=128, kv_directory=arguments[1]) as engine:
        found = engine.generate(prompts, max_new_tokens=LONGEST, ignore_end=True)
        assert [one.tokens for one in found] == expected
        assert [one.cached_tokens for one in found] == [48, 48], "all whole pages of both prompts"
        (running,) = engine.generate([list(range(3, 50))], max_new_tokens=1)
        assert running.cached_tokens == 32, "and of the one that was cut off"
        engine.engine.check()
    tiny_model("llama", tied=False, seed=1).save_pretrained(tmp_path / "other")
    with outsize.Engine(str(tmp_path / "other"), memory="4GiB", context=128, kv_directory=arguments[1]) as engine:
        assert engine.generate(prompts, max_new_tokens=1)[0].cached_tokens == 0, "other weights, other keys and values"
