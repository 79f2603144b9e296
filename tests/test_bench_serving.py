"""scripts/bench/serving: its requests are what they say, for us and for transformers, and the batch is served whole.

The load generator is vLLM's, and no package of ours: the runs through HTTP are made by hand.
"""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from scripts.bench.lib.shapes import SHAPES
from scripts.bench.serving.run import Bench, figures, parse, server
from scripts.bench.serving.workload import draw_requests
from scripts.tools.demo import free_port

SIZES = ("--shape", "tiny", "--concurrency", "4", "--requests", "6", "--prompt", "20", "--output", "6")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(parse([*SIZES, "--step-tokens", "64"]), tmp_path_factory.mktemp("serving"))


def test_every_word_is_one_token_and_every_token_a_word(bench: Bench) -> None:
    vocab = SHAPES["tiny"].vocab_size
    ours = Tokenizer.from_file(str(bench.model / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(bench.model)
    for text, tokens in draw_requests(20, 20, 6, vocab, seed=1):
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text) == [int(word[1:]) for word in text.split()]
        assert ours.decode(ids) == text and 10 <= len(ids) <= 30 and 3 <= tokens <= 9
    rows = [json.loads(line) for line in (bench.folder / "dataset.jsonl").read_text().splitlines()]
    assert sum(row["output_tokens"] for row in rows) == bench.generated and len(rows) == 6


def test_the_batch_is_served_whole(bench: Bench) -> None:
    tokens, said = bench._batch("batch")
    assert tokens == bench.generated and "generated tok/s" in said


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="no such shell"),
        server(["bash", "-c", "echo no such shell; exit 1"], free_port(), tmp_path / "log"),
    ):
        raise AssertionError("it started")


def test_its_figures_are_the_generators() -> None:
    names = ("output_throughput", "p50_ttft_ms", "p99_ttft_ms", "p50_itl_ms", "p99_itl_ms")
    ours, theirs = ({name: base + i for i, name in enumerate(names)} for base in (100.0, 200.0))
    made = figures(parse([*SIZES]), 105.0, ours, theirs)
    assert [one.value for one in made] == [100.0, 100.0, 101.0, 102.0, 103.0, 104.0]
    assert [one.reference for one in made] == [105.0, 200.0, 201.0, 202.0, 203.0, 204.0]
    assert [one.better for one in made] == ["higher"] * 2 + ["lower"] * 4
    assert all(one.reference is None for one in figures(parse([*SIZES]), 105.0, ours, None)[1:])
