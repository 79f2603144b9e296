"""Engine: one rank's model, KV pool and scheduler. It runs a plan and gives back tokens; it knows no router and no
link, and is the same for every role."""

import hashlib
from dataclasses import dataclass, replace

import torch

from disagg.scheduler import Plan, Scheduler, Sequence
from kernels.backend import Ops
from model.batch import PAGE, Batch
from model.config import ModelConfig
from model.kv_cache import PageAllocator, make_pool, pages_for
from model.sampling import SamplingRows, sample, top_logprobs
from model.transformer import Transformer
from model.weights import load_weights
from parallel.deepep import make_dispatchers
from parallel.mesh import Mesh
from parallel.placement import Placement

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EngineConfig:
    """Sizes, per attention replica."""

    max_batch: int = 64
    max_tokens_per_step: int = 1024
    kv_tokens: int = 65536
    max_model_len: int | None = None  # None: the model's own
    dtype: str = "auto"
    dispatch: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_tokens_per_step", "kv_tokens", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")

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
class Sampled:
    """A sequence's new token, not yet appended to it."""

    sequence: Sequence
    token: int
    logprobs: list[tuple[int, float]]  # empty unless asked for


class Engine:
    def __init__(self, settings: EngineConfig, config: ModelConfig, folder: str, mesh: Mesh, ops: Ops):
        """Loads this rank's weights. ValueError for whatever does not fit together."""
        self.config, self.settings, self.mesh = config, settings, mesh
        self.max_model_len = settings.model_len(config)
        dtype = settings.torch_dtype(mesh.device)
        # The largest step every rank may take part in, spread over its attention group.
        capacity = -(-settings.max_batch // mesh.attn.size)
        self.scheduler = Scheduler(
            PageAllocator(pages_for(settings.kv_tokens) + 1),
            settings.max_batch,
            settings.max_tokens_per_step,
            self.max_model_len,
        )
        placement = Placement.identity(config.num_moe_layers, config.n_routed_experts, mesh.ep.size, mesh.device)
        self.dispatchers = make_dispatchers(
            settings.dispatch, mesh, ops, dtype, num_slots=placement.num_slots, hidden=config.hidden_size,
            top_k=config.num_experts_per_tok, capacity=capacity, max_batch=settings.max_batch,
        )  # fmt: skip
        self.contiguous, self.masked = self.dispatchers.contiguous, self.dispatchers.masked
        self.model = Transformer(config, mesh, placement, ops, dtype, self.max_model_len)
        load_weights(self.model, folder, config, mesh)
        self.pool = make_pool(config, self.scheduler.allocator.capacity + 1, dtype, mesh.device)

    def run(self, plan: Plan, masked: bool) -> list[Sampled]:
        """One forward over this rank's part of an agreed step (it may be empty: every rank steps every time).

        `masked`: no rank has prompt tokens in this step, so all use the fixed-capacity layout.
        """
        batch = Batch.build(*plan.chunks(), self.mesh.device, multiple=self.mesh.attn.size)
        logits = self.model(batch, self.pool, self.masked if masked else self.contiguous)
        return self._sample(logits, plan.advance())

    def _sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> list[Sampled]:
        if not sequences:
            return []
        rows = [
            (s.request.temperature, s.request.top_p, s.request.top_k, s.request.seed, len(s.tokens)) for s in sequences
        ]
        tokens = sample(logits, SamplingRows.build(rows, logits.device))
        count = max(s.request.logprobs for s in sequences)
        logprobs = top_logprobs(logits, tokens, count) if count else [[]] * len(sequences)
        return [
            Sampled(s, token, _first(pairs, s.request.logprobs, token))
            for s, token, pairs in zip(sequences, tokens.tolist(), logprobs, strict=True)
        ]

    def written(self) -> torch.cuda.Event | None:
        """An event after which the KV of every step so far is in the pool; None on a CPU, where it already is."""
        return torch.cuda.current_stream().record_event() if self.mesh.device.type == "cuda" else None

    @property
    def kv_layout(self) -> str:
        """What two sides must have in common to hand KV over: the pool's rows, and the model that wrote them."""
        model = hashlib.sha256(repr(replace(self.config, dtype="", fp8=False)).encode()).hexdigest()[:8]
        layers, _, page, width = self.pool.shape
        dtype = str(self.pool.dtype).removeprefix("torch.")
        return f"{layers} layers x {page} x {width} {dtype}, model {model}"

    @property
    def kv_tokens(self) -> int:
        return self.scheduler.allocator.capacity * PAGE


def _first(pairs: list[tuple[int, float]], count: int, token: int) -> list[tuple[int, float]]:
    """The `count` likeliest of a row that was computed for the greediest request, and always the chosen token."""
    if not count:
        return []
    return [pair for i, pair in enumerate(pairs) if i < count or pair[0] == token]
