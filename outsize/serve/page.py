"""The page at `/`: one file, which asks nobody but the server that it came from."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

from fastapi import Response

PAGE = Path(__file__).with_suffix(".html").read_text()


def _allowed(tag: str) -> str:
    """The page's own `tag`, by what it contains."""
    found = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in found)


HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            f"script-src {_allowed('script')}",
            f"style-src {_allowed('style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def page() -> Response:
    return Response(PAGE, media_type="text/html", headers=HEADERS)
