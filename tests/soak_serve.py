"""`make soak-serve`: a long attack on a server. Run by hand: python tests/soak_serve.py --clients 200 --examples 1000"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from crowd import NEW, PROMPTS, asked, gather
from fuzz import fuzz
from models import TEMPLATE, write_model
from server import Address, serving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200, help="at once; a third of them rude")
    parser.add_argument("--rounds", type=int, default=5, help="of so many clients")
    parser.add_argument("--examples", type=int, default=1000, help="right and wrong requests for each operation")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        crowds(Path(folder), options.clients, options.rounds)
        requests(Path(folder), options.examples)


def crowds(folder: Path, clients: int, rounds: int) -> None:
    model = write_model(folder / "words", template=TEMPLATE)
    with serving(model, folder / "crowd.log", "--max-body", "64KiB", "--max-waiting", 64, "--policy", "fair") as server:
        right = {prompt: answered(server, prompt) for prompt in PROMPTS}
        for seed in range(rounds):
            began = time.monotonic()
            found = gather(server, clients, right, seed)
            server.settle()
            assert found["right"] == clients - len(range(0, clients, 3)), found
            print(
                f"round {seed}: {dict(found)} in {time.monotonic() - began:.1f} s; no page held, nobody waits",
                flush=True,
            )


def answered(server: Address, prompt: str) -> str:
    """What the server says when nobody else asks; tests/test_http.py compares that with transformers."""
    answer = server.post("/v1/completions", asked(prompt, False)).json()["choices"][0]
    assert answer["finish_reason"] == "length" and len(answer["text"].split()) <= NEW
    return answer["text"]


def requests(folder: Path, examples: int) -> None:
    model = write_model(folder / "letters", letters=True, template=TEMPLATE)
    options = ["--concurrency", 64, "--step-tokens", 128, "--max-body", "64KiB"]
    with serving(model, folder / "fuzz.log", *options, context=96) as server:
        began = time.monotonic()
        statuses = fuzz(server, examples)
        server.settle()
        assert max(statuses) < 500, statuses
        print(f"{sum(statuses.values())} drawn requests, answered {dict(statuses)}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
