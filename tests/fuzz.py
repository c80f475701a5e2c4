"""Fuzzing a server with schemathesis, by the server's own OpenAPI description."""

from __future__ import annotations

from collections import Counter

import httpx2
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import checks
from schemathesis.generation import GenerationMode
from server import Address


def fuzz(server: Address, examples: int) -> Counter[int]:
    """Try `examples` right and as many wrong requests for each operation; raises what schemathesis finds. How often each
    HTTP status was answered."""
    description = schemathesis.openapi.from_dict(httpx2.get(f"{server.url}/openapi.json").json())
    statuses: Counter[int] = Counter()
    for operation in description.get_all_operations():
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            try_all(server, operation.ok().as_strategy(generation_mode=mode), examples, statuses)
    return statuses


def try_all(server: Address, cases, examples: int, statuses: Counter[int]) -> None:
    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=cases)
    def check(case) -> None:
        response = case.call(base_url=server.url, headers=server.headers, timeout=60)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    check()


CHECKS = [checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance]
