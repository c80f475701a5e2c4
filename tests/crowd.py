"""Many clients at once, of which a third are slow, cancel, or send rubbish."""

from __future__ import annotations

import json
import random
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from server import KEY, Address

NEW = 20  # tokens that each polite client asks for
PROMPTS = [f"w{number} w{number + 1} w3" for number in range(2, 12)]


def gather(server: Address, count: int, right: dict[str, str], seed: int) -> Counter[str]:
    """Send `count` clients all at once; how each fared. Two thirds are polite, and hear `right[prompt]` or an
    AssertionError is raised."""

    def one(number: int) -> str:
        draw = random.Random(f"{seed} {number}")
        return polite(server, right, draw) if number % 3 else draw.choice(RUDE)(server, draw)

    with ThreadPoolExecutor(count) as crowd:
        return Counter(crowd.map(one, range(count)))


def polite(server: Address, right: dict[str, str], draw: random.Random) -> str:
    """Asks, comes again when told to, and takes its answer whole or streamed."""
    prompt, streamed = draw.choice(PROMPTS), draw.random() < 0.5
    while True:
        answer = server.post("/v1/completions", asked(prompt, streamed))
        if answer.status_code != 429:
            break
        time.sleep(float(answer.headers["Retry-After"]) * draw.uniform(0.2, 1.0))
    assert answer.status_code == 200, answer.text
    chunks = events(answer.text) if streamed else [answer.json()]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == right[prompt], f"{prompt!r} was answered {text!r}, not {right[prompt]!r}"
    return "right"


def asked(prompt: str, streamed: bool) -> dict[str, object]:
    options = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True, "stream": streamed}
    return {"model": "tiny", "prompt": prompt, **options}


def events(text: str) -> list[dict]:
    """The chunks of a stream, which ends as it should."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# -- the rude -------------------------------------------------------------------------------------------------------


def rubbish(server: Address, draw: random.Random) -> str:
    """Bytes that are no request, or none that can be served."""
    good = asked("w1", False)
    endings = [("temperature", "hot"), ("n", -3), ("stop", [""]), ("prompt", [[10**30]]), ("max_tokens", 10**12)]
    bodies = [draw.randbytes(draw.randrange(300)), b"", b"[" * 5000, *({**good, k: v} for k, v in endings)]
    answer = server.post(draw.choice(("/v1/completions", "/v1/chat/completions")), draw.choice(bodies))
    assert answer.status_code == 400, (answer.status_code, answer.text)
    return "refused"


def silent(server: Address, draw: random.Random) -> str:
    """Begins to send a request, and goes."""
    text = request_text(asked("w9", True))
    with connect(server) as connection:
        connection.sendall(text[: draw.randrange(1, len(text))])
        time.sleep(draw.uniform(0, 1))
    return "silent"


def leaving(server: Address, draw: random.Random) -> str:
    """Asks for a long answer, hears nothing or a little of it, and goes."""
    body = {**asked(draw.choice(PROMPTS), draw.random() < 0.7), "max_tokens": 55, "n": draw.randrange(1, 4)}
    with connect(server) as connection:
        connection.sendall(request_text(body))
        connection.settimeout(draw.uniform(0.01, 2))
        with suppress(TimeoutError):
            connection.recv(draw.randrange(1, 2000))
    return "left"


def slow(server: Address, draw: random.Random) -> str:
    """Sends a few bytes at a time, reads a few bytes at a time, and so to the end."""
    text = request_text({**asked(draw.choice(PROMPTS), True), "max_tokens": 8})
    step = len(text) // 10
    with connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        for start in range(0, len(text), step):
            connection.sendall(text[start : start + step])
            time.sleep(draw.uniform(0, 0.1))
        heard = b""
        while piece := connection.recv(200):
            heard += piece
            time.sleep(draw.uniform(0, 0.02))
    assert b"[DONE]" in heard or b" 429 " in heard.splitlines()[0], heard
    return "slow"


RUDE = (rubbish, silent, leaving, slow)


def request_text(body: dict[str, object]) -> bytes:
    text = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", "Connection: close"]
    return "\r\n".join([*lines, f"Content-Length: {len(text)}", "", ""]).encode() + text


def connect(server: Address) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=120)
