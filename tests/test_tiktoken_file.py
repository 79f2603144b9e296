"""A tiktoken.model gives the tokens that tiktoken gives, or one ValueError that names the line and the rule."""

import base64
import json
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from disagg.front.tiktoken_file import PATTERN, SPECIAL_TOKENS, byte_letters, find_merges, read_tiktoken
from disagg.front.tokenizer import load_tokenizer

CORPUS = [
    "abbabaabbaababbabaab" * 9,
    "the theme, then other; it's THE end",
    "你好世界 你好",
    "12 123 1234",
    "naïve été \n\n  x",
]
NAMES = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 5: "<|tool|>"}  # by place behind the ranks


def train() -> dict[bytes, int]:
    """A vocabulary of byte pairs, some of which overlap in many ways."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator(CORPUS, trainer)
    bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    return {bytes(bytes_of[letter] for letter in word): id for word, id in tokenizer.get_vocab().items()}


RANKS = train()
BASE = len(RANKS)
ADDED = {BASE + place: AddedToken(name, special=name != "<|tool|>") for place, name in NAMES.items()}


def lines(ranks: dict[bytes, int] = RANKS) -> str:
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("kimi") / "tiktoken.model"
    path.write_text(lines())
    return read_tiktoken(path, ADDED)


@pytest.fixture(scope="module")
def theirs() -> tiktoken.Encoding:
    fillers = {f"<|reserved_token_{id}|>": id for id in range(BASE, BASE + SPECIAL_TOKENS) if id not in ADDED}
    special = fillers | {token.content: id for id, token in ADDED.items()}
    return tiktoken.Encoding("made", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens=special)


PIECES = st.sampled_from(
    (
        "ab",
        "ba",
        "aba",
        "abba",
        "the",
        " the",
        "'s",
        "'LL",
        "你好",
        "世",
        "é",
        "e\u0301",
        "Ünï",
        "123",
        "4",
        "\r\n",
        "\n",
        " ",
    )
    + (
        "  ",
        "\t",
        "x",
        "Ж",
        "ǅ",
        "!?",
        "😀",
        "한",
        "\u3000",
        "\x00",
        "[BOS]",
        "<|tool|>",
        "[EO",
        f"<|reserved_token_{BASE + 9}|>",
    )
)


@given(st.lists(PIECES | st.text(max_size=4), max_size=12).map("".join) | st.text("ab", max_size=40))
@settings(deadline=None, derandomize=True, max_examples=250)
def test_tokens_are_tiktokens(tokenizer: Tokenizer, theirs: tiktoken.Encoding, text: str) -> None:
    tokens = tokenizer.encode(text).ids
    assert tokens == theirs.encode(text, allowed_special="all")
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text


def test_a_text_is_split_into_words_as_kimi_does() -> None:
    """By hand: Han apart from other letters, case, contractions, three digits at most, spaces before the next word."""
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    text = "HTTPServer's I'LL go你好world 12345 \n\n  (x)\n  end  "
    words = [
        "HTTPServer's",
        " I'LL",
        " go",
        "你好",
        "world",
        " ",
        "123",
        "45",
        " \n\n",
        " ",
        " (",
        "x",
        ")\n",
        " ",
        " end",
    ]
    assert [word for word, _ in split.pre_tokenize_str(text)] == [*words, "  "]


def test_the_leftmost_of_two_overlapping_splits_comes_first() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"ba": 257, b"aba": 258}
    assert find_merges(ranks, Path())[2:] == [(b"ab", b"a"), (b"a", b"ba")]


def test_special_tokens_fill_the_places_behind_the_ranks(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.get_vocab_size() == BASE + SPECIAL_TOKENS
    assert [tokenizer.id_to_token(BASE + place) for place in (0, 1, 3)] == [
        "[BOS]",
        "[EOS]",
        f"<|reserved_token_{BASE + 3}|>",
    ]
    assert tokenizer.decode([BASE, *tokenizer.encode("the").ids, BASE + 3, BASE + 5]) == "the<|tool|>"
    (tmp_path / "tiktoken.model").write_text(lines())
    small = read_tiktoken(tmp_path / "tiktoken.model", ADDED, vocab_size=BASE + 10)
    assert small.get_vocab_size() == BASE + 10


def test_a_folder_with_it_serves_prompts_and_messages(tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_text(lines())
    added = {id: {"content": token.content, "special": token.special} for id, token in ADDED.items()}
    template = "{{ tools | tojson(separators=(',', ':')) }}[BOS]{{ messages[0].content }}"
    about = {"added_tokens_decoder": added, "chat_template": template, "bos_token": "[BOS]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    encoder = load_tokenizer(tmp_path, vocab_size=BASE + 256)
    assert encoder.text("the")[0] == RANKS[b"the"]
    tokens = encoder.chat([{"role": "user", "content": "hi"}], tools=[{"b": {"d": 1, "c": 2}, "a": 0}])
    assert BASE in tokens
    text = encoder.tokenizer.decode(tokens, skip_special_tokens=False)
    assert text == '[{"a":0,"b":{"c":2,"d":1}}][BOS]hi'  # Kimi's code sorts the keys


BAD = {
    "not base64": ("YQ=", "line 1 is 'YQ= 0'; it must be a token in base64 and its rank"),
    "no rank": ("YWI=\n", "line 1 is 'YWI='; it must be a token in base64 and its rank"),
    "three words": ("YWI= 1 2\n", "line 1 is 'YWI= 1 2'; it must be"),
    "a rank that is no number": ("YWI= x\n", "line 1 is 'YWI= x'; it must be"),
    "no token": ("= 5\n", "line 1 is '= 5'; it must be"),
    "a long token": (f"{'YWFh' * 400} 256\n", "line 1: its token has 1,200 bytes; it must have 1 to 1,024"),
    "a token twice": (f"{lines()}YWI= {BASE}\n", f"line {BASE + 1}: its token has the rank {RANKS[b'ab']} already"),
    "a rank twice": (lines(RANKS | {b"zz": 5}), f"its {BASE + 1} ranks must be 0 to {BASE}, each once"),
    "a rank too high": (lines(RANKS | {b"zz": 10**30}), f"its {BASE + 1} ranks must be 0 to {BASE}, each once"),
    "a byte that is missing": ("YQ== 0\n", "byte 0x00 is no token; every byte must be one"),
    "nothing": ("", "byte 0x00 is no token; every byte must be one"),
    "too many bytes": ("YQ== 0\n" * 2**21, "it has 14,680,064 bytes; it must have at most 8,388,608"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_with_its_line_and_the_rule(tmp_path: Path, case: str) -> None:
    content, rule = BAD[case]
    path = tmp_path / "tiktoken.model"
    path.write_text(content if " " in content or not content or content.endswith("\n") else content + " 0")
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{path}: {rule}") and len(str(caught.value)) < 400


def test_a_name_that_is_not_behind_the_ranks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_text(lines())
    for id in (5, BASE + SPECIAL_TOKENS):
        rule = f"has the id {id}; behind {BASE} ranks it must be in {BASE}..{BASE + SPECIAL_TOKENS - 1}"
        with pytest.raises(ValueError, match=rule):
            read_tiktoken(tmp_path / "tiktoken.model", {id: AddedToken("x")})


def test_tokens_made_of_one_another_in_too_many_ways_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.front.tiktoken_file.MOST_MERGES", 100)
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"a" * n: 254 + n for n in range(2, 40)}
    with pytest.raises(ValueError, match="made of one another in over 100 ways"):
        find_merges(ranks, Path("tiktoken.model"))
