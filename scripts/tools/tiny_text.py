"""The text of the shipped checkpoint (`train_tiny.py`): three corpora, split into training and held-out documents.

Also builds the tokenizer from them.
"""

import re
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>")
BOS, EOS, PAD, USER, ASSISTANT = SPECIAL
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
DOMAINS = ("bible", "wordnet", "python")
SAMPLE_PROMPTS = {
    "bible": ["Genesis 51\n\n1 And", "And the LORD spake unto Moses, saying,"],
    "wordnet": [f"{USER}{word}{ASSISTANT}" for word in ("river", "physician", "quickly")],
    "python": ["import os\nimport sys\n", '"""Stacks and queues."""\n\n'],
}


def read_documents(wordnet: Path, stdlib: Path) -> dict[str, list[tuple[str, bool]]]:
    """Return the documents of each domain, as pairs (text, held out?)."""
    sources = bible_documents(), wordnet_documents(wordnet), python_documents(stdlib)
    return {domain: list(source) for domain, source in zip(DOMAINS, sources, strict=True)}


def bible_documents() -> Iterator[tuple[str, bool]]:
    """Yield (text, held out?) per chapter; every 25th is held out. The command `bible` prints 'Book N', then verses."""
    command = ["bible", "-l100000", "gen1:1-rev22:21"]
    printed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    chapters = re.split(r"\n(?=[^\s].* \d+\n)", printed)
    for number, chapter in enumerate(filter(None, map(str.strip, chapters))):
        yield re.sub(r"(?m)^ +", "", chapter), number % 25 == 12


def wordnet_documents(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield every synset as 'word, word (noun): gloss'. A word in WordNet's tagged texts is also a chat turn."""
    documents, glosses, chat = [], {}, {}
    for name, part in {"noun": "noun", "verb": "verb", "adjective": "adj", "adverb": "adv"}.items():
        data, index = ((folder / f"{kind}.{part}").read_text("latin-1").splitlines() for kind in ("data", "index"))
        for line in data:
            if line.startswith("  "):
                continue  # the licence
            fields, gloss = line.split(" | ", 1)[0].split(), line.split(" | ", 1)[1].strip()
            words = [re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            held_out = zlib.crc32(f"{part}{fields[0]}".encode()) % 50 == 0
            glosses[part, fields[0]] = gloss, held_out
            documents.append((f"{', '.join(words)} ({name}): {gloss}", held_out))
        for line in index:
            fields = line.split()
            senses = 0 if line.startswith("  ") else int(fields[2])
            offsets, tagged = fields[len(fields) - senses :], fields[len(fields) - senses - 1]
            if senses > chat.get(fields[0], (0,))[0] and int(tagged) > 0:  # the part of speech with most senses
                chat[fields[0]] = senses, *glosses[part, offsets[0]]
    for word, (_, gloss, held_out) in chat.items():
        documents.append((f"{USER}{word.replace('_', ' ')}{ASSISTANT}{gloss}", held_out))
    order = np.random.default_rng(0).permutation(len(documents))
    yield from (documents[i] for i in order)


def python_documents(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield one document per file of the standard library; every 25th is held out.

    Tests and generated tables are left out.
    """
    skipped = {"test", "tests", "idlelib", "encodings", "lib2to3", "site-packages", "turtledemo", "pydoc_data"}
    paths = sorted(p for p in folder.rglob("*.py") if not skipped & set(p.relative_to(folder).parts))
    paths = [p for p in paths if p.stat().st_size > 200 and "/config-" not in str(p)]
    for number, path in enumerate(paths):
        yield path.read_text("utf-8", errors="replace").strip() + "\n", number % 25 == 12


def build_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer. DeepSeek's special tokens come first, and encoding prepends bos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    assert tokenizer.get_vocab_size() == vocab_size
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Return all texts as one stream of uint16 tokens: bos ... eos, bos ... eos."""
    return np.array([i for encoded in tokenizer.encode_batch(texts) for i in (*encoded.ids, 1)], dtype=np.uint16)
