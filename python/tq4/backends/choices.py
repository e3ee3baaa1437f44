"""Which kernels a backend takes, by environment variable: choices for tests and tuning."""

from __future__ import annotations

from collections.abc import Iterable

from ..environment import variable as environment_variable


def choice(variable: str, names: Iterable[str]) -> str:
    """The value of an environment variable, "auto" where it is unset.

    Raises:
        ValueError: the value is none of ``names``.
    """
    name = environment_variable(variable)
    if name is None:
        return "auto"
    if name not in names:
        raise ValueError(f"{variable}: expected {', '.join(names)}, got {name!r}")
    return name


def decodes_short_queries() -> bool:
    """Whether the sequences of a prefill that have few query tokens go to the decode kernels."""
    return choice("TQ4_PREFILL_SHORT", ("auto", "prefill")) == "auto"
