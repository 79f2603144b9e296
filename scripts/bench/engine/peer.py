"""Run the work of scripts.bench.engine through another engine, with random weights of the same distribution.

python scripts/bench/engine/peer.py vllm --model FOLDER --batch 1,32,64,128 --prompt 1024 --output 128
python scripts/bench/engine/peer.py sglang --model FOLDER --batch 1,32,64,128 --prompt 1024 --output 128
python scripts/bench/engine/peer.py transformers --model FOLDER --batch 1,4 --prompt 32 --output 8 --step-tokens 128

`python -m scripts.bench.engine --peer` runs this, with a FOLDER that holds a config.json and no weights. The last line
of output is JSON: prefill and decode tokens per second by batch, null if the work does not fit the memory. `auto` takes
vLLM where it is installed, otherwise transformers.

Prefill lasts until the last request's first token is on the host. Decode is the window in which all requests decode.

With --speculate N vLLM drafts with the model's multi-token-prediction layer (`speculative_config`, method `mtp`). As in
our benchmark its acceptance is FORCED: "synthetic" is its own name for that. A version without it fails here; vLLM
0.26 has it.

This file is a script, because the peer may have an environment of its own (--peer-python). It imports the files beside
it, and loads model/dummy.py by its path. So it finds the peer's package `kernels`, not ours. Environment variables
reach the peer, for example VLLM_TUNED_CONFIG_FOLDER.
"""

import argparse
import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peer_sglang import SGLang, watch  # these two lie beside this script
from peer_work import generated

LAW = importlib.util.spec_from_file_location("dummy", Path(__file__).parents[3] / "model" / "dummy.py")
assert LAW is not None and LAW.loader is not None
sys.modules["dummy"] = dummy = importlib.util.module_from_spec(LAW)
LAW.loader.exec_module(dummy)


class VLLM:
    """vLLM's engine in this process, with a time stamp for every batch of tokens that reaches the host."""

    def __init__(self, folder: str, args: argparse.Namespace) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS"):
            os.environ.setdefault(name, "1")
        import vllm
        from vllm.sampling_params import RequestOutputKind

        self.name = f"vLLM {vllm.__version__}"
        self.args, self.uid = args, 0
        self.sampling = {
            "temperature": 0.0,
            "ignore_eos": True,
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,  # like vLLM's offline API
        }
        self.make_params = vllm.SamplingParams
        each = 1 + args.speculate  # tokens of a request in a decode step
        llm = vllm.LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            seed=0,
            enable_prefix_caching=False,
            max_model_len=args.prompt + self.tokens(max(args.batch)),
            max_num_seqs=max(*args.batch, args.prefill_batch),
            max_num_batched_tokens=max(args.step_tokens, each * max(args.batch), args.prefill_batch),
            compilation_config={"cudagraph_capture_sizes": sorted({each * b for b in (1, *args.batch)})},
            **self.drafting(),
        )
        llm.apply_model(dummy.randomize)  # vLLM's dummy weights send every token to the same experts
        if args.speculate:
            llm.collective_rpc(randomize_draft_layer)
        self.engine = llm.llm_engine
        self.vocab = self.engine.vllm_config.model_config.get_vocab_size()

    def drafting(self) -> dict[str, Any]:
        """Return the arguments that make vLLM draft, with forced acceptance."""
        drafts, accept = self.args.speculate, self.args.accept
        if not drafts:
            return {}
        rates = [accept**place for place in range(1, drafts + 1)]  # a draft is right only if those before it are
        how = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}
        return {"speculative_config": {"method": "mtp", "num_speculative_tokens": drafts, **how}}

    def tokens(self, batch: int) -> int:
        return generated(self.args, self.args.prompt, batch, self.args.speculate)

    def drive(self, batch: int, max_tokens: int) -> tuple[float, list[tuple[float, int, int, int]]]:
        """Run `batch` requests to their end. Return the time of the start, and a mark for each step that gave tokens.

        A mark has the time, the number of tokens, that of requests that got some, and that of requests with a token so
        far.
        """
        params = self.make_params(max_tokens=max_tokens, **self.sampling)
        for _ in range(batch):
            ids = [random.randrange(self.vocab) for _ in range(self.args.prompt)]
            self.engine.add_request(str(self.uid), {"prompt_token_ids": ids}, params)
            self.uid += 1
        marks, seen, core = [], set(), self.engine.engine_core
        fetch = type(core).get_output

        def marked() -> Any:
            fetched = fetch(core)
            gave = [one for one in fetched.outputs if one.new_token_ids]
            seen.update(one.request_id for one in gave)
            if gave:
                marks.append((time.perf_counter(), sum(len(one.new_token_ids) for one in gave), len(gave), len(seen)))
            return fetched

        core.get_output = marked
        torch.cuda.synchronize()
        start = time.perf_counter()
        while self.engine.has_unfinished_requests():
            self.engine.step()
        if getattr(core.engine_core, "batch_queue", None):
            self.engine.step()  # an empty step was scheduled ahead
        assert sum(tokens for _, tokens, _, _ in marks) == batch * max_tokens, "not every token was seen"
        return start, marks

    def prefill(self, batch: int) -> float:
        start, marks = self.drive(batch, 1)
        return batch * self.args.prompt / (marks[-1][0] - start)

    def decode(self, batch: int) -> float:
        _, marks = self.drive(batch, self.tokens(batch))
        window = [mark for mark in marks if mark[2] == mark[3] == batch][1:]  # after the last prompt
        return sum(tokens for _, tokens, _, _ in window[1:]) / (window[-1][0] - window[0][0])


def randomize_draft_layer(worker: Any) -> None:
    dummy.randomize(worker.get_draft_model())


class Transformers:
    """A generation loop over transformers' model, with a cache of fixed size."""

    def __init__(self, folder: str, args: argparse.Namespace) -> None:
        import transformers

        self.name = f"transformers {transformers.__version__}"
        self.args, self.device = args, "cuda" if torch.cuda.is_available() else "cpu"
        self.make_cache = transformers.StaticCache
        config = transformers.DeepseekV3Config.from_pretrained(folder)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(self.device):
            self.model = transformers.DeepseekV3ForCausalLM(config).eval()
        dummy.randomize(self.model)

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.inference_mode()
    def step(self, ids: torch.Tensor, cache: object) -> torch.Tensor:
        """Run one step. Return the next token of each row [B, 1]."""
        logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits.argmax(-1)

    def fill(self, batch: int, room: int) -> tuple[torch.Tensor, object]:
        """Compute prompts in steps of at most --step-tokens. Return their next tokens, and the cache."""
        cache = self.make_cache(config=self.model.config, max_cache_len=self.args.prompt + room)
        ids = torch.randint(self.model.config.vocab_size, (batch, self.args.prompt), device=self.device)
        for part in ids.split(max(1, self.args.step_tokens // batch), dim=1):
            tokens = self.step(part, cache)
        return tokens, cache

    def prefill(self, batch: int) -> float:
        at_once, start = max(1, self.args.step_tokens // self.args.prompt), self.now()
        for first in range(0, batch, at_once):
            self.fill(min(at_once, batch - first), 0)
        return batch * self.args.prompt / (self.now() - start)

    def decode(self, batch: int) -> float:
        tokens, cache = self.fill(batch, self.args.output + 1)
        tokens = self.step(tokens, cache)
        start = self.now()
        for _ in range(self.args.output):
            tokens = self.step(tokens, cache)
        return batch * self.args.output / (self.now() - start)


PEERS = {"vllm": VLLM, "sglang": SGLang, "transformers": Transformers}


def rate(measure: Callable[[int], float], batch: int, repeat: int) -> float | None:
    """Return the median rate of `repeat` runs, after one to warm up. None if the memory does not suffice."""
    try:
        return median([measure(batch) for _ in range(repeat + 1)][1:])
    except torch.OutOfMemoryError:
        return None


def number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def numbers(text: str) -> list[int]:
    return [number(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("peer", choices=["auto", *PEERS])
    add("--model", required=True, metavar="FOLDER", help="the folder of config.json")
    add("--batch", type=numbers, default=[1, 32, 64, 128], help="decode batch sizes (1,32,64,128)")
    add("--prompt", type=number, default=1024, help="tokens of each prompt (1024)")
    add("--output", type=number, default=128, help="decode steps (128)")
    add("--prefill-batch", type=number, default=64, help="requests per prefill (64)")
    add("--step-tokens", type=number, default=16384, help="prompt tokens per step (16384)")
    add("--repeat", type=number, default=3, help="runs per median (3)")
    add("--speculate", type=int, default=0, help="drafts per step, with forced acceptance (0)")
    add("--accept", type=float, default=0.6, help="how likely a draft counts as right (0.6)")
    args = parser.parse_args()
    kind = args.peer if args.peer != "auto" else "vllm" if importlib.util.find_spec("vllm") else "transformers"
    random.seed(0)
    torch.manual_seed(0)
    if args.speculate and kind != "vllm":
        raise SystemExit(f"--speculate: of the peers vLLM alone can force acceptance, not {kind}")
    peer = PEERS[kind](args.model, args)
    found = {
        "peer": peer.name,
        "prefill": {b: rate(peer.prefill, b, args.repeat) for b in (args.prefill_batch, 1)},
        "decode": {b: rate(peer.decode, b, args.repeat) for b in args.batch},
    }
    print(json.dumps(found), flush=True)
    os._exit(0)  # because a peer's teardown can take long


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # in a process of SGLang's
    watch(dummy.randomize)
