"""Prompts are tokenised whole if they fit. A folder or a text that takes too much is refused early, by name."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Never

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from disagg.front import tokenizer as module
from disagg.front.tokenizer import PromptEncoder, load_tokenizer
from tests.test_text import TOKENIZER, byte_fallback, make_tokenizer

TALK = [{"role": "user", "content": "hi"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def describe(folder: Path, **settings: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def change(folder: Path, **parts: object) -> None:
    """Of tokenizer.json."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


@pytest.mark.parametrize("settings", [{}, {"bos_token": None}, {"bos_token": {"content": "<s>"}}, {"bos_token": "<s>"}])
def test_a_special_token_that_there_is_not_is_no_word(folder: Path, settings: dict) -> None:
    describe(folder, **settings)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    tokens = load_tokenizer(folder).chat(TALK)
    assert TOKENIZER.decode(tokens) == ("<s>hi" if settings.get("bos_token") else "hi")


def test_a_tokenizers_settings_are_an_object(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: it must hold a JSON object, not list"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b'{"a":' * 100_000, b"\xff"], ids=["empty", "no model", "deep", "latin-1"]
)
def test_a_tokenizer_that_cannot_be_read_is_named(folder: Path, data: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(data)
    with pytest.raises(ValueError, match=f"^{folder}/tokenizer.json: "):
        load_tokenizer(folder)


def test_prompts_are_neither_cut_nor_filled_up(folder: Path) -> None:
    """What a tokenizer.json remembers of its training is not for serving."""
    plain = load_tokenizer(folder).text("hello there")
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None}
    change(folder, truncation=cut, padding=pad | {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"})
    assert load_tokenizer(folder).text("hello there") == plain
    assert len(plain) == len("hello there")


def replacing(pattern: object, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


EXTRA = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
MANY = TemplateProcessing(single=" ".join(["e"] * 65) + " $A", special_tokens=[("e", 3)])
BOMBS = {
    "100 for one, five times": (
        {"normalizer": {"type": "Sequence", "normalizers": [replacing({"String": "a"}, "a" * 100)] * 5}},
        "its normalizer can make 10,000,000,000 characters of one; at most 64 are taken",
    ),
    "one for nothing, seven times": (
        {"normalizer": {"type": "Sequence", "normalizers": [replacing({"Regex": "x*"}, "a")] * 7}},
        "its normalizer can make 128 characters of one; at most 64 are taken",
    ),
    "a long beginning": (
        {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
        "its normalizer can make 1,000,001 characters of one; at most 64 are taken",
    ),
    "a decoder": (
        {"decoder": {"type": "Sequence", "decoders": [replacing({"String": "a"}, "a" * 10**6), {"type": "Fuse"}]}},
        "its decoder can make 1,000,000 characters of one; at most 64 are taken",
    ),
    "many special tokens": (
        {"post_processor": json.loads(MANY.__getstate__())},
        "its post_processor adds 65 tokens to a text; at most 64 are taken",
    ),
    "a long token": (
        {"added_tokens": [{"id": 999, "content": "a" * 10**5} | EXTRA]},
        "its longest token has 100,000 bytes; at most 65,536 are taken",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_tokenizer_that_makes_much_of_little_is_refused(folder: Path, bomb: str) -> None:
    parts, message = BOMBS[bomb]
    change(folder, **parts)
    with pytest.raises(ValueError, match=f"^{folder}/tokenizer.json: {message}"):
        load_tokenizer(folder)


UNUSABLE = {
    "brackets": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "recursion"),
    "an unknown tag": ("{% trans %}", "trans"),
    "a number": (5, "chat_template is 5; it must be a text"),
    "a list": ([{"name": "default"}], r"chat_template is \[.*\]; it must be a text"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_template_that_cannot_be_used_refuses_messages_only(
    folder: Path, case: str, capsys: pytest.CaptureFixture
) -> None:
    template, why = UNUSABLE[case]
    describe(folder, chat_template=template)
    encoder = load_tokenizer(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {folder}/tokenizer_config.json: ")
    assert line.endswith("; requests with messages are refused")
    assert len(encoder.text("hi")) == 2
    with pytest.raises(ValueError, match=f"^messages: this model's chat template cannot be used .*{why}"):
        encoder.chat(TALK)


def test_a_template_in_latin_1_is_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xe9")
    encoder = load_tokenizer(folder)
    assert f"warning: {folder}/chat_template.jinja: not UTF-8" in capsys.readouterr().err
    with pytest.raises(ValueError, match="messages: this model's chat template cannot be used .*chat_template.jinja"):
        encoder.chat(TALK)


class Spy:
    """A tokenizer that says how many characters it was given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.characters = tokenizer, 0

    def encode(self, text: str, **how: object) -> Encoding:
        self.characters += len(text)
        return self.tokenizer.encode(text, **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


class Echo:
    def render(self, given: dict) -> str:
        return given["messages"][0]["content"]


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised() -> None:
    spy = Spy(TOKENIZER)
    encoder = PromptEncoder(spy, Echo(), max_tokens=100)
    longest = len("<eos>")
    rule = rf"over max_model_len \(100\) x {longest}, the most bytes that a token of this model stands for"
    begun = time.monotonic()
    with pytest.raises(ValueError, match=f"^prompt: its 50,000,000 bytes are {rule}"):
        encoder.text("a" * 50_000_000)
    with pytest.raises(ValueError, match=f"^messages: its 50,000,000 characters are {rule}"):
        encoder.chat([{"role": "", "content": "a" * 50_000_000}])
    assert time.monotonic() - begun < 2
    with pytest.raises(ValueError, match=f"^prompt: its {2 * 251} bytes are {rule}"):
        encoder.text("é" * 251)
    assert spy.characters == 0
    assert len(encoder.text("é" * 250)) == 500  # it may fit as far as that rule goes; its tokens are counted elsewhere


def test_a_long_text_is_tokenised_no_further_than_it_takes() -> None:
    """Its longest token has 5000 bytes, so that 3 million may fit 1000 tokens; these do not."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("=" * 5000, normalized=False)])
    spy = Spy(tokenizer)
    encoder = PromptEncoder(spy, None, max_tokens=1000)
    seen = "its first 65,536 of 3,000,000 characters make about 65,536 tokens; max_model_len is 1000"
    with pytest.raises(ValueError, match=f"^prompt: {seen}"):
        encoder.text("a" * 3_000_000)
    assert spy.characters == module.PIECE
    assert len(encoder.text("=" * 3_000_000)) == 600


def unicode_forms() -> Tokenizer:
    """Characters, composed and made plain before."""
    tokenizer = byte_fallback()
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


@pytest.mark.parametrize("make", [make_tokenizer, byte_fallback, unicode_forms])
def test_no_text_that_fits_is_refused(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()

    @given(st.text(max_size=200) | st.text("ab the\u1112\u1161\u11ab\U0001d400\U0001d7d8é»", max_size=200))
    @settings(deadline=None, derandomize=True, max_examples=300)
    def check(text: str) -> None:
        if tokens := tokenizer.encode(text).ids:
            assert PromptEncoder(tokenizer, None, max_tokens=len(tokens)).text(text) == tokens

    check()


def test_no_long_text_that_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is cut on trial."""
    monkeypatch.setattr(module, "ON_TRIAL", 0)
    rng = random.Random(0)
    for piece in (1, 2, 7, 64):
        monkeypatch.setattr(module, "PIECE", piece)
        for tokenizer in (make_tokenizer(), byte_fallback()):
            text = "".join(rng.choice(("a", "é", " the", "»")) for _ in range(300))
            tokens = tokenizer.encode(text).ids
            assert PromptEncoder(tokenizer, None, max_tokens=len(tokens)).text(text) == tokens


def panicking() -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("(a+)+$"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def test_a_panic_in_the_library_costs_one_prompt(capfd: pytest.CaptureFixture) -> None:
    encoder = PromptEncoder(panicking(), Echo())
    for _ in range(2):
        with pytest.raises(ValueError, match="^prompt: the tokenizer refuses it: .*retry-limit-in-match"):
            encoder.text("a" * 40 + "!")
        with pytest.raises(ValueError, match="^messages: the tokenizer refuses it: .*retry-limit-in-match"):
            encoder.chat([{"role": "user", "content": "a" * 40 + "!"}])
        assert len(encoder.text("hello")) == 5
    capfd.readouterr()  # what the library says of it


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_is_no_refusal(kind: type[BaseException]) -> None:
    class Interrupted(Spy):
        def encode(self, text: str, **how: object) -> Never:
            raise kind

    with pytest.raises(kind):
        PromptEncoder(Interrupted(TOKENIZER), None).text("hi")


def test_messages_nested_too_deeply_are_refused() -> None:
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ValueError, match="^messages: "):
        PromptEncoder(TOKENIZER, Echo(), max_tokens=10).chat([{"role": "user", "content": "hi", "more": nested}])
