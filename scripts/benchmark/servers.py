"""Everything that is measured, each in processes of its own, and their processor time."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmark.load import KEY
from espo_gateway.supervisor import ServerProcess, free_port

HERE = Path(__file__).resolve().parent
#: The paper's rule at a threshold nothing reaches, so that every token is monitored and none is
#: stopped.
GATE = {"rule": "value-gated", "value": "constant", "beta": 1e6}

_NGINX = """\
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream bench {{ server {upstream}; keepalive 64; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://bench; proxy_buffering off; proxy_http_version 1.1;
      proxy_set_header Connection "";
    }}
  }}
}}
"""
_LITELLM = """\
model_list:
  - model_name: policy
    litellm_params: {{model: hosted_vllm/policy, api_base: "{upstream}/v1", api_key: none}}
litellm_settings: {{telemetry: false, drop_params: false, num_retries: 0}}
"""


@dataclass(frozen=True)
class Proxy:
    """A running server and where it listens."""

    url: str
    process: ServerProcess

    def processor_seconds(self) -> float:
        """User and system time of all its processes, those that have ended included."""
        total = 0.0
        for process in psutil.Process(self.process.pid).children(recursive=True):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
        return total


async def start_upstream(folder: Path, step_ms: float) -> Proxy:
    port = free_port()
    module = [sys.executable, "-m", "benchmark.upstream", "--port", str(port)]
    return await _start("upstream", folder, port, [*module, "--step-ms", str(step_ms)])


async def start_passthrough(folder: Path, upstream: str) -> Proxy:
    port = free_port()
    module = [sys.executable, "-m", "benchmark.passthrough", "--port", str(port)]
    return await _start("passthrough", folder, port, [*module, "--upstream", upstream])


async def start_gateway(
    folder: Path,
    upstream: str,
    gate: bytes | None = None,
    profile: Path | None = None,
    flags: Sequence[str] = (),
) -> Proxy:
    """profile: where cProfile writes what the gateway did, once it is stopped."""
    port = free_port()
    path = folder / "gate.json"
    path.write_bytes(gate or json.dumps(GATE).encode())
    profiler = ["-m", "cProfile", "-o", str(profile)] if profile else []
    command = [sys.executable, *profiler, "-m", "espo_gateway", "--upstream", upstream]
    return await _start(
        "gateway", folder, port, [*command, "--port", str(port), "--gate", str(path), *flags]
    )


async def start_nginx(folder: Path, upstream: str, binary: str) -> Proxy:
    port = free_port()
    config = folder / "nginx.conf"
    address = upstream.removeprefix("http://")
    config.write_text(_NGINX.format(folder=folder, port=port, upstream=address))
    return await _start("nginx", folder, port, [binary, "-p", str(folder), "-c", str(config)])


async def start_litellm(folder: Path, upstream: str, python: str) -> Proxy:
    port = free_port()
    config = folder / "litellm.yaml"
    config.write_text(_LITELLM.format(upstream=upstream))
    code = "from litellm import run_server; run_server()"
    command = [python, "-c", code, "--config", str(config), "--host", "127.0.0.1"]
    return await _start(
        "litellm",
        folder,
        port,
        [*command, "--port", str(port), "--num_workers", "1"],
        ready="/health/liveliness",
    )


async def _start(
    name: str, folder: Path, port: int, command: Sequence[str], *, ready: str = "/health"
) -> Proxy:
    url = f"http://127.0.0.1:{port}"
    here = str(HERE.parent)
    process = await ServerProcess.start(
        command,
        log_path=folder / f"{name}.log",
        ready_url=url + ready,
        name=name,
        env={
            "PYTHONPATH": os.pathsep.join([here, str(HERE.parent.parent)]),
            "PYTHONHASHSEED": "0",
            # Else it looks up its models' prices in the internet as it starts.
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_MASTER_KEY": KEY,
        },
    )
    return Proxy(url, process)


def nginx_binary() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
