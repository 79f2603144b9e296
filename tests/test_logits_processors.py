"""Logits processors are those of transformers and OpenAI, and a token still depends on its request alone."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DeepseekV3ForCausalLM,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from disagg import sampler
from disagg.config import EngineConfig
from disagg.control.messages import Submit, encode
from disagg.engine import Engine
from disagg.history import History
from disagg.request import Request
from disagg.sampler import process
from disagg.scheduler import Sequence
from kernels.ops import Ops
from model.config import ModelConfig
from model.sampling import SamplingRows, keep_top, sample
from parallel.mesh import Mesh
from tests import hf
from tests.test_gpu_engine import serve

VOCAB = 40
EOS = (3, 7)


def expected(request: Request, generated: list[int], logits: Tensor) -> Tensor:
    """Logits [V] after the processors of transformers, and presence and frequency penalties as OpenAI writes them."""
    prompt, row = request.prompt[: len(request.prompt) - request.resumed], logits[None].clone()
    ids = torch.tensor([[*prompt, *generated]])
    if request.logit_bias:
        row = SequenceBiasLogitsProcessor({(token,): float(b) for token, b in request.logit_bias.items()})(ids, row)
    row = RepetitionPenaltyLogitsProcessor(float(request.repetition_penalty))(ids, row)
    for token, count in Counter(generated).items():
        row[0, token] -= count * request.frequency_penalty
        row[0, token] -= request.presence_penalty
    ends = [*request.stop_token_ids, *(() if request.ignore_eos else EOS)]
    return MinNewTokensLengthLogitsProcessor(len(prompt), request.min_tokens, ends, device="cpu")(ids, row)[0]


def anything(rng: random.Random, uid: int) -> Request:
    """A request with some of the parameters, perhaps of a later attempt."""
    maybe = lambda value, off: value if rng.random() < 0.7 else off  # noqa: E731
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))]
    return Request(
        uid,
        prompt,
        20,
        ignore_eos=rng.random() < 0.5,
        presence_penalty=maybe(rng.choice((-2, 0.5, 2)), 0),
        frequency_penalty=maybe(rng.choice((-2, 0.25, 2)), 0),
        repetition_penalty=maybe(rng.choice((0.01, 0.5, 1.5, 100)), 1),
        logit_bias=maybe({rng.randrange(VOCAB): rng.choice((-100, 0.5, 100)) for _ in range(3)}, {}),
        min_tokens=maybe(rng.randrange(1, 8), 0),
        stop_token_ids=maybe([rng.randrange(VOCAB) for _ in range(3)], []),
        resumed=maybe(rng.randrange(len(prompt)), 0),
    )


@pytest.mark.parametrize("unseen", [True, False])
def test_rows_are_changed_as_transformers_and_openai_do(unseen: bool) -> None:
    """`unseen`: the host has not seen the latest token of the sequences that decode. Logits have zeros and ties."""
    rng, sequences, latest, wanted = random.Random(0), [], [], []
    logits = (torch.randn(60, VOCAB) * 4).round() / 2
    assert (logits == 0).any()
    for row in range(60):
        request = anything(rng, row)
        generated = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12) if row < 40 else 0)]
        sequence = Sequence(request, EOS, [*request.prompt, *generated])
        sequence.computed = len(sequence.tokens)
        earlier = request.prompt[len(request.prompt) - request.resumed :]
        wanted.append(expected(request, earlier + generated, logits[row]))
        sequences.append(sequence)
        if row < 40:
            latest.append(generated[-1])
            del sequence.tokens[len(sequence.tokens) - unseen :]
    process(logits, sequences, torch.tensor(latest))
    assert torch.equal(logits, torch.stack(wanted))


def test_a_sequence_that_grows_keeps_its_history() -> None:
    """Its arrays grow with it, whenever they were last asked for."""
    rng = random.Random(1)
    requests = [msgspec.structs.replace(anything(rng, uid), max_tokens=40) for uid in range(12)]
    sequences = [Sequence(request, EOS) for request in requests]
    for sequence in sequences:
        sequence.append(rng.randrange(VOCAB))
    for _ in range(38):
        asked = [s for s in sequences if rng.random() < 0.5]
        for sequence in asked:
            sequence.computed = len(sequence.tokens)
        logits = torch.randn(len(asked), VOCAB)
        wanted = [
            expected(s.request, s.tokens[len(s.request.prompt) - s.request.resumed :], row)
            for s, row in zip(asked, logits, strict=True)
        ]
        process(logits, asked, torch.tensor([s.tokens[-1] for s in asked], dtype=torch.int64))
        assert not asked or torch.equal(logits, torch.stack(wanted))
        for sequence in sequences:
            sequence.append(rng.randrange(VOCAB))


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (12, 1.0), (0, 0.8), (12, 0.8)])
@pytest.mark.parametrize("min_p", [0.0, 1e-6, 0.1, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(50, VOCAB) * 2
    warpers = [TemperatureLogitsWarper(0.7), *([TopKLogitsWarper(top_k)] if top_k else [])]
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    theirs = logits
    for warper in [*warpers, MinPLogitsWarper(min_p)]:
        theirs = warper(torch.zeros(50, 1), theirs)
    columns = torch.tensor([top_k] * 50), torch.tensor([top_p] * 50), torch.tensor([min_p] * 50)
    ours = keep_top(logits / 0.7, *columns)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.equal(ours[ours.isfinite()], theirs[theirs.isfinite()])


def test_min_p_keeps_all_that_are_equally_likely() -> None:
    logits = torch.tensor([[2.0, 1.0, 2.0, -1.0, 2.0]])
    kept = keep_top(logits, torch.tensor([0]), torch.tensor([1.0]), torch.tensor([1.0]))
    assert kept.isfinite().tolist() == [[True, False, True, False, True]]
    rows = [(1.0, 1.0, 0, seed, 0) for seed in range(200)]
    tokens = sample(logits.expand(200, -1), SamplingRows.build(rows, "cpu", [1.0] * 200))
    assert set(tokens.tolist()) == {0, 2, 4}


PENALTIES = st.floats(-2, 2, width=32)
TOKENS = st.integers(0, VOCAB - 1)


@given(
    st.lists(
        st.builds(
            Request,
            st.just(0),
            st.lists(TOKENS, min_size=1, max_size=5),
            st.just(8),
            temperature=st.sampled_from((0.0, 1e-4, 1.0, 1000.0)),
            min_p=st.floats(0, 1),
            presence_penalty=PENALTIES,
            frequency_penalty=PENALTIES,
            repetition_penalty=st.floats(0.01, 100),
            logit_bias=st.dictionaries(TOKENS, st.floats(-100, 100), max_size=5),
            min_tokens=st.integers(0, 8),
            stop_token_ids=st.lists(TOKENS, max_size=5) | st.just(list(range(VOCAB))),
        ),
        min_size=1,
        max_size=4,
    ),
    st.lists(TOKENS, min_size=1, max_size=7),
    st.floats(-1e4, 1e4, width=32),
    st.integers(0, 2**20),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_within_its_bounds_every_request_gets_a_token(
    requests: list[Request], generated: list[int], scale: float, seed: int
) -> None:
    """One that it allows, if there is one. Also where logits and parameters are as large as they may be."""
    sequences = [Sequence(request, EOS, request.prompt + generated) for request in requests]
    for sequence in sequences:
        sequence.computed = len(sequence.tokens)
    logits = torch.randn(len(requests), VOCAB, generator=torch.Generator().manual_seed(seed)) * scale
    process(logits, sequences, torch.full((len(requests),), generated[-1]))
    assert not logits.isnan().any() and not (logits == float("inf")).any()
    for sequence, token in zip(sequences, sample(logits, sampler.sampling_rows(sequences, "cpu")), strict=True):
        assert 0 <= token < VOCAB
        if len(generated) < sequence.request.min_tokens and len(sequence.stop_tokens) < VOCAB:
            assert int(token) not in sequence.stop_tokens


# The engine.

SETTINGS = EngineConfig(max_batch=4, max_tokens_per_step=48, kv_tokens=2048, max_model_len=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(tmp_path_factory.mktemp("processors"), "one_dense")


@contextmanager
def engine_of(folder: Path, eos: tuple[int, ...] = (), **changes: Any) -> Iterator[Engine]:
    config = replace(ModelConfig.from_pretrained(folder), eos_token_ids=eos)
    engine = Engine.from_pretrained(replace(SETTINGS, **changes), config, folder, Mesh(), Ops())
    yield engine
    engine.close()


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(hf.BASE["vocab_size"]) for _ in range(length)] for length in (1, 30, 64, 100)]


def test_greedy_tokens_are_those_of_transformers_generate(folder: Path) -> None:
    """With all of transformers' parameters, for prompts that take several chunks, beside plain requests."""
    theirs = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    bias, wanted, plain = {11: 3.0, 40: -100.0}, {}, {}
    changes = {"repetition_penalty": 1.3, "sequence_bias": [[[token], value] for token, value in bias.items()]}

    def generate(prompt: list[int], max_new_tokens: int, **how: Any) -> list[int]:
        how |= {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": 0}
        return theirs.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist()

    free = generate(prompts()[1], 5, **changes)
    eos = free[2], free[4]  # min_tokens changes this answer
    for uid, prompt in enumerate(prompts()):
        plain[uid + 10] = generate(prompt, 16, eos_token_id=list(eos))
        wanted[uid] = generate(prompt, 16, eos_token_id=list(eos), min_new_tokens=7, **changes)
    fields = {"repetition_penalty": 1.3, "min_tokens": 7, "logit_bias": bias}
    work = [Request(uid, prompt, 16, **fields) for uid, prompt in enumerate(prompts())]
    work += [Request(uid + 10, prompt, 16) for uid, prompt in enumerate(prompts())]
    with engine_of(folder, eos) as engine:
        got = {uid: tokens for uid, (tokens, _) in serve(engine, work).items()}
    assert got == wanted | plain
    assert not any(set(tokens[:7]) & set(eos) for tokens in wanted.values())
    assert wanted[1][:2] == free[:2] and wanted[1][2] != free[2]


ALL: dict[str, Any] = {
    "presence_penalty": 0.75,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.25,
    "logit_bias": {11: 2.5, 40: -100, 7: 1},
    "min_tokens": 6,
    "stop_token_ids": list(range(60, 72)),
    "min_p": 0.02,
}


def requests() -> list[Request]:
    """Greedy and sampled ones, with all parameters, with one, and with none."""
    others: dict[int, dict[str, Any]] = {2: {"repetition_penalty": 1.5}, 3: {}, 6: {"frequency_penalty": 2.0}}
    made = []
    for i, prompt in enumerate(prompts() * 2):
        fields = others.get(i, {"min_p": 0.2} if i == 7 else ALL)
        made.append(Request(i, prompt, 24, 0.9 * (i % 2), seed=i, ignore_eos=i != 5, logprobs=i % 3, **fields))
    return made


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[int, tuple[list, list]]:
    with engine_of(folder, EOS) as engine:
        return serve(engine, requests())


def test_these_parameters_change_the_answers(folder: Path, answers: dict[int, tuple[list, list]]) -> None:
    """Otherwise the tests below would show nothing."""
    work = requests()
    bare = [
        Request(r.uid, r.prompt, 24, r.temperature, seed=r.seed, ignore_eos=True, logprobs=r.logprobs) for r in work
    ]
    with engine_of(folder, EOS) as engine:
        others = serve(engine, bare)
    for request in work:
        changed = request.processes_logits or (request.min_p > 0 and request.temperature > 0)
        assert (answers[request.uid][0] != others[request.uid][0][: len(answers[request.uid][0])]) == changed, request
    ended = [tokens for tokens, _ in answers.values() if len(tokens) < 24]
    assert ended and all(len(tokens) > 6 and tokens[-1] in (*ALL["stop_token_ids"], *EOS) for tokens in ended)


def test_tokens_do_not_depend_on_the_batch_or_on_what_the_host_has_seen(
    folder: Path, answers: dict[int, tuple[list, list]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on where prompts are cut, overlapped halves, or the way of the tokens to the host."""
    with engine_of(folder, EOS, max_batch=7, max_tokens_per_step=64, overlap="on") as engine:
        monkeypatch.setattr(engine, "runs_ahead", lambda work: not work.mixed)
        same(serve(engine, requests()[::-1]), answers)
    with engine_of(folder, EOS) as engine:
        for request in requests()[:3]:
            same(serve(engine, [request]), {request.uid: answers[request.uid]})


def same(got: dict[int, tuple[list, list]], wanted: dict[int, tuple[list, list]]) -> None:
    assert {uid: tokens for uid, (tokens, _) in got.items()} == {uid: tokens for uid, (tokens, _) in wanted.items()}
    for uid, (_, rows) in got.items():
        assert [[token for token, _ in row] for row in rows] == [[token for token, _ in row] for row in wanted[uid][1]]


def test_a_later_attempt_goes_on_as_the_first_would_have(folder: Path, answers: dict[int, tuple[list, list]]) -> None:
    work, wanted = [], {}
    for request in requests():
        tokens = answers[request.uid][0]
        for done in {1, 5, 6, 14} & set(range(1, len(tokens))):
            uid, prompt = 100 * request.uid + done, request.prompt + tokens[:done]
            work.append(
                msgspec.structs.replace(request, uid=uid, prompt=prompt, max_tokens=24 - done, resumed=done, logprobs=0)
            )
            wanted[uid] = tokens[done:]
    assert len(work) > 20
    with engine_of(folder, EOS, max_batch=16) as engine:
        assert {uid: tokens for uid, (tokens, _) in serve(engine, work).items()} == wanted


class Counted(TorchDispatchMode):
    """Counts the operations inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_they_cost_nothing_where_no_request_of_a_step_uses_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation and no array: plain steps do nothing behind the forward, others what sampling alone does."""
    monkeypatch.setattr(History, "__init__", lambda *args: pytest.fail("a history"))
    counted: dict[str, Counter] = {}
    kinds = {"plain": {}, "sampled": {"temperature": 0.9, "top_p": 0.9}, "log probabilities": {"logprobs": 2}}
    with engine_of(folder) as engine:
        latest, choose = engine.sampler.latest, engine.sampler.choose
        for kind, fields in kinds.items():
            count = Counted()

            def inside(call: Callable, *args: Any, count: Counted = count) -> Any:
                with count:
                    return call(*args)

            monkeypatch.setattr(engine.sampler, "latest", lambda work, inside=inside: inside(latest, work))
            monkeypatch.setattr(engine.sampler, "choose", lambda *args, inside=inside: inside(choose, *args))
            serve(engine, [Request(i, [5, 6], 3, ignore_eos=True, **fields) for i in range(2)])
            counted[kind] = count.names
    assert not counted["plain"]
    sampling, logits = Counted(), torch.randn(2, 160)
    with sampling:
        sample(logits, SamplingRows.build([(0.9, 0.9, 0, 0, 1)] * 2, "cpu"))
    steps = counted["sampled"]["sort"]
    extra = {name: n - steps * sampling.names[name] for name, n in counted["sampled"].items()}
    finite = Counter(("index", "eq", "masked_fill"))  # rows whose logits are not finite have no token
    choice = finite + Counter(("index", "index_put_", "lift_fresh", "view"))
    assert {name: n for name, n in extra.items() if n} == {name: n * steps for name, n in choice.items()}
    assert {"scatter_add_", "zeros_like", "where"}.isdisjoint(counted["log probabilities"])
    for name in ("penalty", "bias", "min_", "stop_token", "resumed"):
        assert name.encode() not in encode(Submit(Request(1, [2], temperature=0.5), None))
