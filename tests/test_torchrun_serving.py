"""`torchrun ... -m outsize generate`: when a worker is killed, torchrun starts all again, and they go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from launched import PROMPTS, make_work


def test_a_restart_goes_on_and_hears_nothing_of_the_attempt_before(tmp_path: Path) -> None:
    options = ("--standalone", "--nproc-per-node", 2, "--max-restarts", 1, "--log-dir", tmp_path / "logs")
    work = make_work(tmp_path, ("torch.distributed.run", *options, "-m", "outsize"), ())
    with work.under_way() as command:
        os.kill(command.worker(1), signal.SIGKILL)
        assert command.end() == 0
        assert f"{PROMPTS} answers" not in command.said and " answers in " in command.said
    assert work.count() == PROMPTS
    work.compare()
