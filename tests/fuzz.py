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
    """Try `examples` right and as many wrong requests for each operation that takes a body, few for the others, which take
    nothing that could be wrong; raises what schemathesis finds. How often each HTTP status was answered."""
    written = httpx2.get(f"{server.url}/openapi.json").json()
    del written["security"]  # else it would be spent on trying without the key
    statuses: Counter[int] = Counter()
    for found in schemathesis.openapi.from_dict(written).get_all_operations():
        operation = found.ok()
        takes_body = operation.method == "post"
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)[: 1 + takes_body]:
            try_all(server, operation.as_strategy(generation_mode=mode), examples if takes_body else 3, statuses)
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
