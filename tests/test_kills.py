"""A real run, killed twenty times at random instants, ends with the numbers of one that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

from soak import soak


def test_twenty_kills_change_no_number(tmp_path: Path) -> None:
    done = soak(tmp_path, kills=20, seed=0, steps=40)
    assert sum(done.kills.values()) == 20
    assert len(done.kills) > 1, f"all kills hit the same place: {done.kills}"
