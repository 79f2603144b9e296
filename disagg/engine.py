"""Engine: one rank's model, KV pool and scheduler.

It launches steps and returns their tokens. It knows nothing of routers and links, and is the same for every role.
"""

import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from disagg.buckets import make_buckets
from disagg.captures import Captures
from disagg.config import EngineConfig
from disagg.experts import Recording, make_draft_placement, make_placement
from disagg.fixed_inputs import FixedInputs
from disagg.graphs import Graphs
from disagg.memory import budget_of_all, check_weights, lift_limit, most_context, pages_on_host, step_shape
from disagg.page_cache import PageCache
from disagg.prompt_graphs import PromptGraphs
from disagg.rebalance import BUSY, Rebalancer
from disagg.sampler import Sampler
from disagg.scheduler import Plan, Scheduler, Sequence
from disagg.speculation import Speculation
from disagg.step import NO_WORK, Drafts, Step, Work
from disagg.steps import DecodeStep, PromptStep, places
from kernels.compile_ahead import CompileAhead
from kernels.ops import Ops
from model.batch import Batch, to_host
from model.checkpoint import open_checkpoint
from model.config import ModelConfig
from model.footprint import StepShape, page_bytes
from model.kv_cache import make_pool
from model.pages import PAGE, pages_for
from model.precision import decide, dtype_on
from model.prompt_logprobs import PromptLogprobs
from model.transformer import Transformer
from model.weights import DummyWeights, ExpertReader, load_weights
from parallel.chosen_experts import ID_BYTES, MOST_EXPERTS, ChosenExperts
from parallel.copies import most_copies
from parallel.dispatchers import Dispatcher, Dispatchers, make_dispatchers
from parallel.mesh import Mesh
from parallel.overlap_rule import Rule


class Engine:
    def __init__(
        self,
        settings: EngineConfig,
        model: Transformer,
        mesh: Mesh,
        say: Callable[[str], None] = lambda text: None,
        reader: ExpertReader | None = None,
        handoff_bytes: int = 0,
        loaded: str = "",
        make: Callable[..., Dispatchers] = make_dispatchers,
    ) -> None:
        """Collective. `model` has its weights. `say` is called with the memory table, before the KV pool is made.

        `reader` reads experts from the checkpoint; None: they never move. `handoff_bytes`: GPU memory that the KV
        handoff takes. `loaded`: how many weights, and how fast, for the log. `make`: called like `make_dispatchers`.
        Raises ValueError if the settings do not fit the model or the memory.
        """
        self.config, self.settings, self.mesh, self.model, self.ops = model.config, settings, mesh, model, model.ops
        self.loaded = loaded
        self.compiling: CompileAhead | None = None  # what compiles kernels, from the warm-up on
        self.max_model_len = settings.model_len(self.config)
        self.rule = Rule(settings.overlap, mesh.ep.size, mesh.attn.size, self.config.expert_share)
        buckets = make_buckets(settings.max_batch, partial(self.rule.row_multiple, each=1 + settings.speculate))
        max_tokens = -(-settings.max_tokens_per_step // mesh.attn.size)  # that this rank dispatches in the largest step
        self.dispatchers = make(
            settings.dispatch,
            mesh,
            model.ops,
            model.dtype,
            num_slots=model.placement.num_slots,
            hidden=self.config.hidden_size,
            top_k=self.config.num_experts_per_tok,
            capacity=buckets[-1] * (1 + settings.speculate) // mesh.attn.size,
            drafts=settings.speculate,
            fp8=model.fp8,
            most_copies=most_copies(max_tokens, self.config.num_experts_per_tok),
            decodes=settings.decodes,
        )
        self.captures = Captures.of(settings, self.config, mesh, model.ops)
        self.budget = None
        if mesh.device.type == "cuda":
            self.budget = budget_of_all(settings, model, mesh, self.dispatchers, buckets, self.captures, handoff_bytes)
        if self.budget is not None:
            pages = self.budget.pages(settings.kv_tokens)
            memory = self.budget.table(pages)
        else:
            pages = pages_on_host(mesh, settings.kv_tokens, page_bytes(self.config, model.dtype.itemsize))
            memory = f"{'KV':>10}: {pages:,} pages, {pages * PAGE:,} tokens"
        self.scheduler = Scheduler(
            PageCache(pages + 1, keeps=settings.prefix_cache != "off"),
            settings.max_batch,
            settings.max_tokens_per_step,
            self.max_model_len,
            settings.speculate,
            most_context(settings, step_shape(model, mesh, self.dispatchers), buckets[-1]),
        )
        say(memory)
        if self.kv_tokens < self.max_model_len:
            say(
                f"warning: the longest request is {self.kv_tokens} tokens, all that the KV pool holds, "
                f"under max_model_len ({self.max_model_len})"
            )
        self.pool = make_pool(self.config, pages + 1, model.dtype, mesh.device)
        # [rows]: the tokens that the latest step sampled
        self.tokens = torch.zeros(buckets[-1], dtype=torch.int64, device=mesh.device)
        # [rows, V] float32: the logits of the latest part of a step; `graphs.py` says until when
        self.logits = torch.empty(settings.rows(buckets[-1]), self.config.vocab_size, device=mesh.device)
        # Two host copies, used in turn: a step's tokens are read when the next step may have been launched, but not the
        # one after.
        self._seen = [torch.zeros(buckets[-1], dtype=torch.int64, pin_memory=self.tokens.is_cuda) for _ in range(2)]
        self._latest, self._made = NO_WORK, settings.speculate
        width = pages_for(settings.positions(self.config))
        inputs = FixedInputs(2 + settings.speculate, buckets[-1], width, mesh.device)
        masked, contiguous = (partial(self._forward, d) for d in (self.dispatchers.masked, self.dispatchers.contiguous))
        self.graphs, self.graph_replays = Graphs(), 0  # steps that replayed some
        layers = self.dispatchers.contiguous, self.graphs, self.captures.prompts
        self.prompt_graphs = PromptGraphs(model, self.pool, *layers)
        self.decode = DecodeStep(masked, self.tokens, buckets, inputs, self.graphs, self.rule.in_decode)
        self.prompt = PromptStep(contiguous, self.tokens, mesh.attn.size)
        self.sampler = Sampler(self.tokens, mesh.attn)
        self.speculation: Speculation | None = None
        if settings.speculate:
            shared = inputs, self.logits, self.graphs, self.prompt_graphs.body
            self.speculation = Speculation(model, self.pool, self.dispatchers, mesh.attn, *shared)
        self.recording: Recording | None = None
        self.rebalancer: Rebalancer | None = None
        if settings.record_experts or reader is not None:
            model.count_loads()
            if settings.record_experts:
                self.recording = Recording(model.load_counters, mesh, settings.record_experts)
        if reader is not None:
            how = settings.rebalance
            self.rebalancer = Rebalancer(model, mesh, reader, how.interval, how.threshold, how.layers_per_step)

    @classmethod
    def from_pretrained(
        cls,
        settings: EngineConfig,
        config: ModelConfig,
        folder: str | Path,
        mesh: Mesh,
        ops: Ops,
        say: Callable[[str], None] = lambda text: None,
        handoff_bytes: int = 0,
    ) -> "Engine":
        """Collective. Make an engine with this rank's share of the weights in `folder`, or of random ones.

        Raises ValueError on all ranks if one of them cannot load its share.
        """
        config = config.drafting() if settings.speculate else config
        moves, layers = settings.rebalance.interval > 0, settings.rebalance.layers_per_step
        if moves and layers > config.num_moe_layers:
            raise ValueError(
                f"--rebalance: the layers at once are {layers}; they must be at most the model's layers with experts "
                f"({config.num_moe_layers})"
            )
        # These two come before anything allocates memory by config.json alone.
        dummy = settings.load == "dummy"
        source = DummyWeights(config, mesh.device) if dummy else open_checkpoint(folder, config)
        dtype = dtype_on(mesh.device, settings.dtype)
        fp8 = decide(config, mesh.attn.size, dtype, mesh.device).fp8
        placement = make_placement(config, mesh, settings.redundant_experts, settings.expert_map)
        of_drafts = make_draft_placement(config, mesh, settings.redundant_experts, settings.expert_map, say)
        slots = placement.slots_per_rank
        check_weights(mesh, StepShape(config, dtype.itemsize, fp8, mesh.attn.size, mesh.size, slots))
        model = Transformer(config, mesh, placement, ops, dtype, settings.positions(config), fp8, of_drafts)
        began, problem = time.perf_counter(), None
        try:
            loaded = load_weights(model, source, mesh, hide=None if mesh.rank == 0 else True)
        except (OSError, ValueError) as error:
            loaded, problem = 0, f"--model {folder}: {error}"
        if (problem := mesh.ep.first_problem(problem)) is not None:
            raise ValueError(problem)
        if not moves:
            source.close()
        seconds, gigabytes = time.perf_counter() - began, loaded / 1e9
        rate = f"read in {seconds:.1f} s, {gigabytes / seconds:.2f} GB/s" if not dummy else f"made in {seconds:.1f} s"
        text = f"{gigabytes:.3f} GB on rank {mesh.rank}, {rate}"
        return cls(settings, model, mesh, say, ExpertReader(source, config) if moves else None, handoff_bytes, text)

    def _forward(
        self,
        dispatcher: Dispatcher,
        batch: Batch,
        halves: tuple[Batch, Batch] | None,
        chosen: ChosenExperts | None = None,
        scored: PromptLogprobs | None = None,
    ) -> Tensor:
        body = self.prompt_graphs.body(batch, dispatcher, halves, chosen, scored)
        return self.model.head(body, batch, self.logits)

    def overlaps(self, rows: int, drafts: Drafts | None) -> bool:
        """Return whether a decode step runs as two halves."""
        return self.rule.in_decode(rows, 1 + drafts.verified if drafts is not None else 1)

    def launch(
        self,
        plan: Plan,
        decode_rows: int | None,
        most_tokens: int,
        meanwhile: Callable[[], None] = lambda: None,
        eager: bool = False,
        makes: int | None = None,
    ) -> Step:
        """Start this rank's part of an agreed step. It may be empty: every rank takes part in every step.

        `decode_rows`: the bucket, if no rank has prompt tokens in this step, or None. With a bucket, all ranks use the
        fixed-capacity layout. `most_tokens`: tokens of the fullest replica. `eager`: replay no graph, because a request
        on some rank asks for its chosen experts. `makes`: drafts, if not as many as in every step.

        `meanwhile()` is called once. A step that runs in graphs calls it after the launch, while the GPU works by
        itself. So does any decode step on a GPU. Any other step calls it before the launch, because that may take as
        long as the step itself. On a CPU the host computes the step. On a GPU it waits inside the step for the experts'
        row counts, if there are several ranks.
        """
        work = self.lay_out(plan, decode_rows, most_tokens, eager, makes)
        ahead = self.runs_ahead(work)
        if not ahead:
            meanwhile()
        step = self.run(work)
        if ahead:
            meanwhile()
        return step

    def lay_out(
        self, plan: Plan, decode_rows: int | None, most_tokens: int, eager: bool = False, makes: int | None = None
    ) -> Work:
        """Collect a step's inputs. The previous step's tokens may still be unseen.

        Everything that reads the sequences comes before `Plan.advance`. From then on the step counts as launched: a
        sequence that ends now keeps its pages.
        """
        decodes, prompts = self._latest.next_decodes(plan.decodes), plan.prompt_chunks()
        sequences, drafts = plan.advance(), self._next_drafts(makes) if self.speculation is not None else None
        if decode_rows is None:
            rows, overlapped = np.arange(len(sequences)), self.rule.in_prefill(most_tokens)
        else:
            overlapped = self.overlaps(decode_rows, drafts)
            rows = places(len(sequences), decode_rows, overlapped)
        self._latest = Work(
            plan, decodes, prompts, decode_rows, overlapped, sequences, rows, eager, drafts, most_tokens
        )
        return self._latest

    def _next_drafts(self, makes: int | None) -> Drafts:
        """Return the drafts of the next step, which makes `makes` new ones, and count it as launched.

        It verifies as many as the step before it has made. A handed-over sequence brings N, and may lose some.
        """
        drafts = Drafts(self._made, self.settings.speculate if makes is None else makes)
        self._made = drafts.made
        self.scheduler.decode_tokens = 1 + drafts.made
        return drafts

    def runs_ahead(self, work: Work) -> bool:
        """Does `run` return long before the step is done?"""
        # All of them, which the host may not have seen.
        needs_tokens = work.drafts is not None and work.plan.processes_logits
        quick = not work.mixed or self.prompt_graphs.serves(work)
        return self.tokens.is_cuda and quick and not needs_tokens

    def run(self, work: Work) -> Step:
        """Launch a step."""
        started = time.perf_counter()
        records = work.plan.returns_experts and self.config.num_moe_layers > 0
        chosen = ChosenExperts(self.model.placement, self.mesh.attn) if records else None
        scores = any(chunk.targets for chunk in work.prompts)
        scored = PromptLogprobs(work.prompts, self.tokens.device) if scores else None
        if not work.mixed:
            self.dispatchers.prepare_masked()
        before = self.graphs.replays
        tokens, counts, logprobs = self.compute(work, chosen, scored)
        self.graph_replays += self.graphs.replays > before
        experts = self._reported(chosen.rows()) if chosen is not None else None
        prompt_rows = self._reported(scored.rows()) if scored is not None else None
        done = None
        if self.tokens.is_cuda:
            done = torch.cuda.Event()
            done.record()
        for observer in (self.recording, self.rebalancer):
            if observer is not None:
                observer.step()
        return Step(work, started, tokens, logprobs, done, experts, prompt_rows, counts)

    def compute(
        self, work: Work, chosen: ChosenExperts | None = None, scored: PromptLogprobs | None = None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """Run a step. Returns the tokens, counts and log probabilities of a Step."""
        if self.speculation is not None:
            return self.speculation.run(work, chosen, scored)
        latest = self.sampler.latest(work)
        if work.decode_rows is None:
            logits = self.prompt.run(work.decodes, work.prompts, work.overlapped, chosen, scored)
        else:
            logits = self.decode.run(work.decodes, work.decode_rows, work.eager, chosen)
        logprobs = self.sampler.choose(logits, work, latest)
        tokens = self._seen[0].copy_(self.tokens, non_blocking=True)
        self._seen.reverse()
        return tokens, None, logprobs

    def _reported(self, rows: Tensor) -> Tensor | None:
        """Return rows of the step, on the host once the step is done. None, unless this rank reports them."""
        return to_host(rows) if self.mesh.leads else None

    def release(self, sequence: Sequence) -> None:
        """Let go of a sequence's pages, as in `Scheduler.release`."""
        if self.speculation is not None:
            self.speculation.settle()
        self.scheduler.release(sequence)

    def check_experts(self) -> None:
        """Raise ValueError if this model's experts cannot be returned."""
        experts = self.config.n_routed_experts
        if experts > MOST_EXPERTS:
            raise ValueError(
                f"return_experts: the model has {experts} routed experts; at most {MOST_EXPERTS} are possible"
            )

    def expert_bytes(self, tokens: int) -> int:
        """Return the bytes of the chosen experts of `tokens` tokens."""
        return tokens * self.config.num_moe_layers * self.config.num_experts_per_tok * ID_BYTES

    def vote(self) -> int:
        """Return this rank's vote on moving experts, for the step's agreement."""
        return self.rebalancer.vote() if self.rebalancer is not None else BUSY

    def rebalance(self, votes: tuple[int, ...]) -> None:
        """Move experts if all ranks agree. `votes`: those of all ranks. Call it before the step of this turn."""
        if self.rebalancer is not None:
            self.rebalancer.advance(votes)

    def stats(self) -> dict[str, float]:
        """Collective. Return the statistics of the job's experts."""
        if self.rebalancer is not None:
            return dict(self.rebalancer.stats)
        return self.recording.stats() if self.recording is not None else {}

    def close(self) -> None:
        """Collective. Call it before the process groups end."""
        gc.unfreeze()  # undoes that of `warm_up.py`, or this engine would never be collected
        if self.compiling is not None:
            self.compiling.close()
        if self.rebalancer is not None:
            self.rebalancer.close()
        if self.recording is not None:
            self.recording.save()
        self.graphs.reset()
        self.dispatchers.close()
        lift_limit(self.mesh.device)

    @property
    def kv_tokens(self) -> int:
        return self.scheduler.cache.capacity * PAGE
