"""Talks over HTTP: all begin with one system prompt, and all take their turns together.

    system prompt | message 1 | answer 1 | message 2 | answer 2 ...
    the same        each talk's own

Prompts are token ids. A turn's prompt is everything so far, so all of it but the new message was seen by the server.
"""

import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection
from statistics import median

ANSWER_S = 300  # until a server must have answered
WORD = re.compile(r"w(\d+)")  # the tokenizer of `serving/workload.py` has a word for each token


@dataclass
class Seen:
    """What the clients saw. `ttft`: seconds, one list per turn."""

    ttft: list[list[float]] = field(default_factory=list)
    prompt_tokens: int = 0

    def median_ttft_ms(self, first: bool) -> float:
        """Return the median of the first turn, or of all others."""
        turns = self.ttft[:1] if first else self.ttft[1:]
        return 1e3 * median([seconds for turn in turns for seconds in turn])


def run_talks(port: int, talks: int, turns: int, sizes: tuple[int, int, int], vocab: int, seed: int) -> Seen:
    """Run all talks to their end. `sizes`: tokens of the system prompt, of each message, and of each answer."""
    rng, (system, message, answer) = random.Random(seed), sizes

    def draw(count: int) -> list[int]:
        return [rng.randrange(2, vocab) for _ in range(count)]

    common, seen = draw(system), Seen()
    prompts = [list(common) for _ in range(talks)]
    with ThreadPoolExecutor(talks) as clients:
        for _ in range(turns):
            prompts = [prompt + draw(message) for prompt in prompts]
            seen.prompt_tokens += sum(map(len, prompts))
            found = list(clients.map(lambda prompt: ask(port, prompt, answer), prompts))
            seen.ttft.append([seconds for seconds, _ in found])
            prompts = [prompt + tokens for prompt, (_, tokens) in zip(prompts, found, strict=True)]
    return seen


def ask(port: int, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
    """Ask for an answer of so many tokens. Returns the time to its first event, and its tokens.

    Raises RuntimeError if the answer is another one.
    """
    connection = HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    start, first, text = time.perf_counter(), None, ""
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {answer.read().decode()[:2000]}")
    for line in answer:
        data = line.decode().strip().removeprefix("data: ")
        if data and data != "[DONE]":
            first = first or time.perf_counter() - start
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(data)
            text += event["choices"][0]["text"] if event["choices"] else ""
    connection.close()
    words = [int(word) for word in WORD.findall(text)]
    if first is None or len(words) != tokens:
        raise RuntimeError(f"{len(words)} tokens instead of {tokens}: {text[:2000]}")
    return first, words
