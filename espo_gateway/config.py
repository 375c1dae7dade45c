"""What a gateway is told when it starts, by flags, the environment, a TOML file or defaults."""

from __future__ import annotations

import argparse
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, SecretStr, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from espo_gateway.addresses import is_loopback

_DESCRIPTION = """\
An OpenAI-compatible gateway that watches the tokens of every completion and ends a generation the
moment it has failed. Put it in front of one or more vLLM servers and point clients at it:

  python -m espo_gateway --upstream http://127.0.0.1:8000

So it stops nothing. Let it find out by itself when to, or give it a gate:

  python -m espo_gateway --upstream http://127.0.0.1:8000 --target-share 0.1
  python -m espo_gateway --upstream http://127.0.0.1:8000 --gate gate.json
"""
_EPILOG = """\
Every flag is also a key of the TOML file (max_in_flight = 64) and an environment variable
(ESPO_GATEWAY_MAX_IN_FLIGHT=64). Flags win over the environment, the environment over the file.
Keys are read from the file, from the environment, or from files of their own, never from flags:
ESPO_GATEWAY_API_KEYS, ESPO_GATEWAY_ADMIN_KEY and ESPO_GATEWAY_UPSTREAM_KEY.

`python -m espo_gateway calibrate --help` tells how to find a gate from recorded traces.
"""
_PREFIX = "ESPO_GATEWAY_"
_DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

#: Where a field stands in the help.
_SERVERS, _LISTENING, _STOPPING, _SECURITY, _LOGS = (
    "servers",
    "listening",
    "stopping",
    "security",
    "logs",
)
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Config:
    """Every setting; times in seconds.

    gate: a gate's JSON, or the path of a file of it, which is read again on a reload; None for one
        that never stops.
    """

    upstreams: tuple[str, ...]
    critic: str | None = None
    affinity: Literal["none", "session", "prefix"] = "none"
    attempts: Annotated[int, Field(ge=1)] = 3
    connect_timeout: Positive = 5.0
    first_token_timeout: Positive = 600.0
    idle_timeout: Positive = 600.0
    total_timeout: NotNegative = 0.0
    critic_timeout: Positive = 60.0
    health_interval: NotNegative = 5.0
    breaker_failures: Annotated[int, Field(ge=1)] = 5
    breaker_timeout: Positive = 10.0
    wait: NotNegative = 0.0

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, lt=2**16)] = 8100
    max_in_flight: Annotated[int, Field(ge=1)] = 4096
    max_queue: Annotated[int, Field(ge=0)] = 4096
    max_request_bytes: Annotated[int, Field(ge=1)] = 64 * 2**20
    request_timeout: Positive = 60.0
    drain_timeout: NotNegative = 600.0

    gate: bytes | Path | None = None
    target_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    warmup: Annotated[int, Field(ge=2)] = 512
    window: Annotated[int, Field(ge=1)] = 64
    state: Path | None = None
    record: Path | None = None
    record_megabytes: Positive = 1024.0
    unmonitored: Literal["pass", "refuse"] = "pass"
    finish_reason: str = "length"

    api_keys: tuple[SecretStr, ...] = ()
    api_keys_file: Path | None = None
    admin_key: SecretStr | None = None
    admin_key_file: Path | None = None
    upstream_key: SecretStr | None = None
    upstream_key_file: Path | None = None

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        if not self.upstreams:
            raise ValueError("upstreams: at least one is needed")
        servers = [*(("upstream", url) for url in self.upstreams), ("critic", self.critic_url)]
        for name, url in servers:
            if url is not None and not re.match(r"https?://[^/]", url):
                raise ValueError(f"{name}: a server must be like http://host:port, not {url!r}")
            if url is not None and urlsplit(url).username is not None:
                # It would stand in every log line and in /ready.
                raise ValueError(f"{name}: no key in the URL, please; use upstream_key_file")
        if self.target_share is None and self.state is not None:
            raise ValueError("state: needs target_share, as only tuning has a state")
        if self.target_share is not None and self.warmup <= self.window:
            raise ValueError(
                f"warmup: must be more than window ({self.window}): the first window sets the "
                "statistics, the rest of the warm-up the threshold"
            )

    @property
    def critic_class(self) -> str | None:
        """The critic when it is a class of the user's own: package.module:Class."""
        return self.critic if self.critic and _DOTTED.fullmatch(self.critic) else None

    @property
    def critic_url(self) -> str | None:
        """The critic when it is a server."""
        return None if self.critic_class else self.critic

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        return is_loopback(self.host)

    def read_gate(self) -> bytes | None:
        """The gate's JSON. Raises OSError."""
        return self.gate.read_bytes() if isinstance(self.gate, Path) else self.gate


#: Group, metavar and help of each field that is a flag.
_FLAGS: dict[str, tuple[str, str, str]] = {
    "upstreams": (
        _SERVERS,
        "URL",
        "an OpenAI-compatible server, http://host:port; several share the load",
    ),
    "critic": (
        _SERVERS,
        "URL",
        "for gates with value 'critic': a vLLM server of the critic (start it with `python -m "
        "espo_gateway.vllm_plugin MODEL --critic`), or your own class, as package.module:Class",
    ),
    "affinity": (
        _SERVERS,
        "KIND",
        "keep a session (its X-Session-ID header, or `user`), or requests whose prompts begin "
        "alike (prefix), on one server, for its prefix cache",
    ),
    "attempts": (_SERVERS, "N", "tries of a request before its answer has begun"),
    "connect_timeout": (_SERVERS, "SECONDS", "longest wait for a connection"),
    "first_token_timeout": (
        _SERVERS,
        "SECONDS",
        "longest wait for an answer to begin, the server's queue included",
    ),
    "idle_timeout": (_SERVERS, "SECONDS", "longest silence within an answer"),
    "total_timeout": (_SERVERS, "SECONDS", "longest answer; 0: no limit"),
    "critic_timeout": (
        _SERVERS,
        "SECONDS",
        "longest wait for a value, then the token does not stop",
    ),
    "health_interval": (_SERVERS, "SECONDS", "time between two health checks; 0: none"),
    "breaker_failures": (
        _SERVERS,
        "N",
        "failures in a row after which a server is left alone",
    ),
    "breaker_timeout": (
        _SERVERS,
        "SECONDS",
        "how long, before a request may try it again",
    ),
    "wait": (
        _SERVERS,
        "SECONDS",
        "at the start, wait this long for all servers to answer, and give up if they do not",
    ),
    "host": (_LISTENING, "ADDRESS", "address to listen on"),
    "port": (_LISTENING, "N", "0 takes a free one"),
    "max_in_flight": (_LISTENING, "N", "requests served at a time"),
    "max_queue": (_LISTENING, "N", "requests that may wait beyond these; the next gets a 429"),
    "max_request_bytes": (_LISTENING, "N", "largest request body"),
    "request_timeout": (
        _LISTENING,
        "SECONDS",
        "longest time a client may take to send its request",
    ),
    "drain_timeout": (
        _LISTENING,
        "SECONDS",
        "on SIGTERM running requests may take this long to finish; a second one ends them at once",
    ),
    "gate": (_STOPPING, "FILE", "the gate to start with, as JSON"),
    "target_share": (
        _STOPPING,
        "SHARE",
        "stop about this share of the requests: the gateway keeps the statistics and the "
        "threshold by itself (rule regret-only, or the gate's)",
    ),
    "warmup": (
        _STOPPING,
        "N",
        "with --target-share: finished requests to learn from before any is stopped",
    ),
    "window": (
        _STOPPING,
        "N",
        "with --target-share: finished requests between two updates",
    ),
    "state": (
        _STOPPING,
        "FILE",
        "with --target-share: where to keep what was learned, and to take it up from",
    ),
    "record": (
        _STOPPING,
        "FILE",
        "append a trace of every finished request, numbers only, as JSON lines for `calibrate`",
    ),
    "record_megabytes": (_STOPPING, "MB", "stop recording when the file is this large"),
    "unmonitored": (
        _STOPPING,
        "HOW",
        "requests that cannot be monitored (beam search, a server without logprobs): 'pass' serves "
        "and marks them, 'refuse' answers with an error",
    ),
    "finish_reason": (
        _STOPPING,
        "WORD",
        "finish_reason of a stopped choice; strict clients break on words that OpenAI does not use",
    ),
    "api_keys_file": (_SECURITY, "FILE", "keys that clients may use, one a line; none: no key"),
    "admin_key_file": (
        _SECURITY,
        "FILE",
        "key of /espo; without one these routes are there only on a loopback address",
    ),
    "upstream_key_file": (_SECURITY, "FILE", "the key that is sent to the servers"),
    "log_level": (_LOGS, "LEVEL", "how much is logged"),
    "log_format": (_LOGS, "FORMAT", "lines to read, or JSON"),
}


def parse(
    arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
) -> Config:
    """The command line. Exits with a message, code 2, when it makes no sense."""
    parser = _parser()
    flags = vars(parser.parse_args(arguments))
    path: Path | None = flags.pop("config")
    try:
        given = {**_from_file(path), **_from_environment(environment), **flags}
        if "gate" in given:
            given["gate"] = Path(given["gate"])
            given["gate"].read_bytes()  # one that is not there is known at once
        if "upstreams" not in given:
            raise ValueError("--upstream URL is needed, or upstreams in the environment or file")
        return TypeAdapter(Config).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        parser.error(f"{where}: {message}" if where else message)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m espo_gateway",
        usage="python -m espo_gateway --upstream URL [URL ...] [flags]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", type=Path, default=None, metavar="FILE", help="a TOML file of settings"
    )
    defaults = {field.name: field.default for field in fields(Config)}
    groups: dict[str, Any] = {}
    for name, (group, metavar, text) in _FLAGS.items():
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        default = defaults[name]
        if choices := _choices(name):
            metavar = "{" + ",".join(choices) + "}"
        if default not in (None, MISSING):
            shown = f"{default:g}" if isinstance(default, float) else default
            text += f" (default: {shown})"
        extra: dict[str, Any] = {"choices": choices} if choices else {}
        flag = "--" + name.replace("_", "-")
        if name == "upstreams":
            flag, extra = "--upstream", {"nargs": "+", "action": "extend", "dest": name}
        groups[group].add_argument(flag, metavar=metavar, help=text.replace("%", "%%"), **extra)
    return parser


def _choices(name: str) -> tuple[str, ...]:
    hint = get_type_hints(Config)[name]
    return get_args(hint) if get_origin(hint) is Literal else ()


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    names = {_PREFIX + field.name.upper(): field.name for field in fields(Config)}
    unknown = [n for n in environment if n.startswith(_PREFIX) and n not in names]
    if unknown:
        raise ValueError(f"{unknown[0]}: no such setting; see --help")
    found: dict[str, Any] = {names[n]: environment[n] for n in environment if n in names}
    for name in ("upstreams", "api_keys"):
        if name in found:
            found[name] = tuple(re.split(r"[,\s]+", found[name].strip()))
    return found
