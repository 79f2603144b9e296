"""Prompts are tokenised whole if they fit. A folder or a text that takes too much is refused early, by name."""

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Never

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from disagg.front import tokenizer as module
from disagg.front.tokenizer import PromptEncoder, load_tokenizer
from tests.test_text import EOS, TOKENIZER, byte_fallback, make_tokenizer

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


@pytest.mark.parametrize("pairs", [True, False])
def test_a_merge_without_the_prefix_of_its_second_part_is_refused(folder: Path, pairs: bool) -> None:
    """The library cuts the prefix off unseen. If that is inside a character, the whole process ends."""
    raw = json.loads(
        Tokenizer(BPE({"a": 0, "##b": 1, "ab": 2}, [("a", "##b")], continuing_subword_prefix="##")).to_str()
    )
    for second in ("##b", "b"):
        raw["model"]["vocab"] = {"a": 0, second: 1, "ab": 2}
        raw["model"]["merges"] = [["a", second]] if pairs else [f"a {second}"]
        (folder / "tokenizer.json").write_text(json.dumps(raw))
        if second == "##b":
            load_tokenizer(folder)
    with pytest.raises(
        ValueError, match=r"tokenizer.json: model has the merge .*; its second part must begin with .*'##'"
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tiktoken.model", "tokenizer_config.json", "chat_template.jinja"])
def test_a_file_that_git_lfs_has_not_fetched_is_named(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "tiktoken.model":
        (folder / "tokenizer.json").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    told = f"{folder}/{name}: is a git-LFS pointer, not the file: git lfs pull"
    if name == "chat_template.jinja":  # only messages need it
        load_tokenizer(folder)
        assert told in capsys.readouterr().err
    else:
        with pytest.raises(ValueError, match=re.escape(told)):
            load_tokenizer(folder)


def test_prompts_are_neither_cut_nor_filled_up(folder: Path) -> None:
    """What a tokenizer.json remembers of its training is not for serving."""
    plain = load_tokenizer(folder).text("hello there")
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None}
    change(folder, truncation=cut, padding=pad | {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"})
    assert load_tokenizer(folder).text("hello there") == plain
    assert len(plain) == len("hello there")


BOS = "<eos>"  # as good as any


@pytest.mark.parametrize(
    "settings, adds, expected",
    (
        ({"add_bos_token": True, "bos_token": BOS}, False, [EOS]),
        ({"add_bos_token": True, "bos_token": {"content": BOS}}, False, [EOS]),
        ({"add_bos_token": True, "bos_token": BOS}, True, [EOS]),
        ({"add_bos_token": False, "bos_token": BOS}, False, []),
        ({"add_bos_token": None, "bos_token": BOS}, False, []),
        ({"bos_token": BOS}, False, []),
        ({}, True, [EOS]),
    ),
)
def test_a_prompt_begins_with_bos_once_if_the_folder_says_so(
    folder: Path, settings: dict, adds: bool, expected: list[int]
) -> None:
    describe(folder, chat_template="{{ messages[0].content }}", **settings)
    if adds:
        post = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, EOS)])
        change(folder, post_processor=json.loads(post.__getstate__()))
    encoder, hi = load_tokenizer(folder), TOKENIZER.encode("hi").ids
    assert encoder.text("hi") == [*expected, *hi]
    if expected and not adds:
        assert encoder.text(BOS + "hi") == [EOS, *hi]  # it is there already
    assert (encoder.bos is not None) == (bool(expected) and not adds)
    assert encoder.chat(TALK) == hi  # a template writes its own


@pytest.mark.parametrize(
    "settings, rule",
    (
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes'; it must be true or false"),
        ({"add_bos_token": True}, r"then bos_token \(None\) must be one of its tokens"),
        ({"add_bos_token": True, "bos_token": "<s>"}, r"then bos_token \('<s>'\) must be one of its tokens"),
    ),
)
def test_a_bos_that_cannot_be_added_is_refused(folder: Path, settings: dict, rule: str) -> None:
    describe(folder, **settings)
    with pytest.raises(ValueError, match=f"^{folder}/tokenizer_config.json: .*{rule}"):
        load_tokenizer(folder)


def test_tokens_that_only_the_settings_have_are_added_under_their_ids(folder: Path) -> None:
    """Also behind a gap, where the library by itself would number them onwards."""
    size = TOKENIZER.get_vocab_size()
    shown, hidden = {"content": "<tool>", "special": False}, {"content": "<|user|>", "special": True}
    describe(folder, added_tokens_decoder={f"{size + 9}": hidden, f"{size}": shown, f"{EOS}": {"content": BOS}})
    tokenizer = load_tokenizer(folder, vocab_size=size + 10).tokenizer
    ids = tokenizer.encode("<tool>hi<|user|>").ids
    assert ids == [size, *TOKENIZER.encode("hi").ids, size + 9]
    assert tokenizer.token_to_id(BOS) == EOS
    assert (
        tokenizer.decode(ids) == "<tool>hi" and tokenizer.decode(ids, skip_special_tokens=False) == "<tool>hi<|user|>"
    )


def bad_entry(entry: object, id: str = "300") -> dict:
    return {"added_tokens_decoder": {id: entry}}


@pytest.mark.parametrize(
    "settings, rule",
    (
        ({"added_tokens_decoder": []}, r"added_tokens_decoder is \[\]; it must be an object"),
        *(
            (bad_entry({"content": "x"}, id), "it must be an integer in 0..")
            for id in ("-1", "x", "1.0", "²", "9" * 5000)
        ),
        *((bad_entry(entry), "300 is .*; its content must be") for entry in (5, {}, {"content": ""}, {"content": 5})),
        (bad_entry({"content": "x", "special": "no"}), "300 is .* must be true or false"),
        ({"added_tokens_decoder": {"300": {"content": "x"}, "301": {"content": "x"}}}, "one token or one id twice"),
        ({"added_tokens_decoder": {"300": {"content": "x"}, "0300": {"content": "y"}}}, "one token or one id twice"),
    ),
)
def test_bad_added_tokens_are_refused(folder: Path, settings: dict, rule: str) -> None:
    describe(folder, **settings)
    with pytest.raises(ValueError, match=f"^{folder}/tokenizer_config.json: .*{rule}") as caught:
        load_tokenizer(folder)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("id, content", ((5, "<new>"), (700, "the"), (700, "<eos>")))
def test_two_files_that_disagree_about_an_id_are_refused(folder: Path, id: int, content: str) -> None:
    describe(folder, **bad_entry({"content": content}, str(id)))
    with pytest.raises(ValueError, match=f"^{folder}/tokenizer.json: .*tokenizer_config.json has it as {id}$"):
        load_tokenizer(folder)


def test_ids_that_the_model_does_not_have_are_refused(folder: Path) -> None:
    size = TOKENIZER.get_vocab_size()
    load_tokenizer(folder, vocab_size=size)
    load_tokenizer(folder, vocab_size=size + 100)
    last = f"token '<eos>' has the id {size - 1}; the model's vocab_size is {size - 1}"
    with pytest.raises(ValueError, match=f"^{folder}/tokenizer.json: {last}$"):
        load_tokenizer(folder, vocab_size=size - 1)


def test_a_folder_without_a_tokenizer_has_an_encoder_that_refuses_texts(tmp_path: Path) -> None:
    encoder = load_tokenizer(tmp_path, 100, 100)
    assert encoder.tokenizer is None
    with pytest.raises(ValueError, match="^prompt: this model has neither tokenizer.json nor tiktoken.model; give"):
        encoder.text("hi")


def test_special_tokens_of_the_older_file_count_unless_there_are_added_tokens(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "END"}, "x": 5}))
    template = "{{ eos_token }}{{ messages[0].content }}"
    for more, expected in (({}, "ENDhi"), ({"added_tokens_decoder": {}}, "hi")):
        describe(folder, chat_template=template, **more)
        assert TOKENIZER.decode(load_tokenizer(folder).chat(TALK)) == expected


def test_templates_in_files_replace_those_of_the_settings(folder: Path) -> None:
    more = folder / "additional_chat_templates"
    more.mkdir()
    describe(folder, chat_template="settings")
    (more / "rag.jinja").write_text("{{ broken")
    with pytest.raises(ValueError, match="^messages: this model has no chat template"):
        load_tokenizer(folder).chat(TALK)
    (more / "tool_use.jinja").write_text("tools")
    with pytest.raises(ValueError, match="the model has no template named default, only tool_use"):
        load_tokenizer(folder).chat(TALK)
    (folder / "chat_template.jinja").write_text("plain")
    encoder = load_tokenizer(folder)
    assert [TOKENIZER.decode(encoder.chat(TALK, tools)) for tools in (None, [], [{}])] == ["plain", "tools", "tools"]


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
    "a list": (
        [{"name": "default"}],
        r"chat_template is \[.*\]; it must be a text, or a list of objects with name and",
    ),
    "a list of texts": (["x"], r"chat_template is \['x'\]; it must be a text, or a list of objects with name and"),
    "one of two": ([{"name": "default", "template": "x"}, {"name": "tool_use", "template": "{{"}], "unexpected"),
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

    def encode_batch(self, texts: list[str], **how: object) -> list[Encoding]:
        self.characters += sum(map(len, texts))
        return self.tokenizer.encode_batch(texts, **how)

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
        def encode_batch(self, texts: list[str], **how: object) -> Never:
            raise kind

    with pytest.raises(kind):
        PromptEncoder(Interrupted(TOKENIZER), None).text("hi")


def test_messages_nested_too_deeply_are_refused() -> None:
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ValueError, match="^messages: "):
        PromptEncoder(TOKENIZER, Echo(), max_tokens=10).chat([{"role": "user", "content": "hi", "more": nested}])
