"""The attention kernels (Triton, and Gluon on Hopper) against their twins in float32. Foreign memory is NaN."""

import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import hopper, ref
from kernels.mla_decode import mla_decode
from kernels.prefill_attention import prefill_attention
from tests.test_gpu_gemm import quantized

pytestmark = pytest.mark.gpu
DEVICE, NAN = "cuda", float("nan")
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(params=["best", "portable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "portable":
        monkeypatch.setattr(hopper, "on_hopper", lambda q: False)
    return request.param


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def agree(out: Tensor, want: Tensor) -> None:
    """bf16: 2^-9 of rounding in the softmax weights and again in the result; float32: exp2 and the order of sums."""
    norm, each = (1e-2, 2e-2) if out.dtype == BF16 else (1e-5, 1e-4)
    assert out.shape == want.shape and out.isfinite().all()
    assert ((out.float() - want).norm() / want.norm().clamp(min=1e-9)).item() < norm
    torch.testing.assert_close(out.float(), want, rtol=each, atol=each * max(want.std().item(), 1e-6))


def decode_inputs(
    lens: list[int], heads: int, dim: int, width: int, dtype: torch.dtype, q_len: int = 1
) -> tuple[Tensor, ...]:
    """Pages in random places; every row that no sequence owns is NaN, every table entry past a sequence's end wild."""
    need = [-(-n // 64) for n in lens]
    pages = randn(sum(need) + 3, 64, dim, dtype=dtype)
    owned = torch.zeros(len(pages), 64, dtype=torch.bool, device=DEVICE)
    table = torch.full((len(lens), width), 2**28, dtype=torch.int32)
    free = iter(torch.randperm(len(pages)).tolist())
    for i, n in enumerate(lens):
        for j in range(need[i]):
            table[i, j] = page = next(free)
            owned[page, : min(64, n - 64 * j)] = True
    pages[~owned] = NAN
    q = randn(len(lens) * q_len, heads, dim, dtype=dtype)
    return q, pages, table.to(DEVICE), torch.tensor(lens, device=DEVICE).int()


DECODE = [
    ([4096, 1, 0, 63, 64, 65, 1000], 128, 512, 64),
    ([777], 128, 512, 64),
    ([0], 128, 512, 64),
    ([random.randrange(600) for _ in range(300)], 16, 512, 64),  # enough programs for one split
    ([5000, 130, 0], 72, 512, 64),
    ([200, 64, 0, 7], 4, 64, 16),
    ([100, 300], 1, 64, 48),
    ([100, 300], 128, 256, 0),
    ([1000, 65, 0, 64, 3], 20, 512, 64),  # GLM-4.7-Flash; DeepSeek-V2-Lite has 16 heads
    ([1000, 65, 0, 64, 3] * 12, 16, 512, 64),
    ([1088, 64, 5], 16, 128, 32),
    ([129, 640], 7, 256, 64),
    # So few sequences and heads that they are cut into 32 keys, or into pages.
    *(([n], 16, 512, 64) for n in (0, 1, 31, 32, 33, 64, 1088, 2048, 2049, 9000)),
    ([1088, 0], 16, 512, 64),
    ([33, 9000], 5, 512, 64),
    ([500, 64], 16, 128, 0),
]


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("lens", "heads", "c", "r"), DECODE)
def test_decode(lens: list[int], heads: int, c: int, r: int, dtype: torch.dtype, path: str) -> None:
    q, pages, table, kv_lens = decode_inputs(lens, heads, c + r, max(lens) // 64 + 9, dtype)
    scale = (c + r) ** -0.5
    want = ref.mla_decode(q.float(), pages.float(), table, kv_lens, scale)
    agree(mla_decode(q, pages, table, kv_lens, scale, v_dim=c), want[..., :c])
    if path == "best":
        agree(mla_decode(q, pages, table, kv_lens, scale), want)  # all columns


VERIFY = [  # lengths for any number of tokens up to 5: all in a page, across two, in the last one alone
    ([4096, 5, 0, 64, 65, 66, 68, 69, 1000, 129], 128, 512, 64),
    ([777], 128, 512, 64),
    ([5 + random.randrange(600) for _ in range(150)], 16, 512, 64),
    ([5000, 130, 0], 20, 512, 64),
    ([4096, 5, 0, 64, 65, 66, 68, 69, 1000, 129], 3, 512, 64),  # few rows of queries
    ([200, 64, 0, 7, 66], 4, 64, 16),
    ([100, 321], 1, 64, 48),
    ([100, 300], 72, 256, 0),
]


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("q_len", [2, 3, 4, 5])
@pytest.mark.parametrize(("lens", "heads", "c", "r"), VERIFY)
def test_decode_of_several_tokens(
    lens: list[int], heads: int, c: int, r: int, q_len: int, dtype: torch.dtype, path: str
) -> None:
    q, pages, table, kv_lens = decode_inputs(lens, heads, c + r, max(lens) // 64 + 9, dtype, q_len)
    scale = (c + r) ** -0.5
    want = ref.mla_decode(q.float(), pages.float(), table, kv_lens, scale)
    agree(mla_decode(q, pages, table, kv_lens, scale, v_dim=c), want[..., :c])
    apart = q.new_empty(len(q), 2 * heads, c + r)[:, :heads].copy_(q)  # tokens that do not lie in a row
    agree(mla_decode(apart, pages, table, kv_lens, scale, v_dim=c), want[..., :c])
    if path == "best":
        agree(mla_decode(q, pages, table, kv_lens, scale), want)  # all columns


def test_later_keys_change_no_bit_of_a_token(path: str) -> None:
    """What a token must not see is weighed with exactly 0: with any other values there, its result is the same."""
    lens, q_len = [700, 66, 64, 5], 3
    q, pages, table, kv_lens = decode_inputs(lens, 16, 576, 20, BF16, q_len)
    before = mla_decode(q, pages, table, kv_lens, 0.1, v_dim=512)
    for i, n in enumerate(lens):
        for position in (n - 1, n - 2):
            pages[table[i, position // 64], position % 64] = 9.0
    after = mla_decode(q, pages, table, kv_lens, 0.1, v_dim=512)
    assert torch.equal(after[::q_len], before[::q_len]) and not torch.equal(after, before)


@pytest.mark.parametrize("batch", [1, 2, 31, 132, 133, 500])
def test_a_batch_is_cut_into_splits_that_cover_each_page_once(batch: int) -> None:
    """About as many as there are SMs. Those of a sequence follow one another, and differ by one page at most."""
    from kernels.decode_few_heads import plan_splits
    from kernels.gemm import num_sms

    sms = num_sms(torch.device(DEVICE))
    for longest in (0, 1, 64, 1088, 50000):
        lens = [random.randrange(longest + 1) for _ in range(batch)]
        table, starts = plan_splits(torch.tensor(lens, device=DEVICE).int())
        starts = starts.tolist()
        assert starts[0] == 0 and len(table) >= starts[-1] <= max(batch, sms) + batch
        for seq, length in enumerate(lens):
            mine, pages = table[starts[seq] : starts[seq + 1]].tolist(), -(-length // 64)
            assert len(mine) >= 1 and all(row[0] == seq and row[3] == len(mine) for row in mine)
            begins, sizes = [row[1] for row in mine], [row[2] for row in mine]
            assert begins == [sum(sizes[:i]) for i in range(len(mine))] and sum(sizes) == pages
            assert max(sizes) - min(sizes) <= 1 and (min(sizes) > 0 or pages == 0)
            assert len(mine) <= max(1, sms * pages // max(1, sum(-(-n // 64) for n in lens)))


def test_decode_empty() -> None:
    q, pages, table, kv_lens = decode_inputs([], 128, 576, 4, BF16)
    assert mla_decode(q, pages, table, kv_lens, 1.0, v_dim=512).shape == (0, 128, 512)


@pytest.mark.parametrize(
    ("batch", "q_len", "heads"),
    [(2, 1, 128), (140, 1, 128), (2, 3, 128), (70, 2, 128), (2, 1, 16), (140, 1, 16), (9, 2, 8)],
)
def test_decode_in_graph(batch: int, q_len: int, heads: int, path: str) -> None:
    """One capture serves any lengths, pages and queries of its shape."""
    lens = [[random.choice((0, random.randrange(q_len, n))) for _ in range(batch)] for n in (700, 1200, q_len + 1)]
    inputs = [decode_inputs(n, heads, 576, 20, BF16, q_len) for n in lens]
    most = max(len(pages) for _, pages, _, _ in inputs)
    static = [t.clone() for t in inputs[0]]
    static[1] = torch.full((most, 64, 576), NAN, device=DEVICE, dtype=BF16)
    mla_decode(*static[:3], torch.zeros_like(static[3]), 0.1, v_dim=512)  # compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mla_decode(*static, 0.1, v_dim=512)
    for q, pages, table, kv_lens in inputs:
        for to, new in zip(static, (q, pages, table, kv_lens), strict=True):
            to[: len(new)].copy_(new)
        out.fill_(NAN)
        graph.replay()
        agree(out, ref.mla_decode(q.float(), pages.float(), table, kv_lens, 0.1)[..., :512])


PREFILL = [
    ([(1, 1)], 2, 128, 64, 128),
    ([(300, 300), (0, 0), (1, 700), (129, 129), (128, 256), (77, 500), (0, 40), (64, 1000)], 4, 128, 64, 128),
    ([(n, n + random.randrange(300)) for n in (random.randrange(400) for _ in range(40))], 2, 128, 64, 128),
    ([(1024, 1024)], 3, 128, 64, 128),
    ([(5, 5), (40, 70), (200, 333)], 4, 32, 16, 32),
    ([(150, 200), (3, 3)], 2, 48, 16, 64),
    ([(150, 200), (3, 3)], 2, 80, 32, 80),
    ([(300, 300), (0, 0), (1, 700), (129, 129), (64, 1000)], 20, 192, 64, 256),  # GLM-4.7-Flash
    ([(300, 300), (1, 700), (77, 500)], 16, 128, 64, 128),  # DeepSeek-V2-Lite
]


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("lens", "heads", "nope", "rope", "dv"), PREFILL)
def test_prefill(
    lens: list[tuple[int, int]], heads: int, nope: int, rope: int, dv: int, dtype: torch.dtype, path: str
) -> None:
    """Keys and values are parts of wider tensors, and the rows after the last sequence are NaN."""
    starts = torch.tensor([(0, 0), *lens], device=DEVICE).cumsum(0).int()
    q_starts, kv_starts = starts[:, 0].contiguous(), starts[:, 1].contiguous()
    num_q, num_kv = starts[-1].tolist()
    q = randn(num_q, heads, nope + rope, dtype=dtype)
    k, v = randn(num_kv + 200, heads, nope + dv, dtype=dtype).split((nope, dv), -1)
    k_rope = randn(num_kv + 200, 64 + rope, dtype=dtype)[:, 64:]
    for part in (k, k_rope, v):
        part[num_kv:] = NAN
    args = (q_starts, kv_starts, max(n for n, _ in lens), max(n for _, n in lens), (nope + rope) ** -0.5)
    out = prefill_attention(q, k, k_rope, v, *args)
    agree(out, ref.prefill_attention(q.float(), k.float(), k_rope.float(), v.float(), *args))
    quantized(*prefill_attention(q, k, k_rope, v, *args, quantize=True), ref.quantize_1x128(out.flatten(1)))
    if path == "best":  # one sequence's NaN stays in it
        for part in (k, k_rope, v):
            part[: lens[0][1]] = NAN
        kept = prefill_attention(q, k, k_rope, v, *args)[lens[0][0] :]
        assert torch.equal(kept, out[lens[0][0] :])


def test_prefill_empty() -> None:
    starts = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    q, v, k_rope = randn(0, 4, 192), randn(0, 4, 128), randn(0, 64)
    assert prefill_attention(q, v, k_rope, v, starts, starts, 0, 0, 1.0).shape == (0, 4, 128)


@pytest.mark.parametrize("q_len", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("heads", [16, 20, 128])
def test_flash_mla_keeps_the_contract_for_several_tokens(heads: int, q_len: int) -> None:
    """Padding among them, whose results need only be finite."""
    pytest.importorskip("flash_mla")
    from kernels.flash_mla_ops import decode_plan
    from kernels.flash_mla_ops import mla_decode as vendor

    lens = [5, 64, 65, 66, 0, 300, 4096]
    width = max(lens) // 64
    pages = randn(len(lens) * width + 1, 64, 576)
    table = torch.randperm(len(lens) * width, device=DEVICE).add(1).int().view(len(lens), width)
    kv_lens, q = torch.tensor(lens, device=DEVICE).int(), randn(len(lens) * q_len, heads, 576)
    plan, want = decode_plan(kv_lens, q_len, heads), ref.mla_decode(q.float(), pages.float(), table, kv_lens, 0.1, 512)
    for _ in range(2):  # a plan serves several calls
        out = vendor(q, pages, table, kv_lens, 0.1, 512, plan)
        assert out.isfinite().all()
        real = (kv_lens > 0).repeat_interleave(q_len)
        agree(out[real], want[real])


@pytest.mark.parametrize("lens", [[(1, 1), (64, 64), (65, 300), (200, 200)], [(1, 500)], [(333, 333)]])
@pytest.mark.parametrize(("library", "heads"), [("flash_attn", 16), ("flash_mla", 16), ("flash_mla", 20)])
def test_vendors_keep_the_contract(library: str, heads: int, lens: list[tuple[int, int]]) -> None:
    """The adapters, against the twins."""
    scale = 192**-0.5
    if library == "flash_attn":
        pytest.importorskip("flash_attn.cute")
        from kernels.flash_attn_ops import prefill_attention as vendor

        starts = torch.tensor([(0, 0), *lens], device=DEVICE).cumsum(0).int()
        q_starts, kv_starts = starts[:, 0].contiguous(), starts[:, 1].contiguous()
        (num_q, num_kv), (max_q, max_kv) = starts[-1].tolist(), (max(column) for column in zip(*lens, strict=True))
        q, k_rope = randn(num_q, heads, 192), randn(num_kv, 576)[:, 512:]
        k, v = randn(num_kv, heads, 256).split((128, 128), -1)
        args = (q_starts, kv_starts, max_q, max_kv, scale)
        agree(
            vendor(q, k, k_rope, v, *args),
            ref.prefill_attention(q.float(), k.float(), k_rope.float(), v.float(), *args),
        )
        return
    pytest.importorskip("flash_mla")
    from kernels.flash_mla_ops import decode_plan
    from kernels.flash_mla_ops import mla_decode as vendor

    kv_lens = torch.tensor([kv for _, kv in lens], device=DEVICE).int()
    width = -(-int(kv_lens.max()) // 64)
    pages = randn(len(lens) * width + 1, 64, 576)
    table = torch.randperm(len(lens) * width, device=DEVICE).add(1).int().view(len(lens), width)
    plan, q = decode_plan(kv_lens, 1, heads), randn(len(lens), heads, 576)
    want = ref.mla_decode(q.float(), pages.float(), table, kv_lens, scale, 512)
    for _ in range(2):  # a plan serves several calls
        agree(vendor(q, pages, table, kv_lens, scale, 512, plan), want)
