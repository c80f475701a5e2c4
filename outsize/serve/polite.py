"""uvicorn, ending as one would wish: who is being answered is told, and nothing is cancelled with a traceback."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from outsize.errors import RunError
from outsize.serve.http import Server

GRACE = 5  # seconds that requests have to be finished when the server is told to stop


class PoliteServer(uvicorn.Server):
    """Answers at `listening` until a signal comes, or another worker is lost. Requests under way then have `GRACE`
    seconds, or until a second signal; what is not finished is ended by the engine, with an error that says so."""

    def __init__(self, server: Server, listening: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(server.app, log_level="warning", access_log=False, timeout_graceful_shutdown=4 * GRACE)
        )
        self._service, self._listening = server.service, listening
        self._signals: list[int] = []
        self._closing = threading.Thread(target=self._service.close)

    def answer(self) -> signal.Signals:
        """Returns the first signal that came. Raises RunError when another worker is lost."""
        self.run(sockets=[self._listening])
        if self._closing.ident is not None:
            self._closing.join()  # or its scratch files would stay behind
        if self._lost is not None and not self._signals:
            raise self._lost
        return signal.Signals(self._signals[0])

    @property
    def _lost(self) -> RunError | None:
        failure = self._service.failure
        return failure if isinstance(failure, RunError) else None

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._lost is not None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise them again while its tasks still run."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals.append(sig)
        if len(self._signals) == 2:
            self._closing.start()
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        end = loop.call_later(GRACE, loop.run_in_executor, None, self._service.close)
        await super().shutdown(sockets)
        end.cancel()
