"""Engine: one rank's model, KV pool and scheduler. It launches steps and hands back their tokens; it knows no router
and no link, and is the same for every role."""

import gc
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from disagg.experts import Recording, make_placement
from disagg.handoff.credits import buffer_bytes
from disagg.memory import Budget, Job, claim_memory, lift_limit, page_bytes, pages_on_host, plan_parts
from disagg.rebalance import BUSY, Rebalancer
from disagg.scheduler import Plan, Scheduler, Sequence
from disagg.steps import DecodeStep, make_buckets, resolve
from kernels.backend import Ops
from model.batch import NO_DECODES, PAGE, Batch, Chunk, Decodes, pad, split, to_host
from model.checkpoint import check_checkpoint
from model.config import ModelConfig
from model.kv_cache import PageAllocator, make_pool, pages_for
from model.precision import decide
from model.sampling import COLDEST, SamplingRows, logprob_pairs, sample, top_logprobs
from model.transformer import Transformer
from model.weights import ExpertReader, load_weights
from parallel.dispatch import most_copies
from parallel.dispatchers import make_dispatchers
from parallel.mesh import Mesh
from parallel.overlap import Rule
from parallel.recorder import Recorder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EngineConfig:
    """What the command line says of an engine; sizes are of an attention replica. ValueError names the flag."""

    max_batch: int = 64
    max_tokens_per_step: int = 1024
    kv_tokens: int | None = None  # None: on a GPU what is left of its memory, on a CPU 65,536
    max_model_len: int | None = None  # None: the model's own
    dtype: str = "auto"
    dispatch: str = "auto"
    decodes: bool = True  # a prefill job does not
    hands_over: bool = False  # KV, to another job or from one
    graphs: bool = True  # decode in CUDA graphs where there is CUDA
    overlap: str = "auto"
    redundant_experts: int = 0  # slots of the job beyond one for each expert
    expert_map: str | None = None  # a recording to balance for
    record_experts: str | None = None  # where to write one
    rebalance_interval: int = 0  # steps between looks at the balance; 0: the experts stay where they are
    rebalance_threshold: float = 1.0  # balancedness above which nothing moves
    rebalance_layers_per_step: int = 1
    gpu_memory_fraction: float = 0.9  # of a GPU, for all ranks of this job on it

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_tokens_per_step", "max_model_len", "rebalance_layers_per_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.kv_tokens is not None and self.kv_tokens < PAGE:
            raise ValueError(f"--kv-tokens is {self.kv_tokens}; it must be at least a page of {PAGE}")
        for name in ("redundant_experts", "rebalance_interval"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 0")
        if self.record_experts is not None:
            path = Path(self.record_experts).absolute()
            if path.is_dir():
                raise ValueError(f"--record-experts {self.record_experts!r}: it is a folder")
            if not path.parent.is_dir():
                raise ValueError(f"--record-experts {self.record_experts}: no such folder")
            if not os.access(path.parent, os.W_OK):
                raise ValueError(f"--record-experts {self.record_experts}: its folder cannot be written to")
        for name in ("rebalance_threshold", "gpu_memory_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be in (0, 1]")

    def model_len(self, model: ModelConfig) -> int:
        limit = self.max_model_len or model.max_position_embeddings
        if limit > model.max_position_embeddings:
            raise ValueError(
                f"--max-model-len ({limit}) is over the model's max_position_embeddings "
                f"({model.max_position_embeddings})"
            )
        return limit

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        if self.dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Work:
    """A step that is laid out."""

    plan: Plan
    decodes: Decodes
    prompts: list[Chunk]
    decode_rows: int | None  # None: some rank has prompt tokens
    overlapped: bool
    sequences: list[Sequence]  # those that get a token, the decodes first
    rows: np.ndarray  # of their tokens

    @property
    def mixed(self) -> bool:
        return self.decode_rows is None

    def next_decodes(self, sequences: list[Sequence]) -> Decodes:
        """What those that decode in the step after this one bring to it: the token that it samples for each, seen yet
        or not, unless a sequence was handed over and has its first one with it."""
        if sequences == self.plan.decodes:  # all of them are one token further
            return Decodes(-1 - self.rows[: len(sequences)], self.decodes.positions + 1, self.decodes.pages)
        rows = dict(zip(self.sequences, self.rows.tolist(), strict=True))
        ids = [-1 - rows[s] if s in rows else s.tokens[-1] for s in sequences]
        positions = np.array([s.computed for s in sequences], np.int64)
        return Decodes(np.array(ids, np.int64), positions, [s.pages for s in sequences])


NO_WORK = Work(Plan([], []), NO_DECODES, [], None, False, [], np.arange(0))


@dataclass(frozen=True)
class Step:
    """A step that was launched: its tokens are on their way to the host, its KV to the pool."""

    work: Work
    tokens: Tensor  # [most rows] on the host, from `done` to the second step after this: a sequence's is in its row
    logprobs: tuple[Tensor, Tensor] | None  # [sequences, ...] on the host, once `done`
    done: torch.cuda.Event | None  # None on a CPU, where it already is

    def sampled(self) -> list[int]:
        """The new token of each of work.sequences; waits for them."""
        if self.done is not None:
            self.done.synchronize()
        return self.tokens.numpy()[self.work.rows].tolist()

    def pairs(self) -> list[list[tuple[int, float]]]:
        """Of each, (token, log probability): empty unless asked for. After `sampled`."""
        sequences = self.work.sequences
        if self.logprobs is None:
            return [[]] * len(sequences)
        rows = zip(sequences, *(part.tolist() for part in self.logprobs), strict=True)
        return [logprob_pairs(*row, n) if (n := s.request.logprobs) else [] for s, *row in rows]


class Engine:
    def __init__(
        self,
        settings: EngineConfig,
        model: Transformer,
        mesh: Mesh,
        say: Callable[[str], None] = lambda text: None,
        reader: ExpertReader | None = None,
    ):
        """`model` has its weights; `say` hears how the memory is used, before the KV pool is made; `reader` has the
        experts, if they are to move. ValueError for whatever does not fit together. All ranks of the job together."""
        self.config, self.settings, self.mesh, self.model, self.ops = model.config, settings, mesh, model, model.ops
        self.max_model_len = settings.model_len(self.config)
        self.rule = Rule(settings.overlap, mesh.ep.size, mesh.attn.size, self.config.expert_share)
        buckets = make_buckets(settings.max_batch, self.rule.row_multiple)
        mine = -(-settings.max_tokens_per_step // mesh.attn.size)  # tokens that I dispatch in the largest step
        self.dispatchers = make_dispatchers(
            settings.dispatch, mesh, model.ops, model.dtype, num_slots=model.placement.num_slots,
            hidden=self.config.hidden_size, top_k=self.config.num_experts_per_tok,
            capacity=buckets[-1] // mesh.attn.size, fp8=model.fp8,
            most_copies=most_copies(mine, self.config.num_experts_per_tok),
        )  # fmt: skip
        self.graphs, self.why_graphs = self._decide_graphs()
        self.budget = self._claim_memory(buckets) if mesh.device.type == "cuda" else None
        if self.budget is not None:
            pages = self.budget.pages(settings.kv_tokens)
            memory = self.budget.table(pages)
        else:
            pages = pages_on_host(mesh, settings.kv_tokens, page_bytes(self.config, model.dtype.itemsize))
            memory = f"{'KV':>10}: {pages:,} pages, {pages * PAGE:,} tokens"
        self.scheduler = Scheduler(
            PageAllocator(pages + 1), settings.max_batch, settings.max_tokens_per_step, self.max_model_len
        )
        say(memory)
        if self.kv_tokens < self.max_model_len:
            say(f"warning: the longest request is {self.kv_tokens} tokens, all that the KV pool holds, "
                f"under max_model_len ({self.max_model_len})")  # fmt: skip
        self.pool = make_pool(self.config, pages + 1, model.dtype, mesh.device)
        self.tokens = torch.zeros(buckets[-1], dtype=torch.int64, device=mesh.device)  # that the latest step sampled
        # Two, in turn: a step's tokens are read when the next one may have been launched, but not the one after.
        self._seen = [torch.zeros(buckets[-1], dtype=torch.int64, pin_memory=self.tokens.is_cuda) for _ in range(2)]
        self._latest = NO_WORK
        max_pages = pages_for(self.max_model_len)
        self.decode = DecodeStep(self._forward_masked, self.tokens, buckets, max_pages, self.rule.in_decode)
        if settings.record_experts or reader is not None:
            model.recorder = Recorder(model.placement, self.config.n_routed_experts)
        self.recording = Recording(model.recorder, mesh, settings.record_experts) if settings.record_experts else None
        self.rebalancer = None
        if reader is not None:
            how = settings.rebalance_interval, settings.rebalance_threshold, settings.rebalance_layers_per_step
            self.rebalancer = Rebalancer(model, mesh, reader, *how)

    @classmethod
    def from_pretrained(
        cls,
        settings: EngineConfig,
        config: ModelConfig,
        folder: str | Path,
        mesh: Mesh,
        ops: Ops,
        say: Callable[[str], None] = lambda text: None,
    ) -> "Engine":
        """With this rank's share of the weights in `folder`."""
        moves, most = settings.rebalance_interval > 0, config.num_moe_layers
        if moves and settings.rebalance_layers_per_step > most:
            raise ValueError(
                f"--rebalance-layers-per-step is {settings.rebalance_layers_per_step}; it must be at most the model's "
                f"layers with experts ({most})"
            )
        check_checkpoint(folder, config)  # before anything takes the memory that config.json alone asks for
        placement = make_placement(config, mesh, settings.redundant_experts, settings.expert_map)
        dtype = settings.torch_dtype(mesh.device)
        fp8 = decide(config, mesh.attn.size, dtype, mesh.device).fp8
        model = Transformer(config, mesh, placement, ops, dtype, settings.model_len(config), fp8)
        load_weights(model, folder, config, mesh)
        return cls(settings, model, mesh, say, ExpertReader(folder, config) if moves else None)

    def _decide_graphs(self) -> tuple[bool, str]:
        """Whether the decode step is captured, and a line for the log (empty: there is nothing to say)."""
        if self.mesh.device.type != "cuda" or not self.settings.decodes:
            return False, ""
        if not self.settings.graphs:
            return False, "no CUDA graphs: --no-graphs"
        if not self.ops.capturable:
            return False, "no CUDA graphs: torch serves ops that wait for the host"
        return True, "in CUDA graphs"

    def _claim_memory(self, buckets: list[int]) -> Budget:
        """Each rank's share, told by the rank that has the least left for KV: all ranks agree on it."""
        settings, model, mesh, dispatchers = self.settings, self.model, self.mesh, self.dispatchers
        capacity = dispatchers.buffer.capacity if dispatchers.buffer is not None else None
        assert capacity is None or capacity >= buckets[-1] // mesh.attn.size, f"{capacity=} {buckets=}"
        job = Job(
            self.config, model.dtype.itemsize, model.fp8, mesh.attn.size, mesh.ep.size,
            model.placement.slots_per_rank, model.ops.alignment, capacity, model.ops.whole_keys,
        )  # fmt: skip
        longest = min(self.max_model_len, settings.kv_tokens or self.max_model_len)
        page = page_bytes(self.config, model.dtype.itemsize)
        parts = plan_parts(
            model, job, dispatchers.num_bytes, buckets, settings.max_tokens_per_step, self.max_model_len, longest,
            self.graphs,
            settings.rebalance_layers_per_step if settings.rebalance_interval else 0,
            buffer_bytes(page) if settings.hands_over else 0,
        )  # fmt: skip
        mine = claim_memory(mesh, parts, page, dispatchers.num_bytes, settings.gpu_memory_fraction)
        return min(mesh.ep.exchange(mine), key=lambda budget: budget.left)

    def _forward_masked(self, batch: Batch, halves: tuple[Batch, Batch] | None) -> Tensor:
        return self.model(batch, self.pool, self.dispatchers.masked, halves)

    def warm_up(self, progress: Callable[[Iterable[int]], Iterable[int]]) -> None:
        """Let every kernel compile before the first request, and capture the decode step. All ranks together.

        `progress` wraps each list of sizes that is worked through.
        """
        if self.mesh.device.type != "cuda":
            return
        limit = min(self.max_model_len, self.kv_tokens)
        most = min(self.settings.max_tokens_per_step, self.settings.max_batch * limit)
        sizes = {2**i for i in range(most.bit_length())} | {most, max(1, most - 1)}  # an odd one is another kernel
        vocab = self.config.vocab_size
        for size in progress(sorted(sizes, reverse=True)):
            prompts = [
                Chunk([i * 7919 % vocab for i in range(min(limit, size - at))], 0, range(1, pages_for(limit) + 1))
                for at in range(0, size, limit)
            ]
            self._mixed([], prompts)
            if self.rule.in_prefill(size):
                self._mixed([], prompts, overlap=True)
        page = torch.zeros(1, dtype=torch.int64, device=self.pool.device)
        self.ops.unpack_pages(self.ops.pack_pages(self.pool, page), self.pool, page)
        if self.graphs:
            self.decode.capture(progress)
        elif self.settings.decodes:
            for rows in progress(self.decode.buckets[::-1]):
                self.decode.run(NO_DECODES, rows)
        torch.cuda.synchronize()
        if self.model.recorder is not None:
            self.model.recorder.forget()
        gc.collect()
        gc.freeze()  # what lives now lives on: a later collection need not look at it

    def prepare(self, plan: Plan, decode_rows: int | None, most_tokens: int) -> Work:
        """Lay out this rank's part of an agreed step (it may be empty: every rank steps every time). From here on it
        counts as launched; the tokens of the step before may still be in flight.

        `decode_rows`: the bucket, if no rank has prompt tokens in this step; then all use the fixed-capacity layout.
        `most_tokens`: of the fullest replica.
        """
        decodes, prompts = self._latest.next_decodes(plan.decodes), plan.prompt_chunks()
        sequences, mixed = plan.advance(), decode_rows is None
        rows = np.arange(len(sequences)) if mixed else self.decode.places(len(sequences), decode_rows)
        overlapped = self.rule.in_prefill(most_tokens) if mixed else self.rule.in_decode(decode_rows)
        self._latest = Work(plan, decodes, prompts, decode_rows, overlapped, sequences, rows)
        return self._latest

    def run(self, work: Work) -> Step:
        """Start a step. With prompts in it this takes the host as long as the GPU, or nearly: it must learn how many
        rows the experts get. A decode step only starts, where there are graphs."""
        if work.mixed:
            logits = self._mixed(work.decodes.chunks(), work.prompts, work.overlapped)
        else:
            self.dispatchers.prepare_masked()
            logits = self.decode.run(work.decodes, work.decode_rows)
        logprobs = None if work.plan.is_plain else self._sample(logits, work.sequences, work.rows)
        tokens = self._seen[0].copy_(self.tokens, non_blocking=True)
        self._seen.reverse()
        done = torch.cuda.current_stream().record_event() if self.tokens.is_cuda else None
        for observer in (self.recording, self.rebalancer):
            if observer is not None:
                observer.step()
        return Step(work, tokens, logprobs, done)

    def vote(self) -> int:
        """What this rank has to say to `rebalance`, for the step's agreement."""
        return self.rebalancer.vote() if self.rebalancer is not None else BUSY

    def rebalance(self, votes: tuple[int, ...]) -> None:
        """Before the step of this turn: experts may move now, on all ranks that gave these votes."""
        if self.rebalancer is not None:
            self.rebalancer.act(votes)

    def stats(self) -> dict[str, float]:
        """All ranks of the job together."""
        if self.rebalancer is not None:
            return dict(self.rebalancer.stats)
        return self.recording.stats() if self.recording is not None else {}

    def runs_ahead(self, work: Work) -> bool:
        """Does `run` return long before the step is done?"""
        return self.tokens.is_cuda and not work.mixed

    def _sample(self, logits: Tensor, sequences: list[Sequence], rows: np.ndarray) -> tuple[Tensor, Tensor] | None:
        """What greedy choice alone does not give: other tokens, into `tokens`, and log probabilities."""
        most = max((s.request.logprobs for s in sequences), default=0)
        warm = any(s.request.temperature > COLDEST for s in sequences)
        index = torch.from_numpy(rows).to(logits.device)
        logits, tokens = logits[index], self.tokens[index]
        if warm:
            how = [
                (s.request.temperature, s.request.top_p, s.request.top_k, s.request.seed, s.computed) for s in sequences
            ]
            # One rank's choice is all ranks': a sum over many probabilities need not give them the same bits.
            tokens = self.mesh.attn.broadcast(sample(logits, SamplingRows.build(how, logits.device)))
            self.tokens[index] = tokens
        return tuple(to_host(part) for part in top_logprobs(logits, tokens, most)) if most else None

    @torch.inference_mode()
    def _mixed(self, decodes: list[Chunk], prefills: list[Chunk], overlap: bool = False) -> Tensor:
        """A step with prompt tokens: logits of the rows that want them, their greedy choices in `tokens`."""
        multiple, device = self.mesh.attn.size, self.mesh.device
        decodes = pad(decodes, prefills, multiple)
        halves = tuple(Batch.build(*part, device) for part in split(decodes, prefills, multiple)) if overlap else None
        batch = Batch.build(decodes, prefills, device)
        batch = replace(batch, token_ids=resolve(batch.token_ids, self.tokens))
        logits = self.model(batch, self.pool, self.dispatchers.contiguous, halves)
        self.tokens[: logits.shape[0]] = logits.argmax(-1)
        return logits

    def close(self) -> None:
        """All ranks together, before their process groups end."""
        gc.unfreeze()  # warm_up's, or this engine would never be collected
        if self.rebalancer is not None:
            self.rebalancer.close()
        if self.recording is not None:
            self.recording.save()
        self.decode.reset()
        self.dispatchers.close()
        lift_limit(self.mesh.device)

    def kv_layout(self) -> dict[str, str]:
        """What two sides must have in common to hand KV over: the pool's rows, and the model that wrote them, told by
        its configuration and its norms, which every rank has as they are in the checkpoint."""
        told = hashlib.sha256(repr(replace(self.config, fp8=False, eos_token_ids=())).encode())
        for name, weight in self.model.named_parameters():
            if "norm" in name:
                norm = weight.detach().cpu().bfloat16()  # the same whatever --dtype is
                told.update(norm.view(torch.uint8).numpy().tobytes())
        layers, _, page, width = self.pool.shape
        dtype = str(self.pool.dtype).removeprefix("torch.")
        shape = {"layers": layers, "page": page, "width": width, "dtype": dtype, "model": told.hexdigest()[:8]}
        return {name: str(value) for name, value in shape.items()}

    @property
    def kv_tokens(self) -> int:
        return self.scheduler.allocator.capacity * PAGE
