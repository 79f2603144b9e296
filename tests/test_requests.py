"""Every line of input is either a request that the engine can run, or one ValueError that names the error."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2 import Template, TemplateError
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from disagg.front.parse import Served, UserRequest, parse_line
from disagg.front.tokenizer import PromptEncoder
from disagg.request import Request

VOCAB_SIZE = 257
BOS = 256
LIMIT = 64  # max_model_len


def byte_tokenizer() -> Tokenizer:
    """A token for each byte of UTF-8, and a bos."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return tokenizer


def refuse_system(message: str) -> None:
    raise TemplateError(message)


TEMPLATE = Template(
    "{% for m in messages %}{% if m.role == 'system' %}{{ refuse('no system here') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEMPLATE.globals["refuse"] = refuse_system
TOKENIZER = byte_tokenizer()
ENCODER = PromptEncoder(TOKENIZER, TEMPLATE)


def parse(fields: dict | str, encoder: PromptEncoder = ENCODER) -> UserRequest:
    line = fields if isinstance(fields, str) else json.dumps(fields)
    return parse_line(line, 7, Served(encoder, VOCAB_SIZE, LIMIT))


def test_what_is_not_given_has_its_default() -> None:
    user = parse({"prompt": "hi"})
    request = user.request
    assert (user.id, user.stop, request.uid) == (7, [], 7)
    assert request.max_tokens == LIMIT - len(request.prompt), "to the model's limit"
    assert (request.temperature, request.top_p, request.top_k) == (0.0, 1.0, 0)
    assert (request.ignore_eos, request.logprobs, request.return_experts) == (False, 0, False)
    assert (request.min_p, request.presence_penalty, request.frequency_penalty) == (0, 0, 0)
    assert (request.repetition_penalty, request.logit_bias, request.min_tokens) == (1, {}, 0)
    assert (request.stop_token_ids, request.resumed) == ([], 0)
    assert 0 <= request.seed < 2**31


def test_what_is_given_is_taken() -> None:
    given = {
        "max_tokens": 40,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "seed": 2**63 - 1,
        "ignore_eos": True,
        "logprobs": 20,
        "return_experts": True,
        "min_p": 0.25,
        "presence_penalty": -2,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.1,
        "min_tokens": 40,
        "stop_token_ids": [3, 256],
        "prompt_logprobs": 0,
    }
    user = parse(
        {"id": "mine", "prompt_token_ids": [0, 3, 256], "stop": ["a", "bc"], "session_id": "a b" * 85, **given}
    )
    assert user.session_id == "a b" * 85 and parse({"prompt": "hi"}).session_id is None
    assert user.id == "mine" and user.stop == ["a", "bc"]
    assert user.request.prompt == [0, 3, 256]
    assert {name: getattr(user.request, name) for name in given} == given


def test_biases_are_named_by_their_tokens_digits() -> None:
    given = {"0": -100, "256": 0.5, "0017": 100}
    assert parse({"prompt": "hi", "logit_bias": given}).request.logit_bias == {0: -100, 256: 0.5, 17: 100}
    many = {str(token): 1 for token in range(VOCAB_SIZE)}
    assert len(parse({"prompt": "hi", "logit_bias": many}).request.logit_bias) == VOCAB_SIZE


@pytest.mark.parametrize("fields", ({"logit_bias": {"3": 1, "257": 1}}, {"stop_token_ids": [2, 257, 1]}))
def test_a_token_outside_the_vocabulary_is_named_with_its_field(fields: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(fields))}: token 257 is not in the model's vocabulary of 257$"):
        parse({"prompt": "hi", **fields})


def test_fewer_tokens_than_are_asked_for_at_least_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^min_tokens \(9\) is over max_tokens \(8\)$"):
        parse({"prompt": "hi", "max_tokens": 8, "min_tokens": 9})
    with pytest.raises(ValueError, match=rf"^min_tokens \({LIMIT}\) is over max_tokens \({LIMIT - 3}\)$"):
        parse({"prompt": "hi", "min_tokens": LIMIT})


def test_requests_without_a_seed_draw_different_ones() -> None:
    assert len({parse({"prompt": "hi"}).request.seed for _ in range(20)}) > 1


@pytest.mark.parametrize("field, value", (("temperature", 1), ("temperature", 0), ("top_p", 1)))
def test_an_integer_is_a_number_where_a_number_is_asked_for(field: str, value: int) -> None:
    assert getattr(parse({"prompt": "hi", field: value}).request, field) == value


def test_one_stop_string_is_a_list_of_one() -> None:
    assert parse({"prompt": "hi", "stop": "\n\n"}).stop == ["\n\n"]


def test_the_tokenizer_adds_bos_to_a_prompt_and_the_chat_template_to_messages() -> None:
    text = "é!"
    as_bytes = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert len(as_bytes) == len(text.encode())
    assert parse({"prompt": text}).request.prompt == [BOS, *as_bytes]
    chat = parse({"messages": [{"role": "user", "content": text}]}).request.prompt
    assert TOKENIZER.decode(chat) == "[user]é![assistant]" and BOS not in chat
    written = PromptEncoder(TOKENIZER, Template("<bos>{{ messages[0].content }}"))
    assert parse({"messages": [{"role": "user", "content": text}]}, written).request.prompt == [BOS, *as_bytes]


def test_a_prompt_may_fill_the_model_exactly() -> None:
    request = parse({"prompt_token_ids": [1] * (LIMIT - 1), "max_tokens": 1}).request
    assert len(request.prompt) == LIMIT - 1


def test_a_prompt_may_be_scored_without_generating() -> None:
    request = parse({"prompt_token_ids": [1] * LIMIT, "max_tokens": 0, "prompt_logprobs": 0}).request
    assert (request.max_tokens, request.prompt_logprobs, request.most_tokens) == (0, 0, LIMIT)
    assert parse({"prompt": "hi", "prompt_logprobs": None}).request.prompt_logprobs is None
    for name in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(ValueError, match=f"{name} is 0; .* at least 1, or 0 with prompt_logprobs"):
            parse({"prompt": "hi", name: 0, "prompt_logprobs": None})


def test_max_tokens_has_another_name_and_may_be_left_out() -> None:
    assert parse({"prompt": "hi", "max_completion_tokens": 3}).request.max_tokens == 3
    assert parse({"prompt": "hi", "max_completion_tokens": 3, "max_tokens": 3}).request.max_tokens == 3
    with pytest.raises(ValueError, match="max_completion_tokens is 3, but max_tokens is 4; give one of them"):
        parse({"prompt": "hi", "max_completion_tokens": 3, "max_tokens": 4})
    with pytest.raises(ValueError, match="max_completion_tokens is 0; it must be an integer of at least 1"):
        parse({"prompt": "hi", "max_completion_tokens": 0})
    with pytest.raises(
        ValueError, match=rf"prompt \({LIMIT} tokens\) leaves no room for a token: max_model_len is {LIMIT}"
    ):
        parse({"prompt_token_ids": [1] * LIMIT})


BAD_FIELDS = (
    *(("max_tokens", value, "at least 1") for value in (0, -1, 1.0, True, "5", [])),
    *(("top_p", value, r"in \(0, 1\]") for value in (0, -0.1, 1.0001, 2, "1", True, float("nan"))),
    *(("top_k", value, "at least 0") for value in (-1, 0.5, False, "1", 2**31)),
    *(("seed", value, "in 0..2") for value in (-1, 2**63, 1.0, True, "x")),
    *(
        ("temperature", value, "in 0..1000")
        for value in (-0.01, float("nan"), float("inf"), -float("inf"), 1e300, 10**400, 1001, True, "0")
    ),
    *(("ignore_eos", value, "true or false") for value in (0, 1, "true")),
    *(("id", value, "a string of Unicode or an integer") for value in (1.5, [], "a\ud800", "\udfff")),
    *(("return_experts", value, "true or false") for value in (0, 1, "true", [], {})),
    *(("session_id", value, "1 to 256 characters") for value in ("", "x" * 257, 5, True, ["a"], "\udfff")),
    *(("logprobs", value, "in 0..20") for value in (21, -1, 1.0, True, [])),
    ("stop", ["a"] * 65, "at most 64 strings"),
    *(("min_p", value, r"in 0..1 \(0 = off\)") for value in (-0.1, 1.1, True, "0", float("nan"))),
    *(
        (name, value, r"in -2..2 \(0 = off\)")
        for name in ("presence_penalty", "frequency_penalty")
        for value in (-2.1, 2.01, 10**400, float("nan"), False, "1")
    ),
    *(("repetition_penalty", value, r"in 0.01..100") for value in (0, -1, 1e-30, 101, float("inf"), float("nan"), "1")),
    *(("min_tokens", value, "at least 0") for value in (-1, 0.5, True, "1")),
    *(
        ("logit_bias", value, "at most 1024 tokens, each with a number in -100..100")
        for value in (
            5,
            [],
            [[3, 1]],
            {"a": 1},
            {"-1": 1},
            {"1.0": 1},
            {"": 1},
            {"\u0663": 1},
            {"9" * 5000: 1},
            {"3": "1"},
            {"3": None},
            {"3": True},
            {"3": 101},
            {"3": -100.5},
            {"3": float("nan")},
            {"3": 10**400},
            {"3": 1, "03": 2},
            {str(token): 0 for token in range(1025)},
        )
    ),
    *(
        ("stop_token_ids", value, "a list of at most 1024 tokens")
        for value in (5, "5", {}, [-1], [1.0], [True], ["1"], [[1]], [None], [1] * 1025)
    ),
    *(("prompt_logprobs", value, "in 0..20") for value in (21, -1, 0.0, True, "1", {})),
    *(("stop", value, "non-empty string") for value in ("", [""], ["a", ""], ["a", 1], 5, {}, True, [None])),
)


@pytest.mark.parametrize("field, value, rule", BAD_FIELDS)
def test_a_bad_field_is_named_with_its_value_and_the_rule(field: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule) as caught:
        parse({"prompt": "hi", field: value})
    assert str(caught.value).startswith(f"{field} is {value!r}"[:50])
    assert len(str(caught.value)) < 200


BAD_PROMPTS = (
    *({"prompt": value} for value in ("", 5, None, ["hi"], True, {})),
    *(
        {"prompt_token_ids": value}
        for value in ([], "12", None, 5, {}, [VOCAB_SIZE], [-1], [True], [1.0], ["1"], [[1]])
    ),
    {"prompt_token_ids": [1, 2, 10**30]},
    *({"messages": value} for value in ([], "hi", None, {}, ["hi"], [5], [None])),
    {"messages": [{"content": "hi"}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": ["hi"]}]},
    {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
    {"messages": [{"role": 1, "content": "hi"}]},
    {"messages": [{"role": "user", "content": "hi"}, {}]},
    {"messages": [{"role": "system", "content": "hi"}]},  # this template refuses
    {"prompt": "a \ud800 b"},
    {"messages": [{"role": "user", "content": "\udfff"}]},
)


@pytest.mark.parametrize("fields", BAD_PROMPTS, ids=lambda fields: json.dumps(fields)[:60])
def test_a_bad_prompt_is_refused_by_name(fields: dict) -> None:
    (name,) = fields
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        parse(fields)


def test_a_token_that_is_not_in_the_vocabulary_is_named_with_the_vocabularys_bounds() -> None:
    parse({"prompt_token_ids": [VOCAB_SIZE - 1, 0]})
    with pytest.raises(ValueError, match=f"holds {VOCAB_SIZE}; each must be an integer in 0..{VOCAB_SIZE - 1}"):
        parse({"prompt_token_ids": [1, VOCAB_SIZE]})


WHOLE = Template(
    "{{ messages | map(attribute='content') | join }} {{ tools }} {{ documents }} {{ add_generation_prompt }} {{ x }}"
)


@pytest.mark.parametrize(
    "fields, text",
    (
        ({}, "hi None None True "),
        ({"tools": None, "documents": None, "chat_template_kwargs": None}, "hi None None True "),
        ({"tools": [], "documents": []}, "hi [] [] True "),
        ({"tools": [{"a": 1}], "documents": [{"b": "c"}]}, "hi [{'a': 1}] [{'b': 'c'}] True "),
        ({"chat_template_kwargs": {"x": [5], "add_generation_prompt": False}}, "hi None None False [5]"),
        ({"chat_template_kwargs": {"self": 1, "given": 2, "": 3}}, "hi None None True "),
    ),
)
def test_fields_beside_messages_reach_the_template(fields: dict, text: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    user = parse({"messages": messages, "max_tokens": 1, **fields}, PromptEncoder(TOKENIZER, WHOLE))
    assert TOKENIZER.decode(user.request.prompt) == text


@pytest.mark.parametrize(
    "field, value, rule",
    (
        *(("tools", value, "a list of objects") for value in (5, {}, "x", [5], [[]], [None])),
        *(("documents", value, "a list of objects") for value in (True, {"text": "x"}, ["x"])),
        *(("chat_template_kwargs", value, "an object without messages, tools and documents") for value in ([], 5, "x")),
        *(("chat_template_kwargs", {name: []}, "an object without") for name in ("messages", "tools", "documents")),
    ),
)
def test_a_bad_field_beside_messages_is_named(field: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} is .*; it must be {rule}"):
        parse({"messages": [{"role": "user", "content": "hi"}], field: value})


@pytest.mark.parametrize("field", ("tools", "documents", "chat_template_kwargs"))
def test_fields_beside_messages_need_messages(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} goes with messages, not with prompt$"):
        parse({"prompt": "hi", field: []})


def test_a_model_without_a_tokenizer_takes_token_ids_and_nothing_with_text() -> None:
    bare = PromptEncoder(None, None)
    assert parse({"prompt_token_ids": [1, 2], "stop": []}, bare).request.prompt == [1, 2]
    why = "this model has neither tokenizer.json nor tiktoken.model"
    for fields in ({"prompt": "hi"}, {"messages": [{"role": "user", "content": "hi"}]}):
        with pytest.raises(ValueError, match=f"^{next(iter(fields))}: {why}; give prompt_token_ids$"):
            parse(fields, bare)
    with pytest.raises(ValueError, match=f"^stop: {why}, so its answers have no text$"):
        parse({"prompt_token_ids": [1], "stop": ["x"]}, bare)


def test_messages_need_a_chat_template() -> None:
    with pytest.raises(ValueError, match="messages: this model has no chat template"):
        parse({"messages": [{"role": "user", "content": "hi"}]}, PromptEncoder(TOKENIZER, None))


@pytest.mark.parametrize(
    "given", ((), ("prompt", "messages"), ("prompt", "prompt_token_ids"), ("prompt", "prompt_token_ids", "messages"))
)
def test_exactly_one_kind_of_prompt_is_given(given: tuple[str, ...]) -> None:
    values = {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "prompt_token_ids": [1]}
    with pytest.raises(ValueError, match=f"exactly one of .* not {' and '.join(given) or 'none'}"):
        parse({name: values[name] for name in given})


@pytest.mark.parametrize("length, max_tokens", ((LIMIT, 1), (LIMIT - 4, 5), (1, LIMIT), (1000, 1000), (1, 10**30)))
def test_a_request_over_the_models_length_is_told_the_numbers(length: int, max_tokens: int) -> None:
    numbers = rf"\({length} tokens\).*\({max_tokens}\) = {length + max_tokens} is over max_model_len \({LIMIT}\)"
    with pytest.raises(ValueError, match=numbers):
        parse({"prompt_token_ids": [1] * length, "max_tokens": max_tokens})


def test_a_long_text_is_counted_in_tokens_with_its_bos() -> None:
    with pytest.raises(ValueError, match=rf"prompt \({LIMIT + 1} tokens\)"):
        parse({"prompt": "x" * LIMIT})


def test_an_unknown_field_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown field 'max_token'; known are .*max_tokens"):
        parse({"prompt": "hi", "max_token": 5})


@pytest.mark.parametrize(
    "line",
    (
        "hello",
        "",
        "{",
        '{"prompt": "hi"',
        '{"prompt": "hi"} x',
        "{'prompt': 'hi'}",
        '{"prompt": "a\nb"}',
        '{"max_tokens": ' + "9" * 10_000 + ', "prompt": "hi"}',
        '{"id": ' + "[" * 100_000 + "]" * 100_000 + ', "prompt": "hi"}',
        "[" * 100_000,
    ),
    ids=lambda line: line[:20],
)
def test_what_is_not_json_is_said_to_be_so(line: str) -> None:
    with pytest.raises(ValueError, match="^not JSON"):
        parse(line)


@pytest.mark.parametrize("line", ("5", '"prompt"', "null", "true", "[]", '[{"prompt": "hi"}]', "NaN"))
def test_a_line_that_is_not_an_object_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=f"must be a JSON object, not {type(json.loads(line)).__name__}"):
        parse(line)


@pytest.mark.parametrize("fields", ({"prompt": "unheard words"}, {"messages": [{"role": "user", "content": "hm"}]}))
def test_a_prompt_without_a_single_token_is_refused(fields: dict) -> None:
    """The model has nothing to start from: neither a bos nor any token that the text became."""
    tokenizer = Tokenizer(BPE(vocab={"x": 0}, merges=[]))  # drops what it does not know
    with pytest.raises(ValueError, match="token"):
        parse(fields, PromptEncoder(tokenizer, Template("")))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 30)
    | st.floats()
    | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CHAT = ("tools", "documents", "chat_template_kwargs")
FIELDS = (
    *CHAT,
    "id",
    "prompt",
    "prompt_token_ids",
    "messages",
    "stop",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "logit_bias",
    "stop_token_ids",
    "repetition_penalty",
    "min_tokens",
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(("user", "system")), "content": st.text(st.characters())})
)


@given(
    st.dictionaries(
        st.sampled_from((*FIELDS, "ignore_eos", "logprobs", "return_experts", "prompt_logprobs")) | st.text(max_size=3),
        JSON,
        max_size=6,
    )
    | st.fixed_dictionaries(
        {},
        optional={
            "prompt": st.text(st.characters(codec=None), max_size=8),
            "prompt_token_ids": st.lists(st.integers(-1, VOCAB_SIZE), max_size=70),
            "messages": MESSAGES,
            "tools": st.lists(st.dictionaries(st.text(max_size=2), JSON, max_size=2), max_size=2),
            "chat_template_kwargs": st.dictionaries(st.sampled_from(("self", "x", "tools")), JSON, max_size=2),
            "max_tokens": st.integers(-1, 70),
            "temperature": st.floats() | st.integers(-1, 2),
            "top_p": st.floats(-0.5, 1.5),
            "top_k": st.integers(-1, 2**31),
            "logprobs": st.integers(-1, 21),
            "min_p": st.floats(),
            "frequency_penalty": st.floats(-3, 3),
            "repetition_penalty": st.floats(0, 101),
            "logit_bias": st.dictionaries(st.text("0123456789", max_size=3), st.floats(-101, 101), max_size=3),
            "min_tokens": st.integers(-1, 70),
            "stop_token_ids": st.lists(st.integers(-1, VOCAB_SIZE), max_size=3),
            "prompt_logprobs": st.integers(-1, 21),
            "stop": st.text(max_size=1) | st.lists(st.text(max_size=2), max_size=2),
        },
    )
)
@example({"prompt": "hi"})
@settings(deadline=None, derandomize=True, max_examples=200)
def test_any_object_is_a_request_that_can_run_or_a_value_error(fields: dict) -> None:
    try:
        user = parse(fields)
    except ValueError as error:
        assert type(error) is ValueError, "a ValueError of somebody else, which says nothing of the field"
        str(error).encode()
        return
    request = user.request
    assert 1 <= len(request.prompt) <= LIMIT - request.max_tokens
    assert all(type(token) is int and 0 <= token < VOCAB_SIZE for token in request.prompt)
    assert (
        request.max_tokens >= (request.prompt_logprobs is None) and request.temperature >= 0 and 0 < request.top_p <= 1
    )
    assert 0 <= request.top_k < 2**31 and 0 <= request.seed < 2**63 and 0 <= request.logprobs <= 20
    assert all(isinstance(stop, str) and stop for stop in user.stop)
    request.check_vocabulary(VOCAB_SIZE)
    assert msgspec.convert(msgspec.to_builtins(request), Request) == request, "the ranks would not take it"


@given(st.text(max_size=60))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_any_text_is_a_value_error_or_a_request(line: str) -> None:
    with pytest.raises(ValueError, match="not JSON|must be a JSON object|unknown field|exactly one of"):
        parse(line)


def test_null_is_as_good_as_not_given() -> None:
    names = ("id", "max_tokens", "temperature", "top_p", "top_k", "stop", "ignore_eos", "logprobs", "messages")
    given = parse({"prompt_token_ids": [1], "seed": 5, **dict.fromkeys(names)})
    assert given == parse({"prompt_token_ids": [1], "seed": 5})
