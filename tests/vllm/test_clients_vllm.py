"""Clients that people use, unchanged, get from the gateway what they get from vLLM.

What `openai` asks plainly is in `test_openai_client_vllm.py`; here are its helpers, LangChain's
ChatOpenAI, lm-evaluation-harness and `vllm bench serve`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import huggingface_hub.constants
import lm_eval
import pytest
import pytest_asyncio
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_openai import ChatOpenAI
from lm_eval.tasks import TaskManager
from openai import LengthFinishReasonError, OpenAI, pydantic_function_tool
from pydantic import BaseModel
from transformers import AutoTokenizer

from espo_gateway.front.gateway import Gateway
from tests.helpers.gateway import client_of, gateway_for, metric
from tests.helpers.models import text_checkpoint
from tests.helpers.vllm import STRICT, VllmServer, comparable, launch, rounded

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

#: What a client does with a server: its URL, and the served model.
Use = Callable[[str, VllmServer], Any]

MESSAGES: Any = [{"role": "user", "content": "Is 1 + 2 even?"}]
FIXED: dict[str, Any] = {"temperature": 0.0, "seed": 7}


class Verdict(BaseModel):
    """Whether a sum is even."""

    even: bool
    size: Literal["small", "large"]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def text_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmServer]:
    """A server of a random policy that can write JSON, with tools."""
    outputs = {"backend": "xgrammar", "disable_any_whitespace": True}
    server = await launch(
        text_checkpoint(tmp_path_factory.mktemp("text") / "checkpoint", seed=0),
        *("--structured-outputs-config", json.dumps(outputs)),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    )
    yield server
    await server.process.stop()


def told(value: Any) -> Any:
    """What a client makes of an answer, as plain values that do not name it."""
    if isinstance(value, AIMessageChunk):
        # Of a stream the last chunk's finish reason is the answer's; ids are each answer's own.
        value = {"text": value.content, "calls": value.tool_calls, "usage": value.usage_metadata}
    elif isinstance(value, AIMessage):
        about = {n: v for n, v in value.response_metadata.items() if n != "id"}
        value = {"text": value.content, "calls": value.tool_calls, "about": about}
    elif isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.loads(json.dumps(value), object_hook=comparable)


async def through_and_direct(
    server: VllmServer, use: Callable[[str], Awaitable[Any]], **settings: Any
) -> tuple[Any, Any]:
    async with gateway_for(server, **{"gate": None, **settings}) as gateway:
        return told(await use(gateway.url)), told(await use(server.url))


def no_spaces(server: VllmServer) -> dict[str, int]:
    """A bias against what a random policy would write for ever between two words of a call."""
    tokenizer = AutoTokenizer.from_pretrained(server.path)
    return {str(token): -100 for token in tokenizer.convert_tokens_to_ids([*"ĠĉĊč"])}


# -- openai's helpers ----------------------------------------------------------------------------


def openai_parsed(url: str, server: VllmServer) -> Any:
    with OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.parse(
            model=server.model, messages=MESSAGES, response_format=Verdict, **FIXED
        )
    assert isinstance(answer.choices[0].message.parsed, Verdict)
    return answer


def openai_streamed(url: str, server: VllmServer) -> Any:
    with (
        OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client,
        client.chat.completions.stream(
            model=server.model, messages=MESSAGES, response_format=Verdict, logprobs=True, **FIXED
        ) as stream,
    ):
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert isinstance(answer.choices[0].message.parsed, Verdict)
    return answer


async def openai_streamed_async(url: str, server: VllmServer) -> Any:
    async with (
        client_of(url) as client,
        client.chat.completions.stream(
            model=server.model, messages=MESSAGES, max_tokens=24, **FIXED
        ) as stream,
    ):
        pieces = [event.delta async for event in stream if event.type == "content.delta"]
        with pytest.raises(LengthFinishReasonError) as cut:  # which this helper makes an error
            await stream.get_final_completion()
    answer = cut.value.completion
    assert "".join(pieces) == answer.choices[0].message.content
    return answer


async def openai_parsed_tool(url: str, server: VllmServer) -> Any:
    tool = {"type": "function", "function": {"name": "Verdict"}}
    async with client_of(url) as client:
        answer = await client.chat.completions.parse(
            model=server.model,
            messages=MESSAGES,
            tools=[pydantic_function_tool(Verdict)],
            tool_choice=tool,  # type: ignore[arg-type]
            logit_bias=no_spaces(server),
            **FIXED,
        )
    [call] = answer.choices[0].message.tool_calls or []
    return {"name": call.function.name, "arguments": call.function.arguments}


# -- LangChain -----------------------------------------------------------------------------------


def chat(url: str, server: VllmServer, **settings: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=url + "/v1",
        api_key="none",  # type: ignore[arg-type]
        model=server.model,
        max_completion_tokens=128,
        max_retries=0,
        **{**FIXED, **settings},
    )


def langchain_invoke(url: str, server: VllmServer) -> Any:
    return chat(url, server, logprobs=True, top_logprobs=2).invoke("1 + 2 =")


def langchain_stream(url: str, server: VllmServer) -> Any:
    chunks = list(chat(url, server, stream_usage=True).stream("1 + 2 ="))
    assert len(chunks) > 2
    return sum(chunks[1:], chunks[0])


async def langchain_astream(url: str, server: VllmServer) -> Any:
    chunks = [chunk async for chunk in chat(url, server, stream_usage=True).astream("1 + 2 =")]
    return sum(chunks[1:], chunks[0])


def langchain_batch(url: str, server: VllmServer) -> Any:
    asked: list[list[BaseMessage]] = [[HumanMessage("1 + 2 =")], [HumanMessage("3 + 4 =")]]
    answers = chat(url, server, n=2, temperature=1.0).generate(asked)
    return [[one.text for one in generations] for generations in answers.generations]


def langchain_json_schema(url: str, server: VllmServer) -> Any:
    found = chat(url, server).with_structured_output(Verdict).invoke("1 + 2?")
    assert isinstance(found, Verdict)
    return found


def langchain_function_calling(url: str, server: VllmServer) -> Any:
    model = chat(url, server, logit_bias=no_spaces(server))
    structured = model.with_structured_output(Verdict, method="function_calling", strict=True)
    found = structured.invoke("1 + 2?")
    assert isinstance(found, Verdict)
    return found


async def langchain_tool_stream(url: str, server: VllmServer) -> Any:
    model = chat(url, server, logit_bias=no_spaces(server))
    model_with_tool = model.bind_tools([Verdict], tool_choice="Verdict", strict=True)
    chunks = [chunk async for chunk in model_with_tool.astream("1 + 2?")]
    answer = sum(chunks[1:], chunks[0])
    assert isinstance(answer, AIMessageChunk)
    assert Verdict(**answer.tool_calls[0]["args"])
    return [{"name": call["name"], "args": call["args"]} for call in answer.tool_calls]


def langchain_tool_or_not(url: str, server: VllmServer) -> Any:
    return chat(url, server).bind_tools([Verdict]).invoke("1 + 2?")


USES: dict[str, Use] = {
    "openai: parse": openai_parsed,
    "openai: stream": openai_streamed,
    "openai: async stream": openai_streamed_async,
    "openai: parse a tool": openai_parsed_tool,
    "langchain: invoke": langchain_invoke,
    "langchain: stream": langchain_stream,
    "langchain: astream": langchain_astream,
    "langchain: generate": langchain_batch,
    "langchain: json_schema": langchain_json_schema,
    "langchain: function_calling": langchain_function_calling,
    "langchain: tool, astream": langchain_tool_stream,
    "langchain: tool or not": langchain_tool_or_not,
}


async def used(use: Use, url: str, server: VllmServer) -> Any:
    """A synchronous client works in a thread: the gateway is in this one's loop."""
    if asyncio.iscoroutinefunction(use):
        return await use(url, server)
    return await asyncio.to_thread(use, url, server)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
async def test_a_client_gets_the_same(text_server: VllmServer, use: Use) -> None:
    through, direct = await through_and_direct(text_server, lambda url: used(use, url, text_server))
    assert through == rounded(direct)


async def test_langchain_takes_a_stopped_answer(text_server: VllmServer) -> None:
    async with gateway_for(text_server, gate=STRICT) as gateway:
        model = chat(gateway.url, text_server, temperature=1.0, stream_usage=True)
        whole = await model.ainvoke("1 + 2 =")
        chunks = [chunk async for chunk in model.astream("1 + 2 =")]
        stops = await metric(gateway, "espo_gateway_stops_total")
    assert stops == 2
    streamed = sum(chunks[1:], chunks[0])
    assert whole.response_metadata["finish_reason"] == "length"
    assert streamed.response_metadata["finish_reason"] == "length"
    assert whole.content == streamed.content


# -- lm-evaluation-harness -----------------------------------------------------------------------

#: Ten sums, one of two results to be told by likelihood; and to be written.
SUMS = [(a, 2 * a + 1) for a in range(10)]
TASKS = {
    "sums_chosen": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["{{right}}", "{{wrong}}"]
doc_to_target: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "sums_written": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{right}}"
generation_kwargs: {until: ["7"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    rows = [{"question": f"{a}+{b}=", "right": str(a + b), "wrong": str(a)} for a, b in SUMS]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, lines in TASKS.items():
        files = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(files)}"
        (tmp_path / f"{name}.yaml").write_text(f"{head}\ntest_split: test{lines}")
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


@pytest.mark.parametrize(
    ("kind", "path", "names"),
    [
        ("local-completions", "/v1/completions", ["sums_chosen", "sums_written"]),
        # A chat has no likelihoods of given answers.
        ("local-chat-completions", "/v1/chat/completions", ["sums_written"]),
    ],
)
async def test_lm_eval_scores_the_same(
    text_server: VllmServer, tasks: TaskManager, kind: str, path: str, names: list[str]
) -> None:
    def scored(url: str) -> Any:
        found = lm_eval.simple_evaluate(
            model=kind,
            model_args={
                "model": text_server.model,
                "base_url": url + path,
                "tokenizer": str(text_server.path),
                "tokenizer_backend": "huggingface",
                "num_concurrent": 4,
                "max_retries": 1,
            },
            tasks=names,
            task_manager=tasks,
            apply_chat_template=kind == "local-chat-completions",
            bootstrap_iters=0,
        )
        assert found is not None
        samples = {name: [one["resps"] for one in found["samples"][name]] for name in names}
        assert all(len(found["samples"][name]) >= len(SUMS) for name in names)
        return {"scores": found["results"], "samples": samples}

    async def use(url: str) -> Any:
        return await asyncio.to_thread(scored, url)

    through, direct = await through_and_direct(text_server, use)
    assert through == rounded(direct)


# -- vllm bench serve ----------------------------------------------------------------------------

#: `vllm bench serve`, whose command needs a distribution by the name of vllm.
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.mark.parametrize(
    ("backend", "path"), [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")]
)
async def test_vllm_bench_serve_completes(
    text_server: VllmServer, tmp_path: Path, backend: str, path: str
) -> None:
    async with gateway_for(text_server, gate=None) as gateway:
        result = await benched(gateway, text_server, tmp_path, backend, path)
        watched = await metric(gateway, "espo_gateway_generated_tokens_total")
    assert (result["completed"], result["failed"]) == (24, 0)
    assert result["total_output_tokens"] == 24 * 16
    assert watched >= 24 * 16


async def benched(
    gateway: Gateway, server: VllmServer, folder: Path, backend: str, path: str
) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", BENCH, "--base-url", gateway.url),
        *("--backend", backend, "--endpoint", path),
        *("--model", server.model, "--tokenizer", str(server.path)),
        *("--dataset-name", "random", "--random-input-len", "8", "--random-output-len", "16"),
        *("--num-prompts", "24", "--ignore-eos", "--disable-tqdm"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", "result.json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-4000:]
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found
