"""What a gateway is told when it starts, by flags, the environment, a TOML file or defaults."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields
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
#: The routes whose generations a monitor can follow: OpenAI's two, and vLLM's for trainers.
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOKENS = "/inference/v1/generate"
MONITORED = frozenset({COMPLETIONS, CHAT, TOKENS})
#: What may be a finish_reason.
WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")
#: Choices of one request, unless set otherwise.
MAX_CHOICES = 256
_DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

#: Groups of the help, by the field that each begins with.
_GROUPS = {
    "upstreams": "servers",
    "host": "listening",
    "gate": "stopping",
    "api_keys": "security",
    "log_level": "logs",
}
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]


def _setting(default: Any, text: str, *, metavar: str | None = None) -> Any:
    """A setting that is a flag too, with its help. metavar: by default as the type suggests."""
    metavar = metavar or {int: "N", float: "SECONDS"}.get(type(default), "FILE")
    return field(default=default, metadata={"metavar": metavar, "help": text})


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Config:
    """Every setting; times in seconds.

    gate: a gate's JSON, or the path of a file of it, which is read again on a reload; None for one
        that never stops.
    """

    upstreams: tuple[str, ...] = field(
        metadata={
            "metavar": "URL",
            "help": "an OpenAI-compatible server, http://host:port; several share the load",
        }
    )
    critic: str | None = _setting(
        None,
        "for gates with value 'critic': a vLLM server of the critic (start it with `python -m "
        "espo_gateway.vllm_plugin MODEL --critic`); your own class, as package.module:Class; or "
        "`engine`, servers that tell V themselves (started with --value-head), and decide",
        metavar="URL",
    )
    decide: Literal["auto", "gateway", "engine"] = _setting(
        "auto",
        "who decides where a choice ends: 'engine', servers that do so by themselves (started with "
        "`python -m espo_gateway.vllm_plugin`); the gateway, token by token; or auto: "
        "the servers, if all say that they do. A critic, a probe, tuning and recording need the "
        "gateway, which then decides",
    )
    affinity: Literal["none", "session", "prefix"] = _setting(
        "none",
        "keep a session (its X-Session-ID header, or `user`), or requests whose prompts begin "
        "alike (prefix), on one server, for its prefix cache",
    )
    attempts: Count = _setting(3, "tries of a request before its answer has begun")
    connect_timeout: Positive = _setting(5.0, "longest wait for a connection")
    first_token_timeout: Positive = _setting(
        600.0,
        "longest wait for an answer to begin, the server's queue included; none of those that "
        "servers give whole",
    )
    idle_timeout: Positive = _setting(600.0, "longest silence within an answer")
    total_timeout: NotNegative = _setting(0.0, "longest answer; 0: no limit")
    critic_timeout: Positive = _setting(
        60.0, "longest wait for a value, then the token does not stop"
    )
    health_interval: NotNegative = _setting(5.0, "time between two health checks; 0: none")
    breaker_failures: Count = _setting(5, "failures in a row after which a server is left alone")
    breaker_timeout: Positive = _setting(10.0, "how long, before a request may try it again")
    wait: NotNegative = _setting(
        0.0, "at the start, wait this long for all servers to answer, and give up if they do not"
    )

    host: str = _setting("127.0.0.1", "address to listen on", metavar="ADDRESS")
    port: Annotated[int, Field(ge=0, lt=2**16)] = _setting(8100, "0 takes a free one")
    max_in_flight: Count = _setting(
        4096, "choices generated at a time; a request with more than that takes turns with itself"
    )
    max_queue: Annotated[int, Field(ge=0)] = _setting(
        4096, "requests that may wait beyond these; the next gets a 429"
    )
    max_choices: Count = _setting(
        MAX_CHOICES, "most choices of a request: `n` times its prompts; each is a connection"
    )
    max_request_bytes: Count = _setting(64 * 2**20, "largest request body")
    request_timeout: Positive = _setting(60.0, "longest time a client may take to send its request")
    sse_keep_alive: NotNegative = _setting(
        0.0,
        "while a stream waits for its first token, send a comment so often, for clients and load "
        "balancers that give up on silence; 0: none but the server's own",
    )
    drain_timeout: NotNegative = _setting(
        600.0,
        "on SIGTERM running requests may take this long to finish; a second one ends them at once",
    )

    gate: bytes | Path | None = _setting(None, "the gate to start with, as JSON")
    target_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = _setting(
        None,
        "stop about this share of the requests: the gateway keeps the statistics and the "
        "threshold by itself (rule regret-only, or the gate's)",
        metavar="SHARE",
    )
    warmup: Annotated[int, Field(ge=2)] = _setting(
        512, "with --target-share: finished requests to learn from before any is stopped"
    )
    window: Count = _setting(64, "with --target-share: finished requests between two updates")
    state: Path | None = _setting(
        None, "with --target-share: where to keep what was learned, and to take it up from"
    )
    record: Path | None = _setting(
        None,
        "append a trace of every finished request, numbers only, as JSON lines for `calibrate`",
    )
    record_share: Annotated[float, Field(gt=0.0, le=1.0)] = _setting(
        1.0, "of the choices, those that are recorded, drawn by chance", metavar="SHARE"
    )
    record_megabytes: Positive = _setting(
        1024.0, "stop recording when the file is this large", metavar="MB"
    )
    record_ids: Literal["none", "sessions"] = _setting(
        "none",
        "with --record: token ids of prompts and answers too, of requests with X-Session-ID; they "
        "are text in all but name",
    )
    session_idle: Positive = _setting(
        600.0,
        "a session (X-Session-ID) without a request for so long is over; its traces are written "
        "then, together",
    )
    carry_over: Literal["none", "session"] = _setting(
        "none", "'session': a request's monitor goes on from that of its session's last"
    )
    unmonitored: Literal["pass", "refuse"] = _setting(
        "pass",
        "requests that cannot be monitored (beam search, a server without logprobs): 'pass' "
        "serves and marks them, 'refuse' answers with an error",
    )
    finish_reason: str = _setting(
        "length",
        "finish_reason of a stopped choice, and of those of some routes, as in "
        "length,/v1/completions=stop; the header X-Espo-Finish-Reason chooses one for a request; "
        "strict clients break on words that OpenAI does not use",
        metavar="WORD[,ROUTE=WORD...]",
    )

    api_keys: tuple[SecretStr, ...] = ()
    api_keys_file: Path | None = _setting(
        None, "keys that clients may use, one a line; none: no key"
    )
    admin_key: SecretStr | None = None
    admin_key_file: Path | None = _setting(
        None, "key of /espo; without one these routes are there only on a loopback address"
    )
    upstream_key: SecretStr | None = None
    upstream_key_file: Path | None = _setting(None, "the key that servers and critic are sent")

    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "how much is logged")
    log_format: Literal["text", "json"] = _setting("text", "lines to read, or JSON")

    def __post_init__(self) -> None:
        if not self.upstreams:
            raise ValueError("upstreams: at least one is needed")
        servers = [*(("upstreams", url) for url in self.upstreams), ("critic", self.critic_url)]
        for name, url in servers:
            if url is not None and not re.match(r"https?://[^/]", url):
                raise ValueError(f"{name}: a server must be like http://host:port, not {url!r}")
            if url is not None and not _has_port(url):
                raise ValueError(f"{name}: the port of {url} must be a number from 1 to 65535")
            if url is not None and urlsplit(url).username is not None:
                # It would stand in every log line and in /ready.
                raise ValueError(f"{name}: no key in the URL, please; use upstream_key_file")
        if self.critic_in_engine and (self.decide == "gateway" or self.target_share is not None):
            word = "decide" if self.decide == "gateway" else "target_share"
            raise ValueError(
                f"{word}: not with --critic engine, as the gateway, which decides then, knows no V"
            )
        _ = self.finish_reasons  # a bad one is known at once
        defaults = {one.name: one.default for one in fields(self)}
        for needed, names in (
            ("target_share", ("warmup", "window", "state")),
            ("record", ("record_share", "record_megabytes", "record_ids")),
        ):
            for name in names:
                if getattr(self, needed) is None and getattr(self, name) != defaults[name]:
                    raise ValueError(f"{name}: has no effect without {_flag(needed)}")
        if self.target_share is not None and self.carry_over != "none":
            raise ValueError(
                "carry_over: not with --target-share, which learns from requests by themselves"
            )
        if self.target_share is not None and self.warmup <= self.window:
            raise ValueError(
                f"warmup: must be more than --window ({self.window}): the first window sets the "
                "statistics, the rest of the warm-up the threshold"
            )

    @property
    def finish_reasons(self) -> dict[str, str]:
        """Of a stopped choice, by route; "" for the others. Raises ValueError."""
        found: dict[str, str] = {}
        for one in self.finish_reason.split(","):
            route, _, word = one.strip().rpartition("=")
            if not WORD.fullmatch(word) or (route and not route.startswith("/")):
                raise ValueError(
                    f"finish_reason: must be a word, or words for routes as in "
                    f"length,/v1/completions=stop, and not {one.strip()!r}"
                )
            if route and route not in MONITORED:
                raise ValueError(
                    f"finish_reason: {route} is none of the routes that are stopped, which are "
                    f"{', '.join(sorted(MONITORED))}"
                )
            if route in found:
                raise ValueError(
                    f"finish_reason: {found[route]!r} and {word!r} are two words for "
                    f"{route or 'all routes'}; leave one out"
                )
            found[route] = word
        return {"": "length"} | found

    @property
    def critic_class(self) -> str | None:
        """The critic when it is a class of the user's own: package.module:Class."""
        return self.critic if self.critic and _DOTTED.fullmatch(self.critic) else None

    @property
    def critic_url(self) -> str | None:
        """The critic when it is a server."""
        return None if self.critic_class or self.critic_in_engine else self.critic

    @property
    def critic_in_engine(self) -> bool:
        """Whether the servers themselves know V."""
        return self.critic == "engine"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        return is_loopback(self.host)

    @property
    def gate_named(self) -> str:
        """Where the gate comes from, for messages."""
        return f"--gate {self.gate}" if isinstance(self.gate, Path) else "gate"

    def read_gate(self) -> bytes | None:
        """The gate's JSON. Raises OSError."""
        return self.gate.read_bytes() if isinstance(self.gate, Path) else self.gate


def _has_port(url: str) -> bool:
    """Whether a URL's port is one that can be connected to, or left out."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def parse(
    arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
) -> Config:
    """The command line. Exits with a message, code 2, when it makes no sense."""
    parser = _parser()
    flags = vars(parser.parse_args(arguments))
    path: Path | None = flags.pop("config")
    variables: dict[str, Any] = {}
    try:
        variables = _from_environment(environment)
        given = {**_from_file(path), **variables, **flags}
        if "gate" in given:
            if not isinstance(given["gate"], str | Path):
                raise ValueError(f"{path}: gate must be the path of a JSON file")
            gate = given["gate"] = Path(given["gate"])
            gate.read_bytes()  # one that is not there is known at once
        if "upstreams" not in given:
            raise ValueError("--upstream URL is needed, or upstreams in the environment or file")
        return TypeAdapter(Config).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["loc"]:
            message = f"{first['loc'][0]}: {message}"
        name, _, wrong = message.partition(": ")
        source = f"{path}: {name}"
        if name in variables and name not in flags:
            source = _variable(name)
        elif name in flags or path is None:
            source = _flag(name)
        parser.error(f"{source}: {wrong}")
    except OSError as error:
        parser.error(f"cannot read {error.filename}: {error.strerror}")
    except ValueError as error:
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
    hints = get_type_hints(Config)
    for one in fields(Config):
        if one.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[one.name])
        if not one.metadata:
            continue
        text = one.metadata["help"]
        if one.default not in (None, MISSING):
            shown = f"{one.default:g}" if isinstance(one.default, float) else one.default
            text += f" (default: {shown})"
        options: dict[str, Any] = {"metavar": one.metadata["metavar"]}
        if get_origin(hints[one.name]) is Literal:
            options = {"choices": get_args(hints[one.name])}
        if one.name == "upstreams":
            options |= {"nargs": "+", "action": "extend", "dest": one.name}
        group.add_argument(_flag(one.name), help=text.replace("%", "%%"), **options)
    return parser


def _flag(name: str) -> str:
    return "--upstream" if name == "upstreams" else "--" + name.replace("_", "-")


def _variable(name: str) -> str:
    return "ESPO_GATEWAY_" + name.upper()


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = tomllib.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    names = [one.name for one in fields(Config)]
    if unknown := [name for name in found if name not in names]:
        raise ValueError(f"{path}: {_no_such(unknown[0], names)}")
    return found


def _no_such(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"{name}: no such setting; see --help" + (
        f" (did you mean {close[0]}?)" if close else ""
    )


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    names = {_variable(one.name): one.name for one in fields(Config)}
    given = {
        name: value
        for name, value in environment.items()
        if name.startswith(_variable("")) and not _of_kubernetes(name, value)
    }
    if unknown := [name for name in given if name not in names]:
        raise ValueError(_no_such(unknown[0], names))
    found: dict[str, Any] = {names[name]: value for name, value in given.items()}
    for name in ("upstreams", "api_keys"):
        if name in found:
            found[name] = tuple(re.split(r"[,\s]+", found[name].strip()))
    return found


def _of_kubernetes(variable: str, value: str) -> bool:
    """Whether it is one that tells a pod of a Service named espo-gateway."""
    name = variable.removeprefix(_variable(""))
    told = re.fullmatch(r"(SERVICE|PORT_\d+)_\w+", name) is not None
    return told or (name == "PORT" and re.match("(tcp|udp|sctp)://", value) is not None)
