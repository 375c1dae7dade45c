"""The supervisor: real processes, real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from espo_gateway.supervisor import (
    PortInUseError,
    ServerProcess,
    ServerStartError,
    check_port_free,
    free_port,
)

# A family of three: a child in the command's session, and a grandchild that leaves it. All ignore
# SIGTERM when asked to. The command writes their process ids once all of them run.
FAMILY = """
import os, signal, sys, time
out, stubborn = sys.argv[1], sys.argv[2] == "stubborn"
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
read, write = os.pipe()
if (child := os.fork()) == 0:
    if (grandchild := os.fork()) == 0:
        os.setsid()
        os.write(write, b"%d " % os.getpid())
        time.sleep(600)
    os.write(write, b"%d " % os.getpid())
    os._exit(0) if sys.argv[3:] == ["orphan"] else time.sleep(600)
pids = b""
while pids.count(b" ") < 2:
    pids += os.read(read, 100)
with open(out + ".new", "wb") as file:
    file.write(pids + b"%d" % os.getpid())
os.rename(out + ".new", out)
if sys.argv[3:] == ["orphan"]:
    sys.exit(7)
time.sleep(600)
"""

HTTP_SERVER = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1"]


def family(out: Path, *options: str) -> list[str]:
    return [sys.executable, "-c", FAMILY, str(out), *(options or ("kind",))]


def guarded(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "espo_gateway.supervisor", "--", *command],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def read_pids(path: Path) -> list[int]:
    """Process ids of a family, once it is complete."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, "the family never came up"
        time.sleep(0.02)
    return [int(pid) for pid in path.read_text().split()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_gone(pids: list[int], seconds: float) -> None:
    """Wait until none of the processes runs."""
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if running(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.02)


def test_whole_tree_ends_when_the_pipe_closes(tmp_path: Path) -> None:
    guard = guarded(family(tmp_path / "pids"))
    pids = read_pids(tmp_path / "pids")
    assert all(map(running, pids))
    assert guard.stdin is not None
    guard.stdin.close()
    assert guard.wait(timeout=20) == 128 + signal.SIGTERM
    wait_gone(pids, 0.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_whole_tree_ends_on_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    guard = guarded(family(tmp_path / "pids"))
    pids = read_pids(tmp_path / "pids")
    guard.send_signal(number)
    assert guard.wait(timeout=20) == 128 + signal.SIGTERM
    wait_gone(pids, 0.0)


def test_exit_code_and_no_orphans_when_the_command_ends_by_itself(tmp_path: Path) -> None:
    guard = guarded(family(tmp_path / "pids", "kind", "orphan"))
    pids = read_pids(tmp_path / "pids")
    assert guard.wait(timeout=20) == 7
    wait_gone(pids, 0.0)


def test_processes_that_ignore_sigterm_are_killed(tmp_path: Path) -> None:
    script = (
        "import sys; from espo_gateway.supervisor import guard;"
        "sys.exit(guard(sys.argv[1:], grace=0.3))"
    )
    guard = subprocess.Popen(
        [sys.executable, "-c", script, *family(tmp_path / "pids", "stubborn")],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    pids = read_pids(tmp_path / "pids")
    assert guard.stdin is not None
    guard.stdin.close()
    assert guard.wait(timeout=20) == 128 + signal.SIGKILL
    wait_gone(pids, 0.0)


# A trainer, as it were: starts a server and waits for ever.
PARENT = """
import asyncio, sys
from pathlib import Path
from espo_gateway.supervisor import ServerProcess

async def main():
    folder, port = Path(sys.argv[1]), sys.argv[2]
    server = [sys.executable, "-c", sys.argv[3], str(folder / "pids"), "kind"]
    command = ["sh", "-c", '"$@" & exec "$PYTHON" -m http.server --bind 127.0.0.1 "$PORT"', "sh"]
    await ServerProcess.start(
        [*command, *server],
        env={"PYTHON": sys.executable, "PORT": port},
        log_path=folder / "log",
        ready_url=f"http://127.0.0.1:{port}/",
        timeout=60,
    )
    (folder / "ready").touch()
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_sigkill_of_the_parent_ends_the_whole_tree(tmp_path: Path) -> None:
    port = free_port()
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), str(port), FAMILY])
    try:
        pids = read_pids(tmp_path / "pids")
        read_ready = tmp_path / "ready"
        deadline = time.monotonic() + 60
        while not read_ready.exists():
            assert parent.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert all(map(running, pids))
        parent.kill()
        parent.wait()
        wait_gone(pids, 20.0)
        check_port_free("127.0.0.1", port)
    finally:
        parent.kill()
        parent.wait()


async def test_server_process_becomes_ready_and_stops(tmp_path: Path) -> None:
    port = free_port()
    server = await ServerProcess.start(
        [*HTTP_SERVER, str(port)],
        log_path=tmp_path / "logs" / "server.log",
        ready_url=f"http://127.0.0.1:{port}/",
        timeout=60,
    )
    assert server.alive
    # Its own session: Ctrl-C in the terminal of the parent does not reach it.
    assert os.getsid(server.pid) == server.pid != os.getsid(0)
    await server.stop()
    assert not server.alive
    check_port_free("127.0.0.1", port)
    await server.stop()


async def test_wait_returns_when_the_server_dies(tmp_path: Path) -> None:
    port = free_port()
    server = await ServerProcess.start(
        [*HTTP_SERVER, str(port)],
        log_path=tmp_path / "log",
        ready_url=f"http://127.0.0.1:{port}/",
        timeout=60,
    )
    [child] = children(server.pid)
    os.kill(child, signal.SIGKILL)
    assert await asyncio.wait_for(server.wait(), 20) == 128 + signal.SIGKILL
    assert not server.alive
    await server.stop()


async def test_a_server_that_exits_fails_fast_with_its_log(tmp_path: Path) -> None:
    script = "print('no such model'); raise SystemExit(3)"
    with pytest.raises(ServerStartError, match=r"critic exited with code 3(.|\n)*no such model"):
        await ServerProcess.start(
            [sys.executable, "-c", script],
            log_path=tmp_path / "log",
            ready_url=f"http://127.0.0.1:{free_port()}/",
            name="critic",
            timeout=60,
        )


async def test_the_cause_is_shown_though_it_stands_far_above_the_end(tmp_path: Path) -> None:
    script = "print('KeyError: the cause'); print('noise\\n' * 50); raise SystemExit(1)"
    with pytest.raises(ServerStartError, match="KeyError: the cause"):
        await ServerProcess.start(
            [sys.executable, "-c", script],
            log_path=tmp_path / "log",
            ready_url=f"http://127.0.0.1:{free_port()}/",
            timeout=60,
        )


async def test_a_log_keeps_what_an_earlier_server_said(tmp_path: Path) -> None:
    for word in ("first", "second"):
        with pytest.raises(ServerStartError) as error:
            await ServerProcess.start(
                [sys.executable, "-c", f"raise SystemExit('{word}Error: cause')"],
                log_path=tmp_path / "log",
                ready_url=f"http://127.0.0.1:{free_port()}/",
                name="critic",
                timeout=60,
            )
        # Only its own words are told.
        assert str(error.value).endswith(f"log:\n{word}Error: cause")
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.partition(" started ")[0] for line in lines] == [
        *("-- critic", "firstError: cause"),
        *("-- critic", "secondError: cause"),
    ]


async def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(ServerStartError, match=r"policy: cannot write its log .*logs/policy\.log"):
        await ServerProcess.start(
            ["true"],
            log_path=tmp_path / "logs" / "policy.log",
            ready_url=f"http://127.0.0.1:{free_port()}/health",
            name="policy",
        )


async def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ServerStartError, match="cannot start no-such-program"):
        await ServerProcess.start(
            ["no-such-program"],
            log_path=tmp_path / "log",
            ready_url=f"http://127.0.0.1:{free_port()}/",
            timeout=60,
        )


async def test_a_server_that_is_never_ready_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(ServerStartError, match="not ready after 2 s"):
        await ServerProcess.start(
            family(tmp_path / "pids"),
            log_path=tmp_path / "log",
            ready_url=f"http://127.0.0.1:{free_port()}/",
            timeout=2,
        )
    wait_gone(read_pids(tmp_path / "pids"), 0.0)


async def test_busy_port_is_refused_and_says_what_to_change(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=rf"127.0.0.1:{port}.*--port"):
            await ServerProcess.start(
                [*HTTP_SERVER, str(port)],
                log_path=tmp_path / "log",
                ready_url=f"http://127.0.0.1:{port}/",
            )
