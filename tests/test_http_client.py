"""OpenAI's own client against real deployments: its answers, streamed or whole, are those of a line of a batch."""

import base64
import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM

from model.pages import PAGE
from scripts.tools.demo import free_port
from tests.conftest import eventually
from tests.deployment import answers_alone
from tests.http_door import request_bytes
from tests.processes import Job
from tests.test_worlds import tokenizer_of

BESIDE = {"ignore_eos", "top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "return_experts"}
BESIDE |= {"prompt_token_ids", "chat_template_kwargs", "documents", "session_id"}  # the client knows none
LIMIT = 1024  # tokens of a request, and of a pool
RIVER = [{"role": "user", "content": "river"}]
LINES: list[dict[str, Any]] = [
    {"prompt": "In the beginning", "max_tokens": 8},
    {"prompt_token_ids": [5, 6, 7] * 30, "max_tokens": 5, "temperature": 0.9, "top_p": 0.8, "seed": 3, "logprobs": 3},
    {"prompt": "def ", "max_tokens": 12, "ignore_eos": True, "stop": [" ", "\n"]},
    {"prompt": "I", "max_tokens": 9, "temperature": 1.5, "top_k": 5, "seed": 7, "ignore_eos": True},
    {"prompt_token_ids": [9], "max_tokens": 4, "ignore_eos": True, "return_experts": True},
    {"prompt": "The river", "max_tokens": 3, "stop": "e"},
    {"messages": RIVER, "max_tokens": 6, "logprobs": 2},
    {"messages": RIVER, "max_completion_tokens": 5, "temperature": 0.7, "seed": 5, "ignore_eos": True},
    {"messages": RIVER, "max_tokens": 4, "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"prompt": "The", "max_tokens": 8, "min_p": 0.2, "temperature": 0.8, "seed": 4, "session_id": "me"},
    {"prompt": "The", "max_tokens": 8, "presence_penalty": 1.5, "frequency_penalty": 1.0},
    {"prompt": "The", "max_tokens": 8, "repetition_penalty": 1.8, "logit_bias": {"45": 7.5}, "min_tokens": 4},
    {"prompt": "The", "max_tokens": 8, "logit_bias": {"45": 100}, "stop_token_ids": [45]},
]


class Got(NamedTuple):
    """What a client has received."""

    text: str
    finish_reason: str
    usage: tuple[int, int]
    logprobs: list[list[tuple[bytes, float]]]
    experts: dict | None


@pytest.fixture(scope="module")
def expected(small: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The answers of a batch."""
    folder = tmp_path_factory.mktemp("batch")
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return answers_alone(small, source, folder / "out.jsonl")


@pytest.fixture(scope="module", params=["unified", "disaggregated"])
def client(request: pytest.FixtureRequest, small: Path) -> Iterator[openai.OpenAI]:
    address, http = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    model, pool = ["--model", str(small), "--max-model-len", str(LIMIT)], ["--kv-tokens", str(LIMIT)]
    if request.param == "unified":
        jobs = [Job([*model, "--http", http, *pool])]
    else:
        where = ["--router", address]
        jobs = [Job([*model, "--role", "router", *where, "--http", http])]
        jobs += [Job([*model, "--role", role, *where, *pool], 2) for role in ("prefill", "decode")]
    client = openai.OpenAI(base_url=f"http://{http}/v1", api_key="none", max_retries=0, timeout=60)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                if client.get("/../health", cast_to=dict):
                    break
            except (openai.APIConnectionError, openai.InternalServerError):
                assert time.monotonic() < deadline, jobs[0].said
                time.sleep(0.1)
        yield client
        jobs[0].signal(2)
        for job in jobs:
            code, _, err = job.finish(30)
            assert code == 0 and "Traceback" not in err, err
    finally:
        client.close()
        for job in jobs:
            job.end()


def pairs_of_chat(content: list | None) -> list[list[tuple[bytes, float]]]:
    return [[(bytes(one.bytes), one.logprob) for one in token.top_logprobs] for token in content or []]


def ask(client: openai.OpenAI, line: dict[str, Any], stream: bool) -> Got:
    """Send a line's request through the client."""
    line = dict(line)
    chat, extra = "messages" in line, {name: line.pop(name) for name in BESIDE & line.keys()}
    if ids := extra.pop("prompt_token_ids", None):
        line["prompt"] = ids
    if chat and "logprobs" in line:
        line |= {"logprobs": True, "top_logprobs": line["logprobs"]}
    make = client.chat.completions.create if chat else client.completions.create
    if not stream:
        answer = make(model=client.models.list().data[0].id, extra_body=extra, **line)
        kind = ChatCompletion if chat else Completion
        kind.model_validate(json.loads(answer.model_dump_json()), strict=False)
        (choice,), usage = answer.choices, answer.usage
        text = choice.message.content if chat else choice.text
        found = pairs_of_chat(choice.logprobs.content if choice.logprobs else None) if chat else rows(choice.logprobs)
        counts = usage.prompt_tokens, usage.completion_tokens
        return Got(text, choice.finish_reason, counts, found, getattr(choice, "experts", None))
    options = {"include_usage": True}
    text, reason, found, experts, usage = "", None, [], None, None
    for i, chunk in enumerate(make(model="", extra_body=extra, stream=True, stream_options=options, **line)):
        assert usage is None, "the usage comes last"
        if not chunk.choices:
            usage = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
            continue
        (choice,) = chunk.choices
        assert reason is None
        if chat:
            ChatCompletionChunk.model_validate(json.loads(chunk.model_dump_json()))
            assert choice.delta.role == ("assistant" if i == 0 else None)
            text += choice.delta.content or ""
            found += pairs_of_chat(choice.logprobs.content if choice.logprobs else None)
        else:
            text += choice.text
            found += rows(choice.logprobs)
        reason, experts = choice.finish_reason, getattr(choice, "experts", None)
    return Got(text, reason, usage, found, experts)


def rows(logprobs: Any) -> list[list[tuple[bytes, float]]]:
    """A completion's log probabilities; words of odd bytes are written out in them."""
    tops = logprobs.top_logprobs if logprobs else []
    return [[(spelled(word), value) for word, value in top.items()] for top in tops]


def spelled(word: str) -> bytes:
    return bytes.fromhex(word[6:].replace("\\x", "")) if word.startswith("bytes:") else word.encode()


@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_those_of_a_batch(client: openai.OpenAI, expected: list[dict], small: Path, stream: bool) -> None:
    tokenizer = tokenizer_of(small)
    for line, answer in zip(LINES, expected, strict=True):
        got = ask(client, line, stream)
        assert "error" not in answer and got.text == answer["text"], line
        assert got.finish_reason == answer["finish_reason"]
        assert got.usage == (answer["prompt_tokens"], answer["completion_tokens"])
        assert got.experts == answer.get("experts")
        top = line.get("logprobs", 0)
        assert len(got.logprobs) == len(answer.get("logprobs", []))
        for ours, theirs in zip(got.logprobs, answer.get("logprobs", []), strict=True):
            count = top if "messages" in line else len(theirs)
            assert [value for _, value in ours] == pytest.approx([value for _, value in theirs[:count]], abs=1e-4)
            for (word, _), (token, _) in zip(ours, theirs, strict=False):
                assert word.decode(errors="replace") == tokenizer.decode([token])


def test_experts_come_as_in_a_line(client: openai.OpenAI) -> None:
    experts = ask(client, LINES[4], False).experts
    assert experts["shape"][0] == 4 and len(base64.b64decode(experts["data"])) == 2 * 4 * 2 * 4


def test_the_usage_says_what_the_cache_had(client: openai.OpenAI) -> None:
    """A second request with the same beginning, in a stream; another tenant's has nothing of it."""
    prompt = list(range(300, 300 + 2 * PAGE))

    def cached(more: list[int], **extra: str) -> int:
        asked = {"model": "", "prompt": prompt + more, "max_tokens": 1, "extra_body": extra}
        whole = client.completions.create(**asked).usage.prompt_tokens_details.cached_tokens
        last = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **asked))[-1]
        assert last.usage.prompt_tokens_details.cached_tokens == PAGE * ((len(prompt + more) - 1) // PAGE)
        return whole

    assert cached([]) == 0 and cached([5, 6]) == 2 * PAGE
    assert cached([5, 6], cache_salt="another") == 0


def test_a_list_of_prompts_has_an_answer_each_by_its_index(client: openai.OpenAI, expected: list[dict]) -> None:
    """Texts, token ids, and both at once."""
    model = client.models.list().data[0].id
    prompts = ["In the beginning", "The river", "I"]
    alone = [client.completions.create(model=model, prompt=one, max_tokens=5).choices[0].text for one in prompts]
    together = client.completions.create(model=model, prompt=prompts, max_tokens=5)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.text for choice in together.choices] == alone
    assert together.usage.completion_tokens == sum(
        client.completions.create(model=model, prompt=one, max_tokens=5).usage.completion_tokens for one in prompts
    )
    texts = ["", "", ""]
    for chunk in client.completions.create(model=model, prompt=prompts, max_tokens=5, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == alone
    ids = client.completions.create(model=model, prompt=[[9, 10], [11]], max_tokens=2, extra_body={"ignore_eos": True})
    assert [choice.index for choice in ids.choices] == [0, 1] and ids.usage.prompt_tokens == 3


def test_echo_puts_the_prompt_in_front(client: openai.OpenAI, expected: list[dict]) -> None:
    whole = client.completions.create(model="", prompt="In the beginning", max_tokens=8, echo=True)
    assert whole.choices[0].text == "In the beginning" + expected[0]["text"]
    pieces = client.completions.create(model="", prompt="In the beginning", max_tokens=8, echo=True, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    only = client.completions.create(model="", prompt=["In the", "beginning"], max_tokens=0, echo=True)
    assert [choice.text for choice in only.choices] == ["In the", "beginning"] and only.usage.completion_tokens == 0


def test_echo_with_logprobs_has_those_of_the_prompt(client: openai.OpenAI, small: Path) -> None:
    """As lm-evaluation-harness asks for them: one more entry than the prompt has tokens, the first one None."""
    prompts = [[5, 6, 7, 8, 9], list(range(40, 170))]
    answer = client.completions.create(
        model="", prompt=prompts, max_tokens=1, temperature=0, logprobs=1, seed=1234, echo=True
    )
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    for choice, ids in zip(answer.choices, prompts, strict=True):
        with torch.no_grad():
            rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        shown = choice.logprobs
        assert len(shown.token_logprobs) == len(shown.top_logprobs) == len(shown.tokens) == len(ids) + 1
        assert shown.token_logprobs[0] is None and shown.top_logprobs[0] is None
        wanted = rows[range(len(ids) - 1), ids[1:]].tolist() + [rows[-1].max().item()]
        assert shown.token_logprobs[1:] == pytest.approx(wanted, abs=1e-3)
        best = [max(top.values()) for top in shown.top_logprobs[1:]]
        assert best == pytest.approx(rows.max(-1).values.tolist(), abs=1e-3)
        greedy = [own == top for own, top in zip(shown.token_logprobs[1:], best, strict=True)]  # bitwise
        assert greedy == [*(rows[:-1].argmax(-1) == torch.tensor(ids[1:])).tolist(), True]
    whole = client.completions.create(model="", prompt=prompts[0], max_tokens=0, logprobs=2, echo=True)
    (stream,) = client.completions.create(model="", prompt=prompts[0], max_tokens=0, logprobs=2, echo=True, stream=True)
    for made in (whole, stream):  # in a step of their own, which rounds otherwise
        (choice,) = made.choices
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(
            answer.choices[0].logprobs.token_logprobs[1:-1], abs=1e-4
        )
        assert choice.text == answer.choices[0].text[: len(choice.text)] and len(choice.logprobs.top_logprobs[1]) >= 2


def test_a_content_may_have_parts_and_tools_may_be_kept_from_the_template(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    whole = create(model="", messages=RIVER, max_tokens=6)
    parts = [{"role": "user", "content": [{"type": "text", "text": "river"}]}]
    assert create(model="", messages=parts, max_tokens=6).choices[0].message.content == whole.choices[0].message.content
    tools: Any = [{"type": "function", "function": {"name": "f"}}]
    kept = create(model="", messages=RIVER, max_tokens=6, tools=tools, tool_choice="none")
    assert kept.usage.prompt_tokens == whole.usage.prompt_tokens


def test_without_max_tokens_an_answer_goes_to_the_models_limit(client: openai.OpenAI) -> None:
    prompt = [9] * (LIMIT - 8)
    answer = client.completions.create(model="", prompt=prompt, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 8 and answer.choices[0].finish_reason == "length"


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature is -1.0; it must be a number in 0..1000") as caught:
        client.completions.create(model="", prompt="x", temperature=-1.0)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="model is 'gpt-4'"):
        client.chat.completions.create(model="gpt-4", messages=RIVER)
    with pytest.raises(openai.BadRequestError, match="n is 2; it must be 1"):
        client.chat.completions.create(model="", messages=RIVER, n=2)
    with pytest.raises(openai.BadRequestError, match=re.escape("is over max_model_len (1024)")):
        client.chat.completions.create(model="", messages=RIVER, max_tokens=4000, stream=True)


def in_use(client: openai.OpenAI) -> tuple[float, float]:
    """Requests that the router has, and pages that replicas have in use, as of their latest reports."""
    text = client.get("/../metrics", cast_to=str)
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    used = [sum(s.value for s in samples if s.name == f"moesaic_{name}") for name in ("requests", "kv_pages")]
    return used[0], used[1]


def test_clients_that_leave_leave_no_page_behind(client: openai.OpenAI) -> None:
    """64 of them, amid prompts, transfers and decoding. Then requests come that each need a whole pool."""
    url = client.base_url
    socks = [socket.create_connection((url.host, url.port)) for _ in range(64)]
    for i, sock in enumerate(socks):
        body = {"prompt": [9 + i] * (300 if i % 2 else 3), "max_tokens": 200, "ignore_eos": True, "stream": True}
        sock.sendall(request_bytes("/v1/completions", body))
    assert socks[0].recv(1) and socks[2].recv(1)  # some have their first tokens
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # as if killed
        sock.close()
    assert eventually(lambda: in_use(client) == (0, 0), 2), in_use(client)
    whole = client.completions.create(model="", prompt=[[7] * (LIMIT - 2), [8] * (LIMIT - 2)], max_tokens=2)
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
