"""Environment variables that are read in every call, as they may change between calls."""

from __future__ import annotations

import os
from functools import cache


def variable(name: str) -> str | None:
    """``os.environ.get(name)``, faster where the variable is unset.

    ``os.environ`` finds that out by an exception, which takes longer (1.5 us) than all else of choosing a
    backend.  The dictionary behind it is asked first, where there is one.
    """
    environ = os.environ
    known = getattr(environ, "_data", None)
    if known is not None and _key(name) not in known:
        return None
    return environ.get(name)


@cache
def _key(name: str) -> object:
    """The key of a variable in the dictionary behind ``os.environ``: bytes, or upper case on Windows."""
    return os.environ.encodekey(name)
