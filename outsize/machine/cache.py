"""What was measured and is kept for the next process: in the user's cache, which may be deleted."""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path


def cache_file(name: str, suffix: str, depends: Iterable[object], files: Iterable[Path] = ()) -> Path:
    """Where what is called `name` is kept: another file for another version, and where anything that it `depends` on is
    otherwise, or the content of one of `files`."""
    said = (version("outsize"), *depends, *(sha256(file.read_bytes()).hexdigest() for file in files if file.exists()))
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(cache) if cache else Path.home() / ".cache") / "outsize"
    return folder / f"{name}-{sha256(repr(said).encode()).hexdigest()[:12]}{suffix}"
