"""Text as its tokens come: never half a character, never past a stop string, and at the end what the tokenizer makes
of all tokens."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from disagg.tokenizer import TextStream, load_tokenizer

WORDS = ("th", "the", "en", "END", "\u0120the", "\u0120END")  # some tokens of several letters; \u0120 is a space


def make_tokenizer() -> Tokenizer:
    """A token for each byte, some longer ones, and <eos>, which is special."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *WORDS]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


TOKENIZER = make_tokenizer()
EOS = TOKENIZER.token_to_id("<eos>")


def ids(text: str) -> list[int]:
    """A token for each byte."""
    tokens = TOKENIZER.encode(text).ids
    assert len(tokens) == len(text.encode())
    return tokens


def push_all(stream: TextStream, tokens: list[int]) -> int | None:
    """How many tokens it took until a stop string was complete."""
    for count, token in enumerate(tokens, 1):
        if stream.push(token):
            return count
    return None


def test_text_comes_character_by_character_never_half_a_one() -> None:
    text = "aé€😀z"
    stream, seen = TextStream(TOKENIZER, []), []
    for token in ids(text):
        assert not stream.push(token)
        seen.append(stream.text)
    assert seen == ["a", "a", "aé", "aé", "aé", "aé€", "aé€", "aé€", "aé€", "aé€😀", "aé€😀z"]
    assert stream.token_ids == ids(text)


def test_an_unfinished_character_shows_only_at_the_end() -> None:
    stream = TextStream(TOKENIZER, [])
    push_all(stream, ids("a😀")[:-1])
    assert stream.text == "a"
    stream.close()
    assert stream.text == TOKENIZER.decode(ids("a😀")[:-1]) and "\ufffd" in stream.text


def test_special_tokens_are_no_text() -> None:
    stream = TextStream(TOKENIZER, ["<eos>"])
    assert push_all(stream, [*ids("ab"), EOS]) is None
    stream.close()
    assert stream.text == "ab" and stream.token_ids == [*ids("ab"), EOS]


@pytest.mark.parametrize(
    "stop, tokens, text",
    (
        (["END"], "abEND", "ab"),
        (["END"], "END", ""),
        (["END"], "ENENDxx", "EN"),
        (["END"], "EN D", None),
        (["b", "abc"], "xabc", "xa"),
        (["bc", "abcd"], "xabcd", "xa"),
        (["é"], "caféx", "caf"),
        (["€😀"], "a€€😀", "a€"),
        (["aab"], "aaab", "a"),
        (["\n\n"], "a\nb\n\nc", "a\nb"),
    ),
)
def test_a_stop_string_that_comes_in_pieces_cuts_the_text_before_it(
    stop: list[str], tokens: str, text: str | None
) -> None:
    stream = TextStream(TOKENIZER, stop)
    assert (push_all(stream, ids(tokens)) is None) == (text is None)
    assert stream.text == (tokens if text is None else text)


@pytest.mark.parametrize(
    "stop, text", ((["END"], "a the"), ([" END", "END"], "a the"), (["e"], "a th"), (["D", "END"], "a the"))
)
def test_of_two_stop_strings_in_one_token_the_one_that_starts_first_wins(stop: list[str], text: str) -> None:
    stream = TextStream(TOKENIZER, stop)
    tokens = [*ids("a"), TOKENIZER.token_to_id("\u0120the"), TOKENIZER.token_to_id("END")]
    assert push_all(stream, tokens) is not None
    assert stream.text == text


def test_a_stop_string_in_the_middle_of_a_token_keeps_what_the_token_has_before_it() -> None:
    stream = TextStream(TOKENIZER, ["h"])
    assert stream.push(TOKENIZER.token_to_id("\u0120the"))
    assert stream.text == " t"


def test_a_token_that_completes_two_stop_strings_is_cut_at_the_earlier() -> None:
    stream = TextStream(TOKENIZER, ["e", "xth"])
    assert push_all(stream, [*ids("ax"), TOKENIZER.token_to_id("the")]) == 3
    assert stream.text == "a"


@given(st.lists(st.sampled_from("aabE nD\u00e9\u20ac😀"), max_size=12).map("".join), st.data())
@settings(deadline=None, derandomize=True, max_examples=400)
def test_it_stops_at_the_first_token_that_completes_a_stop_string(text: str, data: st.DataObject) -> None:
    stops = data.draw(st.lists(st.text("ab nE\u00e9😀", min_size=1, max_size=3), max_size=3))
    ends = [len(text[: at + len(stop)].encode()) for stop in stops if (at := text.find(stop)) >= 0]
    stream = TextStream(TOKENIZER, stops)
    assert push_all(stream, ids(text)) == min(ends, default=None)
    if not ends:
        assert stream.text == text
        return
    shown = text.encode()[: min(ends)].decode()
    assert stream.text == min((shown[: shown.find(stop)] for stop in stops if stop in shown), key=len)
    assert stream.token_ids == ids(shown)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_tokens_the_final_text_is_what_the_tokenizer_makes_of_all(seed: int) -> None:
    """Random bytes are mostly no UTF-8; what was shown on the way stays."""
    rng = random.Random(seed)
    tokens = [rng.randrange(TOKENIZER.get_vocab_size()) for _ in range(rng.randrange(60))]
    stream, shown = TextStream(TOKENIZER, ["\x00never\x00"]), [""]
    for token in tokens:
        stream.push(token)
        assert stream.text.startswith(shown[-1])
        shown.append(stream.text)
    stream.close()
    assert stream.text == TOKENIZER.decode(tokens)
    assert stream.text.startswith(shown[-1])
    assert stream.token_ids == tokens


@pytest.mark.parametrize("settings", [{}, {"bos_token": None}, {"bos_token": {"content": "<s>"}}, {"bos_token": "<s>"}])
def test_a_special_token_that_there_is_not_is_no_word(tmp_path: Path, settings: dict) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    tokens = load_tokenizer(tmp_path).chat([{"role": "user", "content": "hi"}])
    assert TOKENIZER.decode(tokens) == ("<s>hi" if settings.get("bos_token") else "hi")


def test_a_tokenizers_settings_are_an_object(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: it must hold a JSON object, not list"):
        load_tokenizer(tmp_path)
