"""`outsize generate --workers 2` over a file of prompts, told to end and killed in the middle: the same command goes on, and
the answers come out as if nothing had happened."""

from __future__ import annotations

import os
import signal

import pytest
from launched import Work, make_work

STAYS = "What is in the output file stays; the same command goes on."


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return make_work(tmp_path_factory.mktemp("work"))


def test_told_to_end_nothing_stays_behind_but_answers(work: Work) -> None:
    with work.under_way() as command:
        command.process.send_signal(signal.SIGTERM)
        assert command.end() == 143
        assert command.said.count(f"outsize: stopped. {STAYS}") == 1
    assert sorted(path.name for path in work.folder.iterdir()) == [
        *("answers.jsonl", "model", "prompts.jsonl", "said", "scratch")
    ]


def test_a_killed_worker_is_named_and_the_other_ends(work: Work) -> None:
    with work.under_way() as command:
        os.kill(command.worker(0), signal.SIGKILL)
        assert command.end() == 1
        assert "outsize: Worker 0 is lost, and worker 1 stops" in command.said
        assert f"outsize: Worker 0 was ended by SIGKILL. {STAYS}" in command.said


def test_workers_do_not_outlive_who_has_started_them(work: Work) -> None:
    with work.under_way() as command:
        command.process.kill()
        assert command.end() == -signal.SIGKILL


def test_after_all_that_the_answers_are_those_of_an_undisturbed_run(work: Work) -> None:
    work.compare()
