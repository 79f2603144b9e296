"""What the servers serve: a folder with a shape's configuration, and requests for it.

The tokenizer has a word for each id, so that every token is text of its own: a random model's ids are no text in a real
vocabulary, and a token without text would give no event.
"""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from model.config import ModelConfig
from scripts.bench.engine.peer_config import write_config


def write_model(config: ModelConfig, folder: Path) -> None:
    """Write a folder that is served with random weights: config.json, and a tokenizer of words."""
    write_config(config, str(folder))
    words = {f"w{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def draw_requests(count: int, prompt: int, output: int, vocab: int, seed: int = 0) -> list[tuple[str, int]]:
    """Return (prompt, tokens to generate) per request.

    Lengths are uniform, from half of `prompt` or `output` to one and a half.
    """
    rng = random.Random(seed)

    def length(mean: int) -> int:
        return rng.randint(mean - mean // 2, mean + mean // 2)

    made = []
    for _ in range(count):
        words = (f"w{rng.randrange(vocab)}" for _ in range(length(prompt)))
        made.append((" ".join(words), length(output)))
    return made


def write_batch(requests: list[tuple[str, int]], file: Path) -> None:
    """Write the requests as run.py's --input."""
    fields = [{"prompt": text, "max_tokens": tokens, "ignore_eos": True, "temperature": 0} for text, tokens in requests]
    file.write_text("".join(json.dumps(one) + "\n" for one in fields))


def write_dataset(requests: list[tuple[str, int]], file: Path) -> None:
    """Write the requests as vLLM's load generator reads them (`--dataset-name custom`)."""
    file.write_text("".join(json.dumps({"prompt": text, "output_tokens": n}) + "\n" for text, n in requests))
