"""Reasoning and content are split at the model's own marks, in a stream as in a whole answer."""

import pytest
from tokenizers import AddedToken

from disagg.front.chat_text import ChatFormat, ChatText, whole_message
from disagg.front.reasoning import starts_inside
from disagg.front.text_stream import TextStream
from tests.test_text import make_tokenizer
from tests.test_tool_calls import THINK


def form_of(special: bool) -> ChatFormat:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(word, special=special) for word in THINK])
    return ChatFormat(tokenizer)


FORM = form_of(special=False)
R1, V31 = "<eos>hi<think>\n", "<eos>hi</think>"  # how these templates end the prompt


def split(text: str, prompt: str, stop: str | None = None, form: ChatFormat = FORM) -> tuple[str | None, str, list]:
    """Reasoning, content, and the deltas as they come."""
    tokens, before = (form.tokenizer.encode(one, add_special_tokens=False).ids for one in (text, prompt))
    stream = TextStream(form.tokenizer, [stop] if stop else [], form.marks(None))
    chat, deltas = ChatText(form, stream, before, None), []
    for token in tokens:
        stopped = stream.push(token)
        deltas += chat.deltas()
        if stopped:
            break
    stream.close()
    deltas += chat.deltas()
    message = whole_message(deltas)
    assert message == whole_message(ChatText(form, stream, before, None).deltas())
    return message.get("reasoning_content"), message["content"], deltas


@pytest.mark.parametrize(
    "tail, inside",
    (
        ("<\uff5cAssistant\uff5c><think>\n", True),
        ("<|assistant|><think>", True),
        ("<\uff5cAssistant\uff5c></think>", False),
        ("<\uff5cAssistant\uff5c>", False),
        ("what is <think>?<\uff5cAssistant\uff5c>", False),
        ("<think>\n\n</think>\n\n", False),
        ("", False),
    ),
)
def test_the_end_of_the_prompt_says_where_an_answer_begins(tail: str, inside: bool) -> None:
    assert starts_inside(tail) == inside


@pytest.mark.parametrize("form", [FORM, form_of(special=True)], ids=["marks are text", "marks are special tokens"])
@pytest.mark.parametrize(
    "text, prompt, reasoning, content",
    (
        ("2 + 2\n</think>\n\nIt is 4.", R1, "2 + 2\n", "\n\nIt is 4."),
        ("never closed", R1, "never closed", ""),
        ("</think>x", R1, None, "x"),
        ("It is 4.", V31, None, "It is 4."),
        ("<think>2 + 2</think>4", "hi", "2 + 2", "4"),
        ("a<think>b</think>c<think>d", "hi", "bd", "ac"),
        ("a</think>b", V31, None, "a</think>b"),
        ("a<think>b</think>c", R1, "a<think>b", "c"),
        ("é\U0001f600</think>€", R1, "é\U0001f600", "€"),
        ("a<eos>b</think>c<eos>", R1, "ab", "c"),
        ("", R1, None, ""),
    ),
)
def test_an_answer_is_split_at_its_marks(
    text: str, prompt: str, reasoning: str | None, content: str, form: ChatFormat
) -> None:
    assert split(text, prompt, form=form)[:2] == (reasoning, content)


def test_it_is_split_as_it_comes() -> None:
    deltas = split("ab</think>c", R1)[2]
    assert deltas == [{"reasoning_content": "a"}, {"reasoning_content": "b"}, {"content": "c"}]


@pytest.mark.parametrize(
    "stop, reasoning, content",
    (
        ("b", "a", ""),
        ("bc", "ab", "cd"),  # no text that the client sees has them together
        ("think", "ab", "cd"),
        ("d", "ab", "c"),
        ("</think>", "ab", ""),
        ("b</think>c", "a", ""),
        ("k>c", "ab", "cd"),
    ),
)
def test_a_stop_string_works_on_the_text_that_the_client_sees(stop: str, reasoning: str, content: str) -> None:
    assert split("ab</think>cd", R1, stop)[:2] == (reasoning, content)


def test_without_the_marks_in_the_vocabulary_all_is_content() -> None:
    assert split("a</think>b", R1, form=ChatFormat(make_tokenizer()))[:2] == (None, "a</think>b")


def test_a_mark_whose_end_could_begin_a_stop_string_is_no_text_meanwhile() -> None:
    reasoning, content, deltas = split("a<think>bz", "hi", "k>b<think>")
    assert (reasoning, content) == ("bz", "a") and deltas[0] == {"content": "a"}
