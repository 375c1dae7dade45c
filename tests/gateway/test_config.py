"""Settings: what wins over what, and where a bad one is said to come from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from espo_gateway.config import parse

UPSTREAM = ["--upstream", "http://a", "http://b"]


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('upstreams = ["http://c"]\nport = 1\nattempts = 1\nmax_queue = 1\n')
    environment = {"ESPO_GATEWAY_PORT": "2", "ESPO_GATEWAY_ATTEMPTS": "2", "ELSE": "x"}
    config = parse(["--config", str(file), "--port", "3", *UPSTREAM], environment)
    assert (config.port, config.attempts, config.max_queue) == (3, 2, 1)
    assert config.upstreams == ("http://a", "http://b")
    assert parse([], {"ESPO_GATEWAY_UPSTREAMS": "http://a, http://b"}).upstreams == config.upstreams


@pytest.mark.parametrize(
    ("flags", "environment", "text", "message"),
    [
        (["--port", "x"], {"ESPO_GATEWAY_PORT": "1"}, "port = 1", "--port: .*integer"),
        ([], {"ESPO_GATEWAY_PORT": "x"}, "port = 1", "ESPO_GATEWAY_PORT: .*integer"),
        ([], {}, "port = 'x'", r"g\.toml: port: .*integer"),
        ([], {}, "prot = 1", r"g\.toml: prot: "),
        ([], {"ESPO_GATEWAY_PROT": "1"}, "", "ESPO_GATEWAY_PROT: no such setting; see --help"),
        ([], {"ESPO_GATEWAY_PROT": "1"}, "", "did you mean ESPO_GATEWAY_PORT?"),
        ([], {}, "max_inflight = 3", "max_inflight: no such setting; see --help"),
        ([], {}, "max_inflight = 3", "did you mean max_in_flight?"),
        ([], {}, "port = ", r"g\.toml: Invalid value"),
        (["--gate", "/no/such"], {}, "", "cannot read /no/such: No such file"),
        ([], {}, "gate = { rule = 'regret-only' }", r"g\.toml: gate must be the path of a JSON"),
        ([], {}, "gate = 5", r"g\.toml: gate must be the path of a JSON file"),
        (["--finish-reason", "two words"], {}, "", "--finish-reason: must be a word"),
        (["--finish-reason", "v1=stop"], {}, "", "and not 'v1=stop'"),
        (["--finish-reason", "length,"], {}, "", "--finish-reason: must be a word"),
        (["--finish-reason", "stop,foo"], {}, "", "'stop' and 'foo' are two words for all routes"),
        (["--warmup", "99"], {}, "", "--warmup: has no effect without --target-share"),
        (["--record-share", "0.5"], {}, "", "--record-share: has no effect without --record"),
        ([], {"ESPO_GATEWAY_STATE": "x"}, "", "ESPO_GATEWAY_STATE: has no effect without"),
        ([], {}, "window = 9", r"g\.toml: window: has no effect without --target-share"),
        (["--upstream", "a"], {}, "", "--upstream: a server must be like http://host:port"),
        (["--upstream", "http://a:80000"], {}, "", "--upstream: the port of http://a:80000 must"),
        (["--upstream", "http://a:8000x"], {}, "", "--upstream: the port of http://a:8000x must"),
        (["--critic", "http://a:0/v1"], {}, "", "--critic: the port of http://a:0/v1 must"),
        (["--finish-reason", "/v1/completion=stop"], {}, "", "--finish-reason: /v1/completion is"),
        (["--log-level", "x"], {}, "", "--log-level: invalid choice"),
        (["--record-ids", "sessions"], {}, "", "--record-ids: has no effect without --record"),
        (
            ["--carry-over", "session", "--target-share", "0.1"],
            {},
            "",
            "--carry-over: not with --target-share",
        ),
        (
            ["--critic", "engine", "--decide", "gateway"],
            {},
            "",
            "--decide: not with --critic",
        ),
        (
            ["--critic", "engine", "--target-share", "0.1"],
            {},
            "",
            "--target-share: not with",
        ),
        (["--session-idle", "0"], {}, "", "--session-idle: .*greater than 0"),
    ],
)
def test_a_bad_setting_is_named_with_its_source(
    flags: list[str],
    environment: dict[str, str],
    text: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "g.toml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        parse(["--config", str(tmp_path / "g.toml"), *UPSTREAM, *flags], environment)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_kubernetes_says_of_a_service_of_that_name_is_no_setting() -> None:
    service = {
        "ESPO_GATEWAY_SERVICE_HOST": "10.0.0.1",
        "ESPO_GATEWAY_SERVICE_PORT": "8100",
        "ESPO_GATEWAY_SERVICE_PORT_HTTP": "8100",
        "ESPO_GATEWAY_PORT": "tcp://10.0.0.1:8100",
        "ESPO_GATEWAY_PORT_8100_TCP": "tcp://10.0.0.1:8100",
        "ESPO_GATEWAY_PORT_8100_TCP_PROTO": "tcp",
        "ESPO_GATEWAY_PORT_8100_TCP_PORT": "8100",
        "ESPO_GATEWAY_PORT_8100_TCP_ADDR": "10.0.0.1",
    }
    assert parse(UPSTREAM, service) == parse(UPSTREAM, {})
