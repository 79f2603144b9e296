"""Text while its tokens arrive: never half a character, and never past a stop string.

At the end it equals the tokenizer's text for all tokens.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from disagg.front.text_stream import TextStream

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
    stream = TextStream(TOKENIZER, ["<eo"])
    assert push_all(stream, [*ids("ab"), EOS]) is None
    stream.close()
    assert stream.text == "ab" and stream.token_ids == [*ids("ab"), EOS]


@pytest.mark.parametrize(
    "stop, tokens, count, text",
    (
        (["<eos>"], [*ids("ab"), EOS, *ids("c")], 3, "ab"),
        (["x", "<eos>"], [EOS], 1, ""),
        (["b<eos>"], [*ids("ab"), EOS], 3, "a"),
        (["b<eos>"], [*ids("a"), EOS, *ids("b"), EOS], 4, "a"),
        (["<eos>c"], [EOS, *ids("b"), EOS, *ids("cd")], 4, "b"),
        (["<eos><eos>"], [*ids("a"), EOS, *ids("b"), EOS, EOS], 5, "ab"),
        (["b<eos>", "ab"], [*ids("ab"), EOS], 2, ""),
        (["<eos>", "bc"], [*ids("ab"), EOS], 3, "ab"),
        (["<eos>"], ids("<eos"), None, "<eos"),
        (["<eos>"], [*ids("a<"), *ids("eos>")], 6, "a"),
        (["<eos>"], [*ids("a\u20ac")[:-1], EOS], 4, "a"),
        (["a<eos>b"], [*ids("a"), EOS, *ids("c")], None, "ac"),
    ),
)
def test_a_stop_string_may_name_a_special_token(stop: list[str], tokens: list, count: int | None, text: str) -> None:
    stream = TextStream(TOKENIZER, stop)
    assert push_all(stream, tokens) == count
    assert stream.text == text


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None, [])
    assert push_all(stream, [1, 2**40, 3]) is None
    stream.close()
    assert stream.text == "" and stream.token_ids == [1, 2**40, 3]


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


@pytest.mark.parametrize(
    "stop, min_tokens, tokens, text",
    (
        (["b"], 0, "abab", "a"),
        (["b"], 1, "abab", "a"),
        (["b"], 2, "abab", "aba"),
        (["b"], 3, "abab", "aba"),
        (["b"], 4, "abab", None),
        (["aa"], 2, "aaa", "a"),  # its first half may come early
        (["aab"], 3, "aabxab", None),
        (["ab", "b"], 2, "abcb", "abc"),
        (["\u20ac"], 3, "\u20ac\u20ac", "\u20ac"),  # of 3 tokens
        (["\u20ac"], 2, "\u20ac", ""),  # the third completes it
        (["a<eos>"], 2, "a<eos>xa<eos>", "ax"),
        (["<eos>a"], 1, "<eos>a", ""),
    ),
)
def test_the_first_tokens_complete_no_stop_string(
    stop: list[str], min_tokens: int, tokens: str, text: str | None
) -> None:
    stream = TextStream(TOKENIZER, stop, min_tokens=min_tokens)
    assert (push_all(stream, TOKENIZER.encode(tokens).ids) is None) == (text is None)
    assert stream.text == (tokens if text is None else text)


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


WORDS_AND_BYTES = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS_AND_BYTES += ["\u2581", "the", "\u2581the", "a", "\u2581a", "é", "»", "end"]


def byte_fallback() -> Tokenizer:
    """As SentencePiece makes them: bytes that are no character become one U+FFFD each, also those before them."""
    vocab = {word: i for i, word in enumerate(WORDS_AND_BYTES)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    space = "\u2581"
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


@pytest.mark.parametrize("stop", [[], ["end"], [" the"]])
def test_bytes_that_turn_out_to_be_no_character_end_nothing(stop: list[str]) -> None:
    tokenizer, rng, stopped = byte_fallback(), random.Random(0), 0
    for _ in range(300):
        stream, tokens = TextStream(tokenizer, stop), []
        for _ in range(40):
            tokens.append(rng.choice((rng.randrange(len(WORDS_AND_BYTES)), rng.randrange(258, len(WORDS_AND_BYTES)))))
            if ended := stream.push(tokens[-1]):
                break
        whole = tokenizer.decode(tokens)
        if ended:
            stopped += 1
            assert stream.text == whole[: whole.find(stop[0])]
        else:
            stream.close()
            assert stream.text == whole
        assert stream.token_ids == tokens
    assert stopped > 100 or not stop


def test_what_is_shown_goes_on_after_such_bytes() -> None:
    """C3 A9 is é until FF makes all three none."""
    stream, tokenizer = TextStream(byte_fallback(), []), byte_fallback()
    tokens = [
        tokenizer.token_to_id(word) for word in ("a", "<0xC3>", "<0xA9>", "<0xFF>", "\u2581the", "end", "\u2581a")
    ]
    seen = []
    for token in tokens:
        stream.push(token)
        seen.append(stream.text[: stream.shown])
    whole = "a\ufffd\ufffd\ufffd theend a"
    assert seen == ["a", "a", "a", "a", whole[:8], whole[:11], whole]
    stream.close()
    assert stream.text == whole and stream.shown == len(whole)


@pytest.mark.parametrize("token", [-1, 2**31, 2**32, 2**40, 10**30, EOS + 1])
def test_a_token_that_there_is_not_adds_nothing(token: int) -> None:
    stream = TextStream(TOKENIZER, ["END"])
    assert not push_all(stream, [*ids("a"), token, *ids("b")])
    assert stream.text == "ab" and stream.token_ids == [*ids("a"), token, *ids("b")]
    assert push_all(stream, [token, *ids("END"), token]) == 4
    stream.close()
    assert stream.text == "ab"


def test_a_panic_while_decoding_ends_nothing(capfd: pytest.CaptureFixture) -> None:
    """The library panics on a pattern that takes too long, here that of the decoder, with what is no Exception."""
    tokenizer = make_tokenizer()
    replace = decoders.Replace(Regex("(a+)+$"), "x")
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), replace])
    with pytest.raises(BaseException, match="retry-limit-in-match") as caught:
        tokenizer.decode(ids("a" * 40 + "!"))
    assert not isinstance(caught.value, Exception)
    stream = TextStream(tokenizer, [])
    assert push_all(stream, ids("b" + "a" * 40 + "!" + "cd")) is None
    stream.close()
    assert stream.text.startswith("b")
    capfd.readouterr()  # what the library says of it


def test_ctrl_c_while_decoding_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def step(self, tokenizer: Tokenizer, token: int) -> str:
            raise KeyboardInterrupt

    stream = TextStream(TOKENIZER, [])
    stream._stream = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        stream.push(1)
