"""Start a vLLM server that ESPO can train with; every flag of vLLM passes through.

    espo-vllm runs/demo/actor --port 8000               a policy: a folder, or a name on the hub
    espo-vllm runs/demo/critic --critic --port 8001     its critic
    python -m espo_gateway --upstream http://127.0.0.1:8000       and what stops early, before it

The server decides by itself where a request that carries a gate ends (`scheduler.py`); with
`--no-decide` it leaves that to a gateway. `--critic` serves a sequence classifier with one label,
whose score of a prefix is V: what the gateway's `--critic URL` asks. `--value-head FOLDER` has the
policy tell V itself, by a head on its hidden states (`value_head.py`). Owns the defaults only, and
becomes vLLM (exec): same process, same signals, same exit code. A flag or variable that is given
wins over ours.

vLLM shows the routes that update weights only in its development mode, so VLLM_SERVER_DEV_MODE=1 is
set. The same mode lets anyone who reaches the port pause the server or reset its weights; hence the
loopback address, and the refusal of any other unless ESPO_ALLOW_REMOTE_ADMIN=1 says that the
network around the server is trusted.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from espo_gateway.addresses import is_loopback
from espo_gateway.files import is_folder, read_object
from espo_gateway.supervisor import PortInUseError, check_port_free
from espo_gateway.vllm_plugin import (
    BACKEND,
    ENGINE_ROUTE,
    SCHEDULER,
    VALUE_HEAD,
    VALUE_WORKER,
)
from espo_gateway.vllm_plugin.checkpoint_shape import Shape, check_fits

USAGE = "MODEL [--critic | --no-decide | --value-head FOLDER] [any flag of vllm serve]"
SERVER_MODULE = "vllm.entrypoints.launchers.api_server.entry"

#: flags for every server; a value of None is a flag without one
FLAGS: dict[str, str | None] = {
    "--host": "127.0.0.1",
    "--port": "8000",
    "--weight-transfer-config": json.dumps({"backend": BACKEND}),
    "--max-logprobs": "20",
    # Samples of the policy itself: no top-k, top-p or penalty that its checkpoint names
    "--generation-config": "vllm",
    "--disable-uvicorn-access-log": None,
}
#: for every server that samples: it decides by itself
DECIDING_FLAGS: dict[str, str | None] = {"--scheduler-cls": SCHEDULER}
#: `--critic`: V is the raw score of a prefix at its last token
CRITIC_FLAGS: dict[str, str | None] = {
    "--runner": "pooling",
    "--convert": "classify",
    "--pooler-config": json.dumps({"seq_pooling_type": "LAST", "use_activation": False}),
    # What a stream asks about is what it asked about before, and a few tokens more.
    "--enable-prefix-caching": None,
}
#: compiling takes long and gains little on CPU; `--no-enforce-eager` asks for it all the same
CPU_FLAGS: dict[str, str | None] = {
    "--enforce-eager": None,
    # On CPU the engine dies of the first request with a seed whose prompt it takes in pieces
    # ("CPU Generator does not use offset").
    "--no-enable-chunked-prefill": None,
    # Only whole blocks are shared: in vLLM's own, of 128, rollouts of a short prompt share none.
    "--block-size": "32",
}

#: the model in the engine's own process: with a worker beside it, each spins on a core while it
#: waits for the other, which halves what two cores can do
CPU_WHOLE_FLAGS: dict[str, str | None] = {
    "--distributed-executor-backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor"
}
#: that split a model, or copy it; vLLM's own workers then
SPLITTING = {
    *("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp"),
    *("--data-parallel-size", "-dp", "--prefill-context-parallel-size", "-pcp"),
}

ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    # Nothing is reported to anyone, and no start waits for a network.
    "VLLM_NO_USAGE_STATS": "1",
}
CPU_ENVIRONMENT = {
    "ESPO_ENGINE_NICE": "19",  # see yield_to_streams
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default vLLM takes most of the memory
    # vLLM binds to fixed cores, and a second server, the critic, to the same ones.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Threads that wait sleep: spinning ones would take the cores from the trainer beside them.
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
}
#: vLLM's attention in float32 is Triton's, whose products are TF32 by default: logprobs are then
#: 2.5e-3 off the trainer's in the mean, more than its proof of the weights lets pass
GPU_ENVIRONMENT = {"TRITON_F32_DEFAULT": "ieee"}
#: the runner whose hidden states a head of V is known to read
VALUE_ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
#: eager mode leaves one function compiled: the first request for logprobs waits 15 s for it
EAGER_ENVIRONMENT = {"TORCH_COMPILE_DISABLE": "1"}


#: bytes of weights under which a model is done sooner with its step than its tokens are delivered
SMALL = 100e6


class LaunchError(RuntimeError):
    """The server cannot be started like this; the message says what to change."""


def server_command(
    arguments: Sequence[str], *, cpu: bool, environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """vLLM's command line and environment for the arguments `MODEL [flags]`.

    Raises:
        LaunchError: when the model's folder does not exist or holds no critic where one is meant,
            a head is of another model, the port is busy, or the host would show the development
            routes to others.
    """
    if not arguments or arguments[0].startswith("-"):
        raise LaunchError(f"usage: espo-vllm {USAGE}")
    model, *given = arguments
    check_model(model)
    defaults = FLAGS | (CPU_FLAGS if cpu else {}) | {"--served-model-name": model}
    head = taken_out(given, "--value-head")
    if head and (other := {"--critic", "--no-decide"} & {*given}):
        raise LaunchError(
            f"--value-head: not with {other.pop()}, as the engine's decisions read it"
        )
    decides = "--no-decide" not in given
    if not decides:
        given.remove("--no-decide")
    if "--critic" in given:
        given.remove("--critic")
        check_critic(model, given)
        defaults |= CRITIC_FLAGS
    elif decides:
        defaults |= DECIDING_FLAGS
        # Of these there may be several: it stands beside those that are given.
        given[:0] = ["--middleware", ENGINE_ROUTE]
        if head:
            folder = Path(head).expanduser()
            if not (folder / "config.json").is_file():
                raise LaunchError(
                    f"--value-head: {head} is no folder with a config.json; make one with `python "
                    "-m espo_rl.pretrain_critic ROLLOUTS --model POLICY --head-only --layers N`"
                )
            if not {"--hf-overrides", "--hf-config-path"} & {*map(name_of, given)}:
                check_head(folder, model)
            defaults |= {"--worker-cls": VALUE_WORKER} | told_of_head(str(folder), given)
            environment = VALUE_ENVIRONMENT | dict(environment)

    chosen = {name_of(flag) for flag in given if flag.startswith("-")}
    if cpu and not chosen & SPLITTING:
        defaults |= CPU_WHOLE_FLAGS
    flags: list[str] = []
    for name, value in defaults.items():
        if not chosen & {name, name.replace("--", "--no-", 1)}:
            flags += [name] if value is None else [name, value]
    ours = ENVIRONMENT | (CPU_ENVIRONMENT if cpu else GPU_ENVIRONMENT)
    if cpu:
        ours |= {"OMP_NUM_THREADS": str(threads_for(model))}
    if cpu and "--no-enforce-eager" not in chosen:
        ours |= EAGER_ENVIRONMENT
    environment = ours | dict(environment)

    command = [sys.executable, "-m", SERVER_MODULE, "--model", model, *flags, *given]
    host = last_value(command, "--host")
    check_host(host, environment)
    port = last_value(command, "--port")
    if not port.isdecimal() or int(port) >= 2**16:
        raise LaunchError(f"--port {port}: give a number below 65536")
    try:
        check_port_free(host, int(port))
    except PortInUseError as error:
        raise LaunchError(str(error)) from error
    return command, environment


def told_of_head(folder: str, given: list[str]) -> dict[str, str]:
    """The flag by which the engine is told of a head, with what is given of the same setting.

    Raises LaunchError: that is no JSON object.
    """
    name, text = "--additional-config", "{}"
    if any(name_of(word).startswith(f"{name}.") for word in given):
        # Of a setting that is given key by key vLLM takes nothing else.
        return {f"{name}.{VALUE_HEAD}": json.dumps(folder)}
    while more := taken_out(given, name, "JSON object"):
        text = more
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise LaunchError(f"{name}: {text} is no JSON object, so no --value-head can be added")
    return {name: json.dumps(config | {VALUE_HEAD: folder})}


def taken_out(given: list[str], name: str, what: str = "folder") -> str:
    """The value of a flag, which is taken out of what vLLM gets; "" where it is not given.

    Raises LaunchError: it has none.
    """
    for position, word in enumerate(given):
        _, equals, value = word.partition("=")
        if word.startswith("-") and name_of(word) == name:
            if not equals:
                value = (*given, "")[position + 1]
            if not value or value.startswith("-"):
                raise LaunchError(f"{name}: give a {what}")
            del given[position : position + (1 if equals else 2)]
            return value
    return ""


def name_of(flag: str) -> str:
    """`--max_logprobs=5` -> `--max-logprobs`: vLLM takes both spellings."""
    return flag.partition("=")[0].replace("_", "-")


def last_value(command: Sequence[str], name: str) -> str:
    """The value that a flag has on a command line: the last one given."""
    value = ""
    for position, word in enumerate(command):
        if word.startswith("-") and name_of(word) == name:
            _, equals, joined = word.partition("=")
            value = joined if equals else (*command, "")[position + 1]
    return value


def check_model(model: str) -> None:
    """Raise LaunchError for a folder that is not there; names on the hub are vLLM's to find."""
    path = Path(model).expanduser()
    if is_folder(model) and not path.is_dir():
        raise LaunchError(
            f"no folder {model}; give a Hugging Face checkpoint's folder or its whole name on the "
            "hub, like openai-community/gpt2"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise LaunchError(f"{model} holds no config.json: not a Hugging Face checkpoint")


def check_head(head: Path, model: str) -> None:
    """Raise LaunchError for a head of another model, where the model is a folder.

    The engine reads the head itself, and refuses as well: after half a minute.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return
    of_head, of_model = (Shape.told_by(config_of(checkpoint)) for checkpoint in (head, folder))
    if of_head is None or of_model is None:
        return
    try:
        check_fits(head, of_head, of_model)
    except ValueError as error:
        raise LaunchError(f"--value-head: {error}") from error


def config_of(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises LaunchError: it is no JSON object."""
    path = folder / "config.json"
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise LaunchError(f"{path}: {error}; save the checkpoint anew") from error


def threads_for(model: str) -> int:
    """Of the cores, those that a model on a CPU computes with: all, but for a small one, which
    leaves one to who delivers its tokens."""
    cores = os.cpu_count() or 2
    weights = [*Path(model).expanduser().glob("*.safetensors")]
    small = weights and sum(file.stat().st_size for file in weights) < SMALL
    return max(1, cores - 1) if small else cores


def check_critic(model: str, given: Sequence[str]) -> None:
    """Raise LaunchError for a folder whose checkpoint is no classifier with one label."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return
    config = config_of(folder)
    architectures = config.get("architectures") or ["none"]
    labels = len(config.get("id2label") or (0, 1))
    # A policy's checkpoint lacks the head; where weights come later, so does the head.
    headed = architectures[0].endswith("ForSequenceClassification")
    if labels != 1 or not (headed or last_value(given, "--load-format") == "dummy"):
        raise LaunchError(
            f"{model} is no critic: its config.json tells of {architectures[0]} with {labels} "
            "labels; save a ...ForSequenceClassification with num_labels=1"
        )
    if not last_value(given, "--tokenizer") and not any(folder.glob("tokenizer*")):
        # vLLM wants one for a classifier, though a critic is asked with token ids.
        raise LaunchError(f"{model} holds no tokenizer: save the policy's there, or --tokenizer it")


def check_host(host: str, environment: Mapping[str, str]) -> None:
    """Raise LaunchError when the development routes would be open to other machines."""
    if is_loopback(host) or environment.get("VLLM_SERVER_DEV_MODE", "0") != "1":
        return
    if environment.get("ESPO_ALLOW_REMOTE_ADMIN") != "1":
        raise LaunchError(
            f"--host {host} would let other machines pause this server and change its weights "
            "(vLLM's development mode, which weight updates need): keep 127.0.0.1, or set "
            "ESPO_ALLOW_REMOTE_ADMIN=1 if everything that reaches the port is trusted"
        )
    print(
        f"WARNING: {host} is reachable from outside and administration is open there",
        file=sys.stderr,
    )


def is_cpu_build() -> bool:
    """Whether the installed vLLM is built for CPU; its metadata tell, importing it takes seconds.

    Raises:
        LaunchError: when vLLM is not installed.
    """
    for distribution in ("vllm-cpu", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return "cpu" in f"{distribution} {metadata.version(distribution)}"
    raise LaunchError(
        "vLLM is not installed; in the repository: pip install '.[gpu]' on a GPU machine, "
        "scripts/setup.sh on a CPU"
    )


def help_text() -> str:
    """What the command does, and the defaults that differ from vLLM's."""
    flags = {
        "every server": FLAGS,
        "without --critic and --no-decide": DECIDING_FLAGS | {"--middleware": ENGINE_ROUTE},
        "--critic": CRITIC_FLAGS,
        "on a CPU": CPU_FLAGS,
        "on a CPU, without -tp, -pp, -dp, -pcp": CPU_WHOLE_FLAGS,
    }
    variables = {
        "every server": ENVIRONMENT,
        "on a CPU": CPU_ENVIRONMENT | EAGER_ENVIRONMENT,
        "on a GPU": GPU_ENVIRONMENT,
        "--value-head": VALUE_ENVIRONMENT,
    }
    lines = [
        f"usage: espo-vllm {USAGE}",
        f"       python -m espo_gateway.vllm_plugin {USAGE}",
        f"\n{__doc__}",
    ]
    for when, defaults in flags.items():
        said = (name if value is None else f"{name} {value}" for name, value in defaults.items())
        lines += [f"flags, {when}:", *(f"  {one}" for one in said)]
    for when, values in variables.items():
        lines += [f"environment, {when}:", *(f"  {name}={v}" for name, v in values.items())]
    lines.append(f"  OMP_NUM_THREADS: all cores, one less for a model under {SMALL / 1e6:.0f} MB")
    return "\n".join(lines)


def main() -> int:
    """The command line; becomes vLLM, so it returns only from its help and on errors."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(help_text())
        return 0
    try:
        command, environment = server_command(
            sys.argv[1:], cpu=is_cpu_build(), environment=os.environ
        )
    except LaunchError as error:
        print(f"espo-vllm: {error}", file=sys.stderr)
        return 2
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    sys.exit(main())
