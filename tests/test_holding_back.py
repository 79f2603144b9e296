"""Shown text never changes: the shown pieces are the final text, and no beginning of a stop string is among them.

The references are the tokenizer's text of all tokens so far, and a search for every stop string in it.
"""

import time
from collections.abc import Set
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from disagg.front.text_stream import TextStream
from tests.test_text import EOS, TOKENIZER, WORDS_AND_BYTES, byte_fallback

CLUSTERS = ["a", "b", "\n", "中", "文", "👩\u200d👩\u200d👧", "👍🏽", "e\u0301", "🇩🇪", "שָׁ", "مَ", "\u200f"]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
FALLBACK = byte_fallback()
PROPERTIES = settings(deadline=None, derandomize=True, max_examples=60)


def letters(text: str) -> str:
    """One letter per byte, as byte-level vocabularies write them."""
    return BYTES.pre_tokenize_str(text)[0][0] if text else ""


def with_tokens(words: set[str]) -> Tokenizer:
    """A byte-level tokenizer with these tokens, besides all bytes."""
    vocab = {word: i for i, word in enumerate(sorted({*words, *pre_tokenizers.ByteLevel.alphabet()}))}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def show(stream: TextStream, tokens: list[int]) -> tuple[list[str], int | None]:
    """The pieces that were shown, and how many tokens it took until a stop string was complete (None: closed)."""
    pieces: list[str] = []
    for token in tokens:
        shown = stream.shown
        stopped = stream.push(token)
        pieces.append(stream.text[shown : stream.shown])
        if stopped:
            return pieces, len(pieces)
    shown = stream.shown
    stream.close()
    assert stream.shown == len(stream.text)
    return [*pieces, stream.text[shown:]], None


def first(stops: list[str], text: str) -> int | None:
    return min((text.find(stop) for stop in stops if stop in text), default=None)


def could_stop(stops: list[str], text: str) -> int:
    """From where on the text could still become a stop string."""
    return next(at for at in range(len(text) + 1) if at == len(text) or any(s.startswith(text[at:]) for s in stops))


@pytest.mark.parametrize("stop", ["END", "abab", "é€", "\n\nUser:", "👩\u200d👧", "🇩🇪", "שָׁ", "e\u0301"])
def test_no_split_of_a_stop_string_shows_a_part_of_it(stop: str) -> None:
    """Each way to cut its bytes into tokens, of which the last one also has text behind it."""
    whole = letters("x" + stop + "y")
    body = whole[1:-1]
    tokenizer = with_tokens({whole[i:j] for i in range(len(whole)) for j in range(i + 1, len(whole) + 1)})
    for cuts in range(2 ** (len(body) - 1)):
        places = [0, *(i for i in range(1, len(body)) if cuts >> (i - 1) & 1), len(body)]
        words = [body[i:j] for i, j in pairwise(places)]
        tokens = [tokenizer.token_to_id(word) for word in ("x", *words[:-1], words[-1] + whole[-1])]
        pieces, count = show(TextStream(tokenizer, [stop]), tokens)
        assert (pieces, count) == (["x"] + [""] * (len(tokens) - 1), len(tokens))


@given(st.lists(st.sampled_from(CLUSTERS), max_size=8).map("".join), st.data())
@PROPERTIES
def test_exactly_what_could_become_a_stop_string_is_held_back(text: str, data: st.DataObject) -> None:
    """Stop strings are cut out of the text, or begin with a part of it, so that many nearly match."""
    part = st.tuples(*[st.integers(0, len(text))] * 2).map(lambda ends: text[min(ends) : max(ends)])
    stops = data.draw(
        st.lists(st.builds(str.__add__, part, st.sampled_from(["", "", "a", "🇩"])).filter(bool), max_size=3)
    )
    whole = letters(text)
    places = sorted({0, len(whole), *data.draw(st.lists(st.integers(0, len(whole)), max_size=len(whole)))})
    words = [whole[i:j] for i, j in pairwise(places)]
    tokenizer = with_tokens(set(words))
    stream, shown, so_far = TextStream(tokenizer, stops), "", ""
    for end, word in zip(places[1:], words, strict=True):
        stopped = stream.push(tokenizer.token_to_id(word))
        if (known := text.encode()[:end].decode(errors="replace")) == text[: len(known)]:
            so_far = known  # no character is incomplete
        at = first(stops, so_far)
        assert stopped == (at is not None)
        assert stream.text[: stream.shown] == so_far[: could_stop(stops, so_far) if at is None else at]
        assert stream.text.startswith(shown)
        shown = stream.text[: stream.shown]
        if stopped:
            break
    stream.close()
    assert stream.text == text[: first(stops, so_far)]


@given(
    st.lists(st.integers(0, len(WORDS_AND_BYTES) - 1) | st.integers(258, len(WORDS_AND_BYTES) - 1), max_size=20),
    st.lists(st.sampled_from(["end", " the", "é", "\n", "a a", "aé", "endend"]), max_size=3),
)
@PROPERTIES
def test_bytes_of_a_fallback_are_shown_when_they_are_sure(tokens: list[int], stops: list[str]) -> None:
    stream = TextStream(FALLBACK, stops)
    pieces, count = show(stream, tokens)
    texts = [FALLBACK.decode(tokens[: n + 1]) for n in range(len(tokens))]
    ends = [n for n, text in enumerate(texts, 1) if first(stops, text) is not None]
    assert count == (ends[0] if ends else None)
    whole = FALLBACK.decode(tokens[:count])
    assert "".join(pieces) == stream.text == whole[: first(stops, whole)]


def test_a_line_break_that_is_a_byte_stops_at_once() -> None:
    tokens = [FALLBACK.token_to_id(word) for word in ("a", "<0x0A>", "<0x0A>", "the")]
    assert show(TextStream(FALLBACK, ["\n\n"]), tokens) == (["a", "", ""], 3)
    assert show(TextStream(FALLBACK, ["\n\n\n"]), tokens) == (["a", "", "", "\n\nthe", ""], None)


SPECIAL = {"<eos>": EOS, "a": TOKENIZER.token_to_id("a"), "b": TOKENIZER.token_to_id("b")}
WRITTEN = st.lists(st.sampled_from(list(SPECIAL)), min_size=1, max_size=8)


@given(WRITTEN, st.lists(WRITTEN.map(lambda words: "".join(words[:4])), max_size=3))
@PROPERTIES
def test_a_stop_string_over_special_tokens_is_held_back(words: list[str], stops: list[str]) -> None:
    marked = ["".join(words[: n + 1]) for n in range(len(words))]

    def end(text: str) -> int | None:
        """Where the first one begins in the visible text."""
        ends = [first(stops, text.replace("<eos>", ""))]
        ends += [
            len(text[: text.find(stop)].replace("<eos>", "")) for stop in stops if stop in text and "<eos>" in stop
        ]
        return min((at for at in ends if at is not None), default=None)

    expected = next((n for n, text in enumerate(marked, 1) if end(text) is not None), None)
    stream = TextStream(TOKENIZER, stops)
    pieces, count = show(stream, [SPECIAL[word] for word in words])
    assert count == expected
    visible = marked[-1 if count is None else count - 1]
    assert "".join(pieces) == stream.text == visible.replace("<eos>", "")[: end(visible)]


@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=40))
@PROPERTIES
def test_the_pieces_of_any_tokens_are_their_text(tokens: list[int]) -> None:
    stream = TextStream(TOKENIZER, [])
    pieces, _ = show(stream, tokens)
    assert "".join(pieces) == stream.text == TOKENIZER.decode(tokens)


def test_shown_text_stays_even_if_the_library_decodes_all_tokens_into_another() -> None:
    """This decoder removes a space once a full stop follows, as WordPiece's does."""
    tokenizer = with_tokens(set())
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), decoders.Replace(" .", ".")])
    tokens = [tokenizer.token_to_id(letter) for letter in letters("a .b")]
    stream = TextStream(tokenizer, [])
    pieces, _ = show(stream, tokens)
    assert "".join(pieces) == stream.text and stream.text.startswith("a ") and stream.text.endswith("b")
    assert tokenizer.decode(tokens) == "a.b"


@pytest.mark.parametrize("special", [True, False])
def test_marks_stay_in_the_text_and_are_no_part_of_what_a_stop_string_sees(special: bool) -> None:
    tokenizer = with_tokens(set())
    tokenizer.add_tokens([AddedToken("<think>", special=special), AddedToken("<eos>", special=True)])
    mark, eos = map(tokenizer.token_to_id, ("<think>", "<eos>"))
    a, b = map(tokenizer.token_to_id, "ab")

    def stream(stop: list[str], tokens: list[int], marks: Set[int] = frozenset([mark])) -> tuple:
        made = TextStream(tokenizer, stop, marks)
        pieces, count = show(made, tokens)
        assert "".join(pieces) == made.text
        return made.text, count, made.places

    assert stream([], [a, mark, eos, b, mark]) == ("a<think>b<think>", None, [(1, mark), (9, mark)])
    assert stream([], [tokenizer.token_to_id(letters("é")[0]), mark, b]) == ("\ufffd<think>b", None, [(1, mark)])
    assert stream(["ab", "think", "a<"], [a, mark, b]) == ("a<think>b", None, [(1, mark)])
    assert stream(["<think>b"], [a, mark, a, mark, b]) == ("a<think>a", 5, [(1, mark), (9, mark)])
    assert stream(["b<eos>"], [a, mark, b, eos]) == ("a<think>", 4, [(1, mark)])
    assert stream([], [a, mark, b], frozenset()) == ("ab" if special else "a<think>b", None, [])
    assert stream([], [a, mark], frozenset([mark, 10**6])) == ("a<think>", None, [(1, mark)])


def test_a_token_costs_the_same_in_a_long_text() -> None:
    """Also with stop strings. Copying the text for each token would cost 15 times as much at a million characters."""
    tokenizer = with_tokens({"ab" * 500})
    short, long = map(tokenizer.token_to_id, ("a", "ab" * 500))

    def cost(stream: TextStream) -> float:
        times = []
        for _ in range(20):
            begun = time.perf_counter()
            for _ in range(20):
                stream.push(short)
            times.append(time.perf_counter() - begun)
        return min(times)

    for stop in ([], ["abb", "<eos>"]):
        stream = TextStream(tokenizer, stop)
        at_first = cost(stream)
        for _ in range(1000):
            assert not stream.push(long)
        assert cost(stream) < 5 * at_first and stream.shown > 1_000_000
