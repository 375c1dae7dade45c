"""One look for every progress bar; all are silent where the output is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

#: rich forgets what is older than this when it estimates the time left; a step may take an hour
MEMORY_SECONDS = 86_400.0


def progress_bar(*, transient: bool = True, console: Console | None = None) -> Progress:
    """A bar with a count and the time left."""
    console = console or Console()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        speed_estimate_period=MEMORY_SECONDS,
        # Not `is_terminal`: FORCE_COLOR, as many CIs set it, would make a log file count as one.
        disable=not console.file.isatty() or console.is_dumb_terminal,
    )


class RunProgress:
    """The bar over a run's steps, which names the phase; under it the phase's own bar."""

    def __init__(self, console: Console, steps: int) -> None:
        self._bars = progress_bar(console=console)
        self._steps = steps
        self._line: TaskID | None = None
        self._phase = ""

    def start(self, done: int) -> None:
        """Show the bar, with this many steps done before."""
        self._bars.start()
        self._line = self._bars.add_task("steps", total=self._steps, completed=done)

    def stop(self) -> None:
        self._bars.stop()

    def steps_done(self, done: int) -> None:
        assert self._line is not None
        self._bars.update(self._line, completed=done)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Name the phase while it lasts. With a total, it has a bar: call what is yielded to
        advance it by one."""
        assert self._line is not None
        outer = self._phase
        self._name_phase(name)
        own = None if total is None else self._bars.add_task(f"  {name}", total=total)
        try:
            yield lambda: None if own is None else self._bars.advance(own)
        finally:
            if own is not None:
                self._bars.remove_task(own)
            self._name_phase(outer)

    def _name_phase(self, name: str) -> None:
        assert self._line is not None
        self._phase = name
        self._bars.update(self._line, description=f"steps ({name})" if name else "steps")
