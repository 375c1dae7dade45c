"""The launcher's decisions; starting real servers is in test_*_vllm.py."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from espo_gateway.supervisor import free_port
from espo_gateway.vllm_plugin import ENGINE_ROUTE, SCHEDULER, VALUE_HEAD, VALUE_WORKER
from espo_gateway.vllm_plugin.__main__ import USAGE, LaunchError, last_value, server_command
from espo_rl.base_model.train import make_tokenizer
from tests.helpers.models import random_critic

HUB_MODEL = "org/model"


def build(
    *arguments: str, cpu: bool = True, **environment: str
) -> tuple[list[str], dict[str, str]]:
    return server_command(
        [HUB_MODEL, "--port", str(free_port()), *arguments], cpu=cpu, environment=environment
    )


def test_defaults() -> None:
    command, environment = build()
    assert last_value(command, "--host") == "127.0.0.1"
    assert json.loads(last_value(command, "--weight-transfer-config")) == {"backend": "espo"}
    assert int(last_value(command, "--max-logprobs")) == 20
    assert last_value(command, "--generation-config") == "vllm"
    assert last_value(command, "--served-model-name") == HUB_MODEL
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "--enforce-eager" in command
    assert "--no-enable-chunked-prefill" in command
    assert environment["TORCH_COMPILE_DISABLE"] == "1"


def test_what_is_given_wins() -> None:
    command, environment = build(
        "--max_logprobs=5", "--host", "localhost", VLLM_CPU_KVCACHE_SPACE="4"
    )
    assert sum("max" in word for word in command) == 1
    assert last_value(command, "--max-logprobs") == "5"
    assert command.count("--host") == 1
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "4"


def test_flags_pass_through_in_order() -> None:
    given = ["--runner", "pooling", "--convert", "classify", "--served-model-name", "a", "b"]
    command, _ = build(*given)
    assert command[-len(given) :] == given


def test_the_server_decides_unless_told_not_to() -> None:
    command, _ = build("--middleware", "a.b")
    assert last_value(command, "--scheduler-cls") == SCHEDULER
    assert [command[n + 1] for n, word in enumerate(command) if word == "--middleware"] == [
        *(ENGINE_ROUTE, "a.b"),
    ]
    for flag in ("--no-decide", "--critic"):
        command, _ = build(flag)
        assert not {"--scheduler-cls", "--middleware", "--no-decide"} & set(command)
    command, _ = build("--scheduler-cls", "x.Y")
    assert command.count("--scheduler-cls") == 1


@pytest.mark.parametrize("flag", [("--value-head", "{}"), ("--value-head={}",)])
def test_a_head_makes_the_engine_tell_v(flag: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    given = [word.format(tmp_path) for word in flag]
    command, environment = build(*given, "--max-num-seqs", "4")
    assert last_value(command, "--worker-cls") == VALUE_WORKER
    assert json.loads(last_value(command, "--additional-config")) == {VALUE_HEAD: str(tmp_path)}
    assert command[-2:] == ["--max-num-seqs", "4"]
    assert not {*given} & {*command} - {str(tmp_path)}
    assert environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    for other in ("--critic", "--no-decide"):
        with pytest.raises(LaunchError, match=f"--value-head: not with {other}"):
            build(*given, other)


@pytest.mark.parametrize(
    ("given", "others"),
    [
        (("--additional-config", '{"a": {"b": 1}}'), {"a": {"b": 1}}),
        (('--additional_config={"a": 1}', "--additional-config", '{"c": 2}'), {"c": 2}),
    ],
)
def test_a_head_is_told_beside_what_is_given_of_its_setting(
    given: tuple[str, ...], others: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    command, _ = build("--value-head", str(tmp_path), *given)
    told = json.loads(last_value(command, "--additional-config"))
    assert told == {**others, VALUE_HEAD: str(tmp_path)}
    assert sum("additional" in word for word in command) == 1


def test_a_head_is_told_beside_keys_of_its_setting(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    given = ["--additional_config.a", "1", "--additional-config.b.c=2"]
    command, _ = build("--value-head", str(tmp_path), *given)
    # vLLM puts keys together to the one JSON that it then reads.
    assert "--additional-config" not in command
    told = command.index(f"--additional-config.{VALUE_HEAD}")
    assert json.loads(command[told + 1]) == str(tmp_path)
    assert command[-3:] == given


@pytest.mark.parametrize("given", ["[1]", "{", "--port"])
def test_a_setting_that_a_head_cannot_be_added_to_is_refused(given: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LaunchError, match=r"--additional-config: .* JSON object"):
        build("--value-head", str(tmp_path), "--additional-config", given)


def test_a_head_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A shell leaves this ~ to the program.
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    command, _ = build("--value-head=~")
    assert json.loads(last_value(command, "--additional-config")) == {VALUE_HEAD: str(tmp_path)}


@pytest.mark.parametrize("given", [[], ["--port"], ["/nowhere/at/all"]])
def test_a_head_that_is_none_is_refused(given: list[str]) -> None:
    with pytest.raises(LaunchError, match=r"--value-head: (give a|/nowhere/at/all is no) folder"):
        server_command([HUB_MODEL, "--value-head", *given], cpu=True, environment={})


def head_and_model(folder: Path, head: str, model: str) -> list[str]:
    """A command line for folders with these configs."""
    for name, config in (("head", head), ("model", model)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
    return [str(folder / "model"), "--value-head", str(folder / "head"), "--port", "0"]


MODEL = '{"num_hidden_layers": 2, "hidden_size": 8}'


@pytest.mark.parametrize(
    ("head", "model"),
    [
        ('{"num_hidden_layers": 3, "hidden_size": 8}', MODEL),
        ('{"num_hidden_layers": 1, "hidden_size": 4}', MODEL),
        # Of a model that sees, too, the text's part counts.
        ('{"num_hidden_layers": 3, "hidden_size": 8}', f'{{"text_config": {MODEL}}}'),
    ],
)
def test_a_head_of_another_model_is_refused(head: str, model: str, tmp_path: Path) -> None:
    arguments = head_and_model(tmp_path, head, model)
    with pytest.raises(LaunchError, match=r"of \d layers of width \d, and .* has 2 of 8: fit one"):
        server_command(arguments, cpu=True, environment={})
    # What changes the model's config is vLLM's to read.
    server_command([*arguments, "--hf-overrides", "{}"], cpu=True, environment={})


@pytest.mark.parametrize(
    ("head", "model"),
    [
        ('{"num_hidden_layers": 2, "hidden_size": 8}', MODEL),
        ('{"num_hidden_layers": 1, "hidden_size": 8, "text_config": null}', MODEL),
        ('{"num_hidden_layers": 9, "hidden_size": null}', MODEL),
        (MODEL, '{"text_config": [], "num_hidden_layers": "2"}'),
    ],
)
def test_a_head_that_may_be_of_the_model_is_the_engines_to_read(
    head: str, model: str, tmp_path: Path
) -> None:
    server_command(head_and_model(tmp_path, head, model), cpu=True, environment={})


@pytest.mark.parametrize("broken", ["{", "[]", "\xff"])
@pytest.mark.parametrize("which", ["head", "model"])
def test_a_config_that_is_none_is_named(broken: str, which: str, tmp_path: Path) -> None:
    arguments = head_and_model(tmp_path, MODEL, MODEL)
    (tmp_path / which / "config.json").write_bytes(broken.encode("latin-1"))
    with pytest.raises(LaunchError, match=f"{which}/config.json.* save the checkpoint anew"):
        server_command(arguments, cpu=True, environment={})
    if which == "model":
        with pytest.raises(LaunchError, match=r"config.json.* save the checkpoint anew"):
            server_command([arguments[0], "--critic", "--port", "0"], cpu=True, environment={})


def test_compiling_can_be_asked_for() -> None:
    command, environment = build("--no-enforce-eager")
    assert "--enforce-eager" not in command
    assert "TORCH_COMPILE_DISABLE" not in environment


@pytest.mark.parametrize(
    ("flags", "alone"),
    [
        ((), True),
        (("--max-num-seqs", "4"), True),
        (("-tp", "2"), False),
        (("--tensor_parallel_size=2",), False),
        (("--data-parallel-size", "2"), False),
        (("-pp=2",), False),
        (("--distributed-executor-backend", "mp"), False),
    ],
)
def test_on_a_cpu_the_model_is_in_the_engines_process(flags: tuple[str, ...], alone: bool) -> None:
    command, _ = build(*flags)
    backend = last_value(command, "--distributed-executor-backend")
    assert backend.endswith(".UniProcExecutor") is alone
    assert not last_value(build(cpu=False)[0], "--distributed-executor-backend")


def test_a_small_model_leaves_a_core_to_delivery(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    for size, left in ((10**6, 1), (10**9, 0)):
        os.truncate(weights, size)
        _, environment = server_command(
            [str(tmp_path), "--port", str(free_port())], cpu=True, environment={}
        )
        assert int(environment["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 2) - left)
    _, environment = build(OMP_NUM_THREADS="7")
    assert environment["OMP_NUM_THREADS"] == "7"


def test_gpu_keeps_vllms_own_choices() -> None:
    command, environment = build(cpu=False)
    assert not {"--enforce-eager", "--no-enable-chunked-prefill"} & set(command)
    assert not environment.keys() & {"OMP_WAIT_POLICY", "TORCH_COMPILE_DISABLE"}


def test_float32_is_float32_on_a_gpu() -> None:
    """Under Triton's own default, TF32, the proof of the weights fails: seen on an H200."""
    assert build(cpu=False)[1]["TRITON_F32_DEFAULT"] == "ieee"
    assert build(cpu=False, TRITON_F32_DEFAULT="tf32")[1]["TRITON_F32_DEFAULT"] == "tf32"
    assert "TRITON_F32_DEFAULT" not in build()[1]


def test_one_word_makes_a_critic() -> None:
    command, _ = build("--critic", "--port", "8001")
    assert "--critic" not in command
    assert last_value(command, "--runner") == "pooling"
    assert last_value(command, "--convert") == "classify"
    # Verified against vLLM: with these names it takes the last token's score as it is.
    assert json.loads(last_value(command, "--pooler-config")) == {
        "seq_pooling_type": "LAST",
        "use_activation": False,
    }
    assert "--enable-prefix-caching" in command
    assert json.loads(last_value(command, "--weight-transfer-config")) == {"backend": "espo"}


def test_what_is_given_wins_over_the_critics_flags() -> None:
    command, _ = build("--critic", "--no-enable-prefix-caching", "--convert=reward")
    assert "--enable-prefix-caching" not in command
    assert last_value(command, "--convert") == "reward"


@pytest.fixture
def critic_folder(tmp_path: Path) -> Path:
    random_critic(0).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_critics_checkpoint_will_do(critic_folder: Path) -> None:
    arguments = [str(critic_folder), "--critic", "--port", str(free_port())]
    server_command(arguments, cpu=True, environment={})
    for file in critic_folder.glob("tokenizer*"):
        file.unlink()
    server_command([*arguments, "--tokenizer", "org/policy"], cpu=True, environment={})
    with pytest.raises(LaunchError, match="holds no tokenizer"):
        server_command(arguments, cpu=True, environment={})


def test_a_config_will_do_where_the_weights_come_later(critic_folder: Path) -> None:
    """As a trainer has it before its critic was ever saved: the policy's, with one label."""
    file = critic_folder / "config.json"
    change = {"architectures": ["Qwen2ForCausalLM"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    arguments = [str(critic_folder), "--critic", "--port", str(free_port())]
    server_command([*arguments, "--load-format", "dummy"], cpu=True, environment={})
    with pytest.raises(LaunchError, match="is no critic"):
        server_command(arguments, cpu=True, environment={})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM with 1 labels"),
        ({"architectures": None}, "none with 1 labels"),
        ({"id2label": {"0": "BAD", "1": "GOOD"}}, "ForSequenceClassification with 2 labels"),
        ({"id2label": None}, "ForSequenceClassification with 2 labels"),  # Hugging Face's default
    ],
    ids=str,
)
def test_what_is_no_critic_is_refused(
    critic_folder: Path, change: dict[str, object], told: str
) -> None:
    file = critic_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(LaunchError, match=f"is no critic.*{told}"):
        server_command([str(critic_folder), "--critic"], cpu=True, environment={})


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "gpu-3.example", "::"])
def test_administration_is_not_opened_to_other_machines(host: str) -> None:
    with pytest.raises(LaunchError, match="ESPO_ALLOW_REMOTE_ADMIN"):
        build("--host", host)


def test_remote_administration_can_be_allowed_and_warns(capsys: pytest.CaptureFixture[str]) -> None:
    build("--host", "0.0.0.0", ESPO_ALLOW_REMOTE_ADMIN="1")
    assert "WARNING" in capsys.readouterr().err


def test_without_development_mode_any_host_will_do(capsys: pytest.CaptureFixture[str]) -> None:
    build("--host", "0.0.0.0", VLLM_SERVER_DEV_MODE="0")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("model", ["/no/such/folder", "./missing", "runs/base", "nosuch"])
def test_a_folder_that_is_not_there(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LaunchError, match=rf"no folder {model}; give"):
        server_command([model], cpu=True, environment={})


@pytest.mark.parametrize("port", ["abc", "-1", "70000", ""])
def test_a_port_that_is_none(port: str) -> None:
    with pytest.raises(LaunchError, match=f"--port {port}: give a number"):
        build(f"--port={port}")


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"config\.json"):
        server_command([str(tmp_path)], cpu=True, environment={})


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "espo_gateway.vllm_plugin", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_command_line_says_that_the_port_is_busy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run(HUB_MODEL, "--port", str(port))
    assert result.returncode == 2
    assert result.stderr.startswith(f"espo-vllm: cannot listen on 127.0.0.1:{port}")


def test_command_line_without_a_model() -> None:
    result = run("--port", "1")
    assert result.returncode == 2
    assert "usage" in result.stderr


def test_command_line_help_needs_no_vllm() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: espo-vllm {USAGE}")
    assert f"espo_gateway.vllm_plugin {USAGE}" in result.stdout
    scheduler = f"--scheduler-cls {SCHEDULER}"
    for default in ("--max-logprobs 20", scheduler, "--enforce-eager", "VLLM_SERVER_DEV_MODE=1"):
        assert f"  {default}\n" in result.stdout
