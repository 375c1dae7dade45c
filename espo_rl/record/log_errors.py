"""What a run says when its record cannot be written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LogError(RuntimeError):
    """The run's log cannot be written; the message says what to change."""


@contextmanager
def log_errors(what: object) -> Iterator[None]:
    """Turn a failure to write `what` into a LogError."""
    try:
        yield
    except OSError as error:
        raise LogError(
            f"cannot write {what}: {error.strerror or error}; free space or change run.output, "
            "then go on with --resume auto"
        ) from error
