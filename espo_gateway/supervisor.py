"""Child servers that never outlive their parent.

Owns the life of one command: a guard process stands between parent and command, holds the read end
of a pipe whose write end only the parent has, and ends the whole process tree when that pipe
closes. A pipe closes however its owner dies, SIGKILL included, so nothing depends on clean-up code
that may never run.

    python -m espo_gateway.supervisor -- COMMAND [ARGUMENT ...]    (stdin: the pipe)

    server = await ServerProcess.start(command, log_path=log, ready_url=f"{url}/health")
    ...
    await server.stop()
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Self
from urllib.parse import urlsplit

# Only the standard library at import: the guard lives as long as its command and should stay small.

GRACE_SECONDS = 10.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # from linux/prctl.h


class ServerStartError(RuntimeError):
    """A server that exited, or was not ready in time; the message ends with its last log lines."""


class PortInUseError(ServerStartError):
    """Something else listens on the port."""


class ServerProcess:
    """A running server under a guard. Make it with `start`."""

    def __init__(
        self, guard: subprocess.Popen[bytes], *, name: str, log_path: Path, log_start: int
    ) -> None:
        self._guard = guard
        self.name = name
        self.log_path = log_path
        self._log_start = log_start

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        *,
        log_path: Path,
        ready_url: str,
        env: Mapping[str, str | None] | None = None,
        name: str = "server",
        timeout: float = 300.0,  # noqa: ASYNC109 (of the start-up, which is then undone)
    ) -> Self:
        """Start a command and wait until `ready_url` answers 200.

        Args:
            command: the program and its arguments.
            log_path: file that its output is added to, after a line that says when it was started;
                its folder is made.
            ready_url: polled until ready; its port must be free beforehand.
            env: variables set on top of this process's own; None takes one away.
            name: what to call it in errors.
            timeout: seconds it may take to become ready.

        Raises:
            PortInUseError: when something listens on the port already.
            ServerStartError: when its log cannot be written, and when it exits or is not ready in
                time; then nothing of it is left.
        """
        address = urlsplit(ready_url)
        check_port_free(address.hostname or "127.0.0.1", address.port or 80)
        variables: dict[str, str | None] = {**os.environ, **(env or {})}
        with _begun(log_path, name) as log:
            log_start = log.tell()
            # Not asyncio's: the server outlives the event loop that started it.
            guard = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-m", "espo_gateway.supervisor", "--", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={name: value for name, value in variables.items() if value is not None},
                # Ctrl-C in a terminal goes to its foreground group; the parent decides instead.
                start_new_session=True,
            )
        server = cls(guard, name=name, log_path=log_path, log_start=log_start)
        try:
            await server._wait_ready(ready_url, timeout)
        except BaseException:
            await server.stop()
            raise
        return server

    @property
    def pid(self) -> int:
        """Process id of the guard; the command is its child."""
        return self._guard.pid

    @property
    def alive(self) -> bool:
        """Whether the command still runs."""
        return self._guard.poll() is None

    async def wait(self) -> int:
        """Wait until the command has ended and return its exit code (128 + n for signal n)."""
        while (code := self._guard.poll()) is None:  # noqa: ASYNC110 (an event needs a loop)
            await asyncio.sleep(0.05)
        return code

    async def stop(self) -> int:
        """End the whole process tree and return the exit code. Safe to call more than once."""
        assert self._guard.stdin is not None
        with contextlib.suppress(OSError):
            self._guard.stdin.close()
        try:
            return await asyncio.wait_for(self.wait(), GRACE_SECONDS + 10.0)
        except TimeoutError:
            raise RuntimeError(
                f"{self.name}: guard {self.pid} did not end its processes, see {self.log_path}"
            ) from None

    @property
    def log(self) -> str:
        """What it has said since it was started."""
        return self.log_path.read_bytes()[self._log_start :].decode(errors="replace")

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of its log, and before them the first errors: a cause stands above."""
        text = self.log.splitlines()
        above, tail = text[:-lines], text[-lines:]
        causes = [line for line in above if re.search(r"\w(Error|Exception): ", line)][:3]
        return "\n".join([*causes, *(["..."] if above else []), *tail])

    async def _wait_ready(self, url: str, seconds: float) -> None:
        import aiohttp

        deadline = time.monotonic() + seconds
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0)) as session:
            while True:
                if not self.alive:
                    problem = f"exited with code {self._guard.returncode} before it was ready"
                    break
                if time.monotonic() > deadline:
                    problem = f"was not ready after {seconds:.0f} s ({url})"
                    break
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(url) as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(0.1)
        raise ServerStartError(
            f"{self.name} {problem}; the end of {self.log_path}:\n{self.log_tail()}"
        )


def _begun(log_path: Path, name: str) -> BinaryIO:
    """A server's log, open, with the line that says when it was started."""
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = log_path.open("ab")
        # What an earlier one left stays: it may say why that one fell.
        log.write(f"-- {name} started {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n".encode())
        log.flush()
        return log
    except OSError as error:
        raise ServerStartError(
            f"{name}: cannot write its log {log_path}: {error.strerror}; free space or choose "
            "another folder"
        ) from error


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def check_port_free(host: str, port: int) -> None:
    """Raise `PortInUseError` when the port cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As servers do: a port whose last connections are in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUseError(
                f"cannot listen on {host}:{port} ({error.strerror}): stop what uses the port "
                "or choose another one (--port)"
            ) from error


def guard(command: Sequence[str], *, grace: float = GRACE_SECONDS) -> int:
    """Run a command until it ends, stdin closes or SIGTERM/SIGINT comes; end its whole tree.

    Returns:
        the command's exit code, 128 + n when signal n ended it.
    """
    become_subreaper()
    # Signals write to a pipe, so one select() waits for them and for the parent alike.
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: asked.append(received))
    signal.signal(signal.SIGCHLD, lambda *_: None)

    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_guard
    )
    exits: dict[int, int] = {}
    stdin = sys.stdin.fileno()
    while child.pid not in exits and not asked:
        ready, _, _ = select.select([stdin, woken], [], [])
        if stdin in ready and not os.read(stdin, 4096):
            break
        drain(woken)
        exits |= reap()

    deadline = time.monotonic() + grace
    signal_tree(child.pid, signal.SIGTERM)
    while tree(child.pid) and (left := deadline - time.monotonic()) > 0.0:
        select.select([woken], [], [], min(left, 0.1))
        drain(woken)
        exits |= reap()
    while tree(child.pid):
        signal_tree(child.pid, signal.SIGKILL)
        select.select([woken], [], [], 0.1)
        drain(woken)
        exits |= reap()
    code = child.returncode = exits[child.pid]
    return code if code >= 0 else 128 - code


def become_subreaper() -> None:
    """Adopt every descendant whose parent dies, so that leaving the session hides none (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_guard() -> None:
    """In the child: should even the guard be killed, end the command (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """In a child process that was spawned: it is killed however its parent ends (Linux).

    parent: its process id, as it may have ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(0)


def drain(pipe: int) -> None:
    """Empty a non-blocking pipe."""
    with contextlib.suppress(BlockingIOError):
        while os.read(pipe, 4096):
            pass


def reap() -> dict[int, int]:
    """Collect every child that has ended: its process id and exit code (-n for signal n)."""
    exits = {}
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            exits[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    return exits


def tree(group: int) -> list[int]:
    """Process ids of all living descendants; without /proc, the group's id while it has members."""
    if sys.platform != "linux":
        try:
            os.killpg(group, 0)
        except OSError:
            return []
        return [group]
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # "pid (name) state ppid ...": the name may hold anything, so count from its end.
            stat = Path(entry.path, "stat").read_text(errors="replace")
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [os.getpid()]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def signal_tree(group: int, number: signal.Signals) -> None:
    """Send a signal to all that `tree` names."""
    for pid in tree(group):
        with contextlib.suppress(OSError):
            if sys.platform == "linux":
                os.kill(pid, number)
            else:
                os.killpg(pid, number)


def main() -> int:
    """The guard's command line."""
    if sys.argv[1:2] != ["--"] or len(sys.argv) < 3:
        print("usage: python -m espo_gateway.supervisor -- COMMAND [ARGUMENT ...]", file=sys.stderr)
        return 2
    try:
        return guard(sys.argv[2:])
    except FileNotFoundError as error:
        print(f"cannot start {sys.argv[2]}: {error}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main())
