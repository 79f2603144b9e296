"""Messages survive the wire unchanged, and any other bytes are refused with a ValueError."""

import random
from typing import Any

import msgspec
import pytest

from disagg.control.messages import (
    PIECE,
    Abort,
    Back,
    Beat,
    Bye,
    Decoder,
    Finish,
    Gone,
    Hello,
    Kept,
    Load,
    Member,
    Ping,
    Stats,
    Submit,
    Tokens,
    ToRouter,
    ToWorker,
    Update,
    Updates,
    Welcome,
    Withdraw,
    encode,
)
from disagg.handoff.protocol import Cancel, Chosen, Closed, Knock, Last, Open, Read, Scored, Sending
from disagg.request import MOST_DRAFTS, Request

MEMBER = Member("é1", "127.0.0.1", 7000, 65535, 3, 4711)
REQUEST = Request(
    3, [0, 128_000, 7], 99, 0.75, 0.9, 40, 2**63 - 1, True, 20, True, 0.25, -2.0, 2.0, 100.0, {0: -100.0, 128_000: 0.5},
    9, [5, 128_000], 2, 0,
)  # fmt: skip
BY_DEFAULT = Request(4, [1])
UPDATE = Update(3, [5, 6], [[(5, -0.5), (9, -1.25)], []], "length")
HELLO = Hello("decode", [MEMBER, Member("b", "::1")], 64, 1024, 2**40, {"layers": "5"}, "a", 2, {"overlap": "on"})

TO_WORKER = (
    Welcome(),
    Submit(REQUEST, [MEMBER, Member("b", "h")]),
    Submit(BY_DEFAULT, None),
    Submit(Request(4, [1], 0, prompt_logprobs=20), None),
    Withdraw([3, 2**40]),
    Abort(2**40),
    Gone(["a", "b"]),
    Gone([]),
    Back(["a"]),
    Finish(),
    Finish("refused"),
    Ping(),
)
TO_ROUTER = (
    HELLO,
    Beat("a", 2**40, True),
    Beat("a", 3, False, None, True),
    Beat("a", 0, False, Load(2**40, 3, 2, 1, {2**40: 0, 7: 5}, 1)),
    Updates(
        [
            UPDATE,
            Tokens({7: 128_000, 2**40: 0}),
            Update(4, error="boom", retry=True),
            Update(5),
            Update(6, experts=b"\0\xff"),
            Update(7, prompt_rows=b"\xff\0"),
        ],
        [5],
        [6],
    ),
    Updates([]),
    Stats({"decode_steps": 3, "seconds": 0.125}),
    Kept(b"12345678", b"87654321abcdefgh", True),
    Kept(),
    Bye({"decode_steps": 3, "seconds": 0.125}),
    Bye({}),
)
ON_A_LINK = (
    Knock(MEMBER, 3),
    Open(REQUEST, [4, 1], [MEMBER]),
    Cancel(5),
    Sending([5], [9, 8]),
    Sending([5], [9], b"\0\xff", 2**32 - 1),
    Read(),
    Chosen(5, b"\0\1"),
    Scored(5, b"\1\0"),
    Last(5, 128_000, [(128_000, -0.5)], drafts=[7, 128_000]),
    Closed(5, "the prompt\ndoes not fit"),
)
DECODERS = {
    kind: Decoder(kind)
    for kind in (ToWorker, ToRouter, Knock | Open | Cancel | Sending | Read | Chosen | Scored | Last | Closed)
}
EXAMPLES = dict(zip(DECODERS, (TO_WORKER, TO_ROUTER, ON_A_LINK), strict=True))


def test_these_are_all_the_messages_there_are() -> None:
    """The tests below encode one of every type at least."""
    for kind, examples in EXAMPLES.items():
        assert set(kind.__args__) == {type(message) for message in examples}


@pytest.mark.parametrize("kind", DECODERS, ids=("to a worker", "to the router", "on a link"))
def test_every_message_is_decoded_as_it_was(kind: Any) -> None:
    for message in EXAMPLES[kind]:
        got = DECODERS[kind](encode(message))
        assert got == message and type(got) is type(message)


def test_numbers_keep_their_type_on_the_way() -> None:
    """An integer given for a float must not stay one on some ranks only; a logprob's token must stay an integer."""
    token, logprob = DECODERS[ToRouter](encode(Updates([UPDATE]))).updates[0].logprobs[0][0]
    assert type(token) is int and type(logprob) is float
    request = DECODERS[ToWorker](encode(Submit(Request(1, [1], temperature=1, top_p=1), None))).request
    assert type(request.temperature) is float and type(request.top_p) is float
    request = DECODERS[ToWorker](encode(Submit(Request(1, [1], min_p=1, logit_bias={5: 1}), None))).request
    assert type(request.min_p) is float and request.logit_bias == {5: 1.0} and type(request.logit_bias[5]) is float


def forged(message: msgspec.Struct, **fields: Any) -> bytes:
    """`message`, with other values than it may have."""
    return encode(msgspec.to_builtins(message) | fields)


def load(**fields: Any) -> dict:
    return msgspec.to_builtins(Load(1, 1, 1, 1)) | fields


NO_MESSAGES = {
    "nothing": b"",
    "junk": b"junk",
    "an array announced that never comes": b"\x82\xa4type\xa7Updates\xa7updates\xdd\xff\xff\xff\xff",
    "nested 200,000 deep": b"\x82\xa4type\xa5Hello\xa1z" + b"\x91" * 200_000 + b"\xc0",
    "another kind of message": encode(Ping()),
    "a token beyond 31 bits": encode(Updates([Update(3, [2**40])])),
    "a negative token": encode(Updates([Tokens({3: -1})])),
    "a piece of experts that is too large": encode(Updates([Update(3, experts=b"x" * (PIECE + 1))])),
    "a piece of log probabilities that is too large": encode(Updates([Update(3, prompt_rows=b"x" * (PIECE + 1))])),
    "an unknown reason to finish": encode(Updates([Update(3, finish="weird reason")])),
    "a checksum of 33 bits": forged(Sending([5], [9]), checksum=2**32),
    "a load below nothing": forged(Beat("a", 1, False), load=load(kv_pages=-1)),
    "a load that no float can hold": forged(Beat("a", 1, False), load=load(queued_tokens=2**53)),
    "a drain that is no truth value": forged(Beat("a", 1, False), draining=1),
    "a load of half a request": forged(Beat("a", 1, False), load=load(running=0.5)),
    "a prompt with fewer than no tokens left": forged(Beat("a", 1, False), load=load(tokens_left={3: -1})),
    "a load that names 257 prompts": forged(Beat("a", 1, False), load=load(tokens_left=dict.fromkeys(range(257), 1))),
    "a replica without ranks": forged(HELLO, members=[]),
    "a replica of 300,000 ranks": forged(HELLO, members=[msgspec.to_builtins(MEMBER)] * 300_000),
    "an unknown role": forged(HELLO, role="router"),
    "a batch of none": forged(HELLO, max_batch=0),
    "a name of 300 characters": forged(HELLO, job="x" * 300),
    "a reason of 300 characters": forged(HELLO, about={"overlap": "x" * 300}),
    "8,193 digests": encode(Kept(bytes(8 * 8193))),
    "5,000 statistics": encode(Stats({f"s{i}": 0.0 for i in range(5000)})),
    "a statistic that is no number": forged(Stats({}), stats={"decode_steps": "3"}),
}


@pytest.mark.parametrize("body", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_what_is_no_message_to_the_router_is_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a message"):
        DECODERS[ToRouter](body)


def test_a_room_is_for_the_ranks_of_one_replica() -> None:
    decoder = DECODERS[next(kind for kind, examples in EXAMPLES.items() if examples is ON_A_LINK)]
    members = [msgspec.structs.replace(MEMBER, id=f"decode {i}") for i in range(4097)]
    assert len(decoder(encode(Open(REQUEST, [4], members[:4096]))).decode) == 4096
    for count in (0, 4097):
        with pytest.raises(ValueError, match="not a message"):
            decoder(encode(Open(REQUEST, [4], members[:count])))
    twice = encode(Open(REQUEST, [4], members[:2])).replace(b"decode 1", b"decode 0")
    with pytest.raises(ValueError, match="a decode rank is named twice"):
        decoder(twice)


NOT_TO_SERVE = {
    "no prompt": Submit(Request(1, []), None),
    "a negative token": Submit(Request(1, [-1]), None),
    "a prefill replica without ranks": Submit(Request(1, [1]), []),
    "a prefill replica of 4,097 ranks": Submit(Request(1, [1]), [MEMBER] * 4097),
    "a penalty that is no number": Submit(Request(1, [1], presence_penalty=float("nan")), None),
    "a penalty over 2": Submit(Request(1, [1], frequency_penalty=2.5), None),
    "a penalty by which one cannot divide": Submit(Request(1, [1], repetition_penalty=0.0), None),
    "a min_p over 1": Submit(Request(1, [1], min_p=1.5), None),
    "an infinite bias": Submit(Request(1, [1], logit_bias={1: float("inf")}), None),
    "a bias for a negative token": Submit(Request(1, [1], logit_bias={-1: 1.0}), None),
    "1,025 biases": Submit(Request(1, [1], logit_bias=dict.fromkeys(range(1025), 1.0)), None),
    "a negative stop token": Submit(Request(1, [1], stop_token_ids=[-1]), None),
    "1,025 stop tokens": Submit(Request(1, [1], stop_token_ids=[1] * 1025), None),
}


@pytest.mark.parametrize("fields", [{"max_tokens": 0}, {"max_tokens": -1, "prompt_logprobs": 1},
                                    {"prompt_logprobs": -1}, {"prompt_logprobs": 21}, {"prompt_logprobs": True},
                                    {"prompt_logprobs": 1.5}])  # fmt: skip
def test_a_request_with_forged_numbers_is_no_message(fields: dict[str, Any]) -> None:
    """A request without max_tokens may only ask for its prompt's log probabilities."""
    with pytest.raises(ValueError, match="not a message"):
        DECODERS[ToWorker](forged(Submit(BY_DEFAULT, None), request={"uid": 1, "prompt": [1], **fields}))


@pytest.mark.parametrize("message", NOT_TO_SERVE.values(), ids=NOT_TO_SERVE)
def test_a_request_that_nobody_can_serve_is_no_message(message: Submit) -> None:
    with pytest.raises(ValueError, match="not a message"):
        DECODERS[ToWorker](encode(message))


@pytest.mark.parametrize("message", [Open(REQUEST, [0], [MEMBER]), Open(REQUEST, [1], []), Sending([], [1]),
                                     Sending([1], []), Last(1, -1, []), Knock(MEMBER, -1),
                                     Last(1, 1, [], drafts=[-1]), Last(1, 1, [], drafts=[1] * (MOST_DRAFTS + 1)),
                                     Chosen(1, b"x" * (PIECE + 1)), Scored(1, b"x" * (PIECE + 1))])  # fmt: skip
def test_pages_and_rooms_that_cannot_be_are_no_message(message: msgspec.Struct) -> None:
    with pytest.raises(ValueError, match="not a message"):
        list(DECODERS.values())[2](encode(message))


def test_a_later_attempt_has_a_token_of_its_users() -> None:
    with pytest.raises(ValueError, match="^resumed is 2; it must be below the prompt's 2 tokens$"):
        Request(1, [1, 2], resumed=2)
    body = encode(msgspec.to_builtins(Submit(Request(1, [1, 2]), None)))
    assert DECODERS[ToWorker](body)
    with pytest.raises(ValueError, match="not a message: resumed is 9"):
        DECODERS[ToWorker](
            encode({"type": "Submit", "request": {"uid": 1, "prompt": [1], "resumed": 9}, "prefill": None})
        )


def test_random_bytes_are_a_value_error() -> None:
    rng = random.Random(0)
    for decode in DECODERS.values():
        for _ in range(2_000):
            body = bytearray(encode(rng.choice(TO_WORKER + TO_ROUTER + ON_A_LINK)))
            for _ in range(rng.randrange(1, 4)):
                body[rng.randrange(len(body))] = rng.randrange(256)
            try:
                decode(bytes(body))
            except ValueError:
                continue
