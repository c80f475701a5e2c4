"""`outsize generate --workers 2` over a file of prompts, told to end and killed in the middle: the same command goes on, and
the answers come out as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from launched import Launched, launched
from models import write_model

import outsize
from outsize.serve.batch import answer_file
from outsize.serving import Sampling

PROMPTS = 400
SOME = 20  # answers, and then something happens
STAYS = "What is in the output file stays; the same command goes on."


@dataclass
class Work:
    """Prompts in `folder`, answered again and again until all are."""

    model: Path
    folder: Path

    @property
    def answers(self) -> Path:
        return self.folder / "answers.jsonl"

    @property
    def arguments(self) -> list[object]:
        files = ["--input", self.folder / "prompts.jsonl", "--output", self.answers]
        return ["generate", "--model", self.model, "--memory", "1GiB", "--workers", 2, *files]

    @contextmanager
    def under_way(self) -> Iterator[Launched]:
        """With some more answers than there were, and others to come."""
        before = self.count()
        with launched(self.folder, *self.arguments) as command:
            command.until(lambda: self.count() >= before + SOME)
            yield command
        assert before + SOME <= self.count() < PROMPTS

    def count(self) -> int:
        return self.answers.read_bytes().count(b"\n") if self.answers.exists() else 0


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("work")
    lines = [
        {"prompt": f"w{n % 99} w{n % 7}", "max_new_tokens": 16 + n % 7, "temperature": n % 2} for n in range(PROMPTS)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(line | {"ignore_end": True}) for line in lines))
    return Work(write_model(folder / "model"), folder)


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
    undisturbed = work.folder / "undisturbed.jsonl"
    with outsize.Engine(str(work.model), memory="2GiB") as engine:
        for answers, left in ((work.answers, PROMPTS - work.count()), (undisturbed, PROMPTS)):
            assert answer_file(engine, work.folder / "prompts.jsonl", answers, Sampling(100, seed=0)) == left
    assert work.answers.read_bytes() == undisturbed.read_bytes()
