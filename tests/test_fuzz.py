"""Requests drawn from the server's own description of itself, right ones and wrong ones: it never fails, and answers as
it says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuzz import fuzz
from models import TEMPLATE, write_model
from server import Address, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    model = write_model(tmp_path_factory.mktemp("model"), letters=True, template=TEMPLATE)
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(model, log, "--concurrency", 64, "--step-tokens", 128, "--max-body", "64KiB", context=96) as address:
        yield address


def test_no_request_makes_the_server_fail(server: Address) -> None:
    statuses = fuzz(server, examples=25)
    assert {200, 400} <= statuses.keys() and max(statuses) < 500, statuses
    server.settle()
