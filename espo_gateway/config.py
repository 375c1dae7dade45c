"""What a gateway is told when it starts."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_DESCRIPTION = """\
An OpenAI-compatible gateway that watches the tokens of every completion and ends a generation the
moment it has failed. Put it in front of one or more vLLM servers and point clients at it:

  python -m espo_gateway --upstream http://127.0.0.1:8000

Until a gate is given nothing is stopped. Give one with --gate, or push one to a running gateway:

  curl -X PUT http://127.0.0.1:8100/espo/gate -d '{"rule": "value-gated", "beta": 2.0}'
"""


@dataclass(frozen=True)
class Config:
    """Times in seconds. gate: a gate's JSON, or None for one that never stops."""

    upstreams: tuple[str, ...]
    critic: str | None = None
    host: str = "127.0.0.1"
    port: int = 8100
    gate: bytes | None = None
    wait: float = 0.0
    connect_timeout: float = 5.0
    idle_timeout: float = 600.0
    critic_timeout: float = 60.0
    attempts: int = 3
    shutdown_timeout: float = 10.0
    max_request_bytes: int = 64 * 2**20
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not self.upstreams:
            raise ValueError("at least one upstream is needed")
        for url in (*self.upstreams, *([] if self.critic is None else [self.critic])):
            if not re.match(r"https?://[^/]", url):
                raise ValueError(f"a server must be like http://host:port, not {url!r}")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must lie in [0, 65535], not {self.port}")
        if not self.critic_timeout > 0.0:
            raise ValueError(f"critic-timeout must be positive, not {self.critic_timeout}")
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, not {self.attempts}")


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The command line. Exits with a message, code 2, when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m espo_gateway",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--upstream",
        dest="upstreams",
        nargs="+",
        action="extend",
        required=True,
        metavar="URL",
        help="an OpenAI-compatible server, http://host:port; several share the load",
    )
    add(
        "--critic",
        metavar="URL",
        help="a vLLM server of the critic, http://host:port, for gates with value 'critic'; "
        "start it with `python -m espo_gateway.vllm_plugin MODEL --critic`",
    )
    add("--host", default=Config.host, help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=Config.port, help="0 takes a free one (default: %(default)s)")
    add("--gate", type=Path, metavar="FILE", help="the gate to start with, as JSON")
    add(
        "--wait",
        type=float,
        default=Config.wait,
        metavar="SECONDS",
        help="wait this long for all servers to answer, and give up if they do not",
    )
    add(
        "--idle-timeout",
        type=float,
        default=Config.idle_timeout,
        metavar="SECONDS",
        help="longest silence of an upstream, its queue included (default: %(default)g)",
    )
    add(
        "--critic-timeout",
        type=float,
        default=Config.critic_timeout,
        metavar="SECONDS",
        help="longest wait for a value, then the token does not stop (default: %(default)g)",
    )
    add(
        "--attempts",
        type=int,
        default=Config.attempts,
        metavar="N",
        help="tries of a request before its answer has begun (default: %(default)s)",
    )
    add(
        "--log-level",
        default=Config.log_level,
        choices=("debug", "info", "warning", "error"),
        help="(default: %(default)s)",
    )
    options = vars(parser.parse_args(arguments))
    path: Path | None = options.pop("gate")
    try:
        gate = path.read_bytes() if path is not None else None
        return Config(**{**options, "upstreams": tuple(options["upstreams"])}, gate=gate)
    except (OSError, ValueError) as error:
        parser.error(str(error))
