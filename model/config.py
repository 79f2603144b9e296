"""ModelConfig: the shape of a DeepSeek-V3-architecture model, read from a Hugging Face `config.json`.

`model/model_types.py` says what the field `model_type` decides.
"""

import hashlib
import json
import reprlib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from model.model_types import MISSING, MISSING_FIELDS, NULL_MEANS, ONLY_VALUES, SUPPORTED, ModelType

METHODS = {  # quantisations that are refused, by quantization_config's quant_method
    "awq": "AWQ",
    "gptq": "GPTQ",
    "compressed-tensors": "compressed-tensors (int4, int8 or fp8 per channel)",
    "bitsandbytes": "bitsandbytes",
    "modelopt": "NVIDIA ModelOpt (NVFP4 or fp8 per tensor)",
    "modelopt_fp4": "NVIDIA ModelOpt (NVFP4)",
    "mxfp4": "MXFP4",
    "quark": "AMD Quark",
    "gguf": "GGUF",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
    "w4afp8": "W4AFP8",
}
QUANTIZER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # ModelOpt, GPTQ, AWQ
TAKEN = "only bf16, fp16, float32 and fp8 in blocks of 128 x 128 are supported"
MAY_BE_ZERO = (
    "n_shared_experts",
    "first_k_dense_replace",
    "num_nextn_predict_layers",
    "qk_nope_head_dim",
)
OURS = ("rope", "fp8", "drafts")  # fields that config.json does not have under these names
MOST_SIZE = 2**31 - 1  # kernels count in int32
LEAST_NUMBER, MOST_NUMBER = 1e-15, 1e15  # a product of a few such numbers stays within float32
MOST_WEIGHT_BYTES = 2**44  # 16 TiB in bf16; Kimi-K2, the largest published model, has 2 TB
MOST_BLOCKS = 2**18  # layers, and experts of all layers; Kimi-K2 has 23,101
LEAST_THETA = 2  # rope's frequencies must fall from pair to pair, and YaRN divides by log(theta)
MOST_BYTES = 2**26  # for a file other than weights; DeepSeek-V3's largest, the index, has 9 million bytes
LFS_POINTER = "version https://git-lfs.github.com/spec/v1"  # what a clone without git-LFS has in place of a file


@dataclass(frozen=True)
class Rope:
    """Rotary embedding, plain or YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071, section 3)."""

    theta: float = 10000.0
    factor: float = 1.0  # 1 = plain rope, no scaling
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """Field names are Hugging Face's; `rope` gathers what config.json spreads over `rope_theta` and friends."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    q_lora_rank: int | None = None
    n_shared_experts: int = 1
    scoring_func: str = "sigmoid"  # or softmax (DeepSeek-V2)
    topk_method: str = "noaux_tc"  # the gate has a bias; without: group_limited_greedy, or greedy, which has one group
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    fp8: bool = False  # weights in e4m3 with one scale per 128x128 block
    drafts: bool = False  # the multi-token-prediction layer is used; config.json does not say so, but `drafting`
    eos_token_ids: tuple[int, ...] = ()
    rope: Rope = field(default_factory=Rope)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def kv_dim(self) -> int:
        """Width of one cached token: the latent and the shared rope key, C + R."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def fingerprint(self) -> str:
        """A hash of the architecture: of what the file says, but for end-of-text tokens and how weights are stored."""
        own = replace(self, fp8=False, drafts=False, eos_token_ids=())
        return hashlib.sha256(repr(own).encode()).hexdigest()[:8]

    @property
    def num_moe_layers(self) -> int:
        return max(0, self.num_hidden_layers - self.first_k_dense_replace)

    @property
    def kv_layers(self) -> int:
        """The number of layers that cache KV: the model's, and the multi-token-prediction layer if it drafts."""
        return self.num_hidden_layers + self.drafts

    @property
    def expert_share(self) -> float:
        """The fraction of all ranks' tokens that an expert gets under balanced routing; 0 without experts."""
        return self.num_experts_per_tok / self.n_routed_experts if self.num_moe_layers else 0.0

    @property
    def num_parameters(self) -> int:
        """The number of weights of the whole model, without multi-token-prediction layers. A tied one counts once."""
        hidden, heads, experts = self.hidden_size, self.num_attention_heads, self.n_routed_experts
        ffn = 3 * hidden  # weights per unit of width
        query = hidden * heads * self.qk_head_dim
        if self.q_lora_rank is not None:
            query = self.q_lora_rank * (hidden + 1 + heads * self.qk_head_dim)
        latent = hidden * self.kv_dim + self.kv_lora_rank * (1 + heads * (self.qk_nope_head_dim + self.v_head_dim))
        attention = query + latent + heads * self.v_head_dim * hidden
        gate = experts * (hidden + (self.topk_method == "noaux_tc"))
        moe = gate + ffn * self.moe_intermediate_size * (experts + self.n_shared_experts)
        dense_layers = self.num_hidden_layers - self.num_moe_layers
        layers = self.num_hidden_layers * (attention + 2 * hidden) + self.num_moe_layers * moe
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * hidden
        return embeddings + layers + dense_layers * ffn * self.intermediate_size + hidden

    def drafting(self) -> "ModelConfig":
        """Return the configuration with its multi-token-prediction layer in use. Raises ValueError if it has none."""
        if not self.num_nextn_predict_layers:
            raise ValueError(
                "--speculate: config.json's num_nextn_predict_layers is 0 or missing: the model has no "
                "multi-token-prediction layer to draft with"
            )
        if not self.num_moe_layers:
            raise ValueError("--speculate: the model has no layer with experts, which one that drafts must have")
        return replace(self, drafts=True)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ModelConfig":
        """Read `folder/config.json`, and the end-of-text tokens of `generation_config.json`, if there is one.

        Raises ValueError with the field, its value and the rule that it breaks.
        """
        path, generation = Path(folder) / "config.json", Path(folder) / "generation_config.json"
        if not Path(folder).is_dir():
            raise ValueError(f"--model {folder}: no such folder")
        if not path.is_file():
            raise ValueError(f"--model {folder}: it has no config.json")
        raw = read_json(path)
        if not raw.get("quantization_config"):
            for other in (Path(folder) / name for name in QUANTIZER_FILES):
                if other.is_file():
                    raise ValueError(f"{other}: the weights are quantised, but config.json does not say how; {TAKEN}")
        config = cls.from_dict(raw, str(path))
        if not generation.is_file():
            return config
        more = _token_ids(read_json(generation), config.vocab_size, str(generation))
        return replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more)))

    @classmethod
    def from_dict(cls, raw: dict, where: str = "config") -> "ModelConfig":
        kind = _model_type(raw, where)
        nulls = {name: NULL_MEANS[name] for name, value in raw.items() if value is None and name in NULL_MEANS}
        raw = kind.defaults | {name: value for name, value in raw.items() if value is not None} | nulls
        raw |= {"scoring_func": kind.scoring_func, "topk_method": raw.get("topk_method", kind.topk_methods[0])}
        if kind.layer_types and "mlp_layer_types" in raw:
            raw["first_k_dense_replace"] = _dense_layers(raw, where)
        if raw["topk_method"] == "greedy":
            raw |= {"n_group": 1, "topk_group": 1}  # published configurations name groups that greedy ignores
        own = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw and name not in OURS}
        own["eos_token_ids"] = ()
        own["rope"] = _read_rope(raw, where)
        own["fp8"] = _read_quantization(raw.get("quantization_config") or raw.get("compression_config"), where)
        required = [f.name for f in fields(cls) if f.default is f.default_factory or f.name in kind.asked_for]
        if missing := [name for name in required if name not in own]:
            raise ValueError(f"{where}: required fields are missing: {', '.join(missing)}")
        config = cls(**own)
        config._check(where)
        _check_size(config, where)
        return replace(config, eos_token_ids=_token_ids(raw, config.vocab_size, where))

    def _check(self, where: str) -> None:
        for name, kind in {f.name: f.type for f in fields(self)}.items():
            value = getattr(self, name)
            if kind in (int, int | None) and value is not None:
                least = 0 if name in MAY_BE_ZERO else 1
                if type(value) is not int or not least <= value <= MOST_SIZE:
                    rule = f"an integer of at least {least} and at most {MOST_SIZE}"
                    raise ValueError(f"{where}: {name} is {shown(value)}; it must be {rule}")
            elif kind is bool and type(value) is not bool:
                raise ValueError(f"{where}: {name} is {shown(value)}; it must be true or false")
            elif kind is float:
                _check_number(where, name, value)
        experts, groups = self.n_routed_experts, self.n_group
        if experts % groups:
            raise ValueError(f"{where}: n_routed_experts % n_group must be 0, not {experts} % {groups}")
        if not 1 <= self.topk_group <= groups:
            raise ValueError(f"{where}: topk_group is {self.topk_group}; it must be in 1..n_group ({groups})")
        reachable = self.topk_group * (experts // groups)
        if not 1 <= self.num_experts_per_tok <= reachable:
            raise ValueError(
                f"{where}: num_experts_per_tok is {self.num_experts_per_tok}; it must be in 1..{reachable} "
                f"(topk_group {self.topk_group} x {experts // groups} experts a group)"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"{where}: qk_rope_head_dim is {self.qk_rope_head_dim}; it must be even")


def _check_size(config: ModelConfig, where: str) -> None:
    """Raise ValueError if the model would have more than MOST_WEIGHT_BYTES, at 2 bytes each, or MOST_BLOCKS.

    It bounds what sizes in a config.json can ask for where no weight file shows that they are wrong.
    """
    if (size := 2 * config.num_parameters) > MOST_WEIGHT_BYTES:
        raise ValueError(
            f"{where}: its sizes make a model of {size:,} bytes in bf16; at most {MOST_WEIGHT_BYTES:,} are taken"
        )
    blocks = config.num_hidden_layers + config.num_moe_layers * config.n_routed_experts
    if blocks > MOST_BLOCKS:
        raise ValueError(
            f"{where}: num_hidden_layers {config.num_hidden_layers} + {config.num_moe_layers} layers with experts x "
            f"n_routed_experts {config.n_routed_experts} = {blocks:,}; it must be at most {MOST_BLOCKS:,}"
        )


def _model_type(raw: dict, where: str) -> ModelType:
    """Return the rules of the file's `model_type`. Raises ValueError with the feature that is missing here."""
    name, types = raw.get("model_type"), ", ".join(map(repr, SUPPORTED))
    if not isinstance(name, str) or name not in SUPPORTED:
        feature = MISSING.get(name) if isinstance(name, str) else None
        why = f", which needs {feature}" if feature else ""
        raise ValueError(f"{where}: model_type is {shown(name)}{why}; supported are {types}")
    for field_name, feature in MISSING_FIELDS.items():
        if raw.get(field_name) is not None:
            given = f"{field_name} {shown(raw[field_name])}"
            raise ValueError(
                f"{where}: model_type is {name!r} with {given}, which needs {feature}; supported are {types} without it"
            )
    kind = SUPPORTED[name]
    only = {field_name: (value,) for field_name, value in ONLY_VALUES.items()}
    only |= {"scoring_func": (kind.scoring_func,), "topk_method": kind.topk_methods}
    for field_name, values in only.items():
        if field_name in raw and raw[field_name] not in values:
            allowed = " or ".join(map(repr, values))
            raise ValueError(f"{where}: {field_name} is {shown(raw[field_name])}; only {allowed} is supported")
    return kind


def _dense_layers(raw: dict, where: str) -> int:
    """Return the number of dense layers that mlp_layer_types begins with. The sparse ones, with experts, must follow.

    It overrides first_k_dense_replace, as in transformers.
    """
    types = raw["mlp_layer_types"]
    dense = types.count("dense") if isinstance(types, list) else 0
    if not isinstance(types, list) or types != ["dense"] * dense + ["sparse"] * (len(types) - dense):
        raise ValueError(f"{where}: mlp_layer_types is {shown(types)}; it must be a list of 'dense', then 'sparse'")
    if len(types) != raw.get("num_hidden_layers"):
        layers = shown(raw.get("num_hidden_layers"))
        raise ValueError(f"{where}: mlp_layer_types has {len(types)} entries; num_hidden_layers is {layers}")
    return dense


def _check_number(where: str, name: str, value: object, least: float = LEAST_NUMBER) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= MOST_NUMBER:
        raise ValueError(f"{where}: {name} is {shown(value)}; it must be a number in {least:g}..{MOST_NUMBER:g}")


def shown(value: object) -> str:
    """Return a value from a file as text for an error message: short, whatever the value."""
    short = reprlib.Repr()  # unlike `repr`, it accepts any depth of nesting
    short.maxstring = 80
    return f"{short.repr(value):.100}"


def read_text(path: Path) -> str:
    """Read a checkpoint's file other than weights. Raises ValueError with its path."""
    try:
        if (size := path.stat().st_size) <= MOST_BYTES:
            text = path.read_text(encoding="utf-8")
            if text.startswith(LFS_POINTER):
                raise ValueError(f"{path}: is a git-LFS pointer, not the file: git lfs pull")
            return text
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    raise ValueError(f"{path}: it has {size:,} bytes; it must have at most {MOST_BYTES:,}")


def read_json(path: Path) -> dict:
    """Read a JSON object with `read_text`. Raises ValueError if the file holds anything else."""
    return parse_json(path, read_text(path))


def parse_json(path: Path, text: str) -> dict:
    """Parse the text of a file, which must be a JSON object. Raises ValueError with its path."""
    try:
        raw = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path}: not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: it must hold a JSON object, not {type(raw).__name__}")
    return raw


def _token_ids(raw: dict, vocab_size: int, where: str) -> tuple[int, ...]:
    """Return the tokens that end a text. `eos_token_id` may be one id, several, or null."""
    eos = raw.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(token) is not int or not 0 <= token < vocab_size for token in ids):
        rule = f"an integer in 0..{vocab_size - 1} (vocab_size - 1), or a list of them"
        raise ValueError(f"{where}: eos_token_id is {shown(eos)}; it must be {rule}")
    return tuple(dict.fromkeys(ids))


def _read_quantization(given: dict | None, where: str) -> bool:
    """Return whether the weights are in block fp8. Raises ValueError with the name of any other quantisation."""
    if not given:
        return False
    if not isinstance(given, dict):
        raise ValueError(f"{where}: quantization_config is {shown(given)}; it must be an object")
    given = {"fmt": "e4m3", "activation_scheme": "dynamic"} | given
    method = given.get("quant_method")
    if (name := METHODS.get(method) if isinstance(method, str) else None) is not None:
        raise ValueError(f"{where}: the weights are quantised with {name} (quant_method {method!r}); {TAKEN}")
    rules = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
    for name, only in rules.items():
        if (value := given.get(name)) != only:
            raise ValueError(f"{where}: quantization_config's {name} is {shown(value)}; only {only!r} is supported")
    return True


def _read_rope(raw: dict, where: str) -> Rope:
    """Read either spelling: `rope_theta` + `rope_scaling`, or transformers 5's single `rope_parameters`.

    If both are there, `rope_scaling` counts, as in transformers: it was added to a saved configuration.
    """
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: rope_scaling is {shown(given)}; it must be an object")
    theta = given.get("rope_theta", raw.get("rope_theta", 10000.0))
    _check_number(where, "rope_theta", theta, LEAST_THETA)
    kind = given.get("rope_type") or given.get("type") or "default"
    if (part := given.get("partial_rotary_factor", 1)) != 1:
        raise ValueError(f"{where}: rope's partial_rotary_factor is {shown(part)}; only 1 is supported")
    if kind == "default":
        return Rope(theta=theta)
    if kind != "yarn":
        raise ValueError(f"{where}: rope type is {shown(kind)}; only 'default' and 'yarn' are supported")
    if given.get("factor") is None:
        raise ValueError(f"{where}: yarn rope scaling has no 'factor'")
    for name, only in (("attention_factor", None), ("truncate", True)):
        if given.get(name, only) != only:
            raise ValueError(f"{where}: yarn's {name} is {shown(given[name])}; only {only!r} is supported")
    original = given.get("original_max_position_embeddings") or raw.get("max_position_embeddings")
    numbers = {
        "factor": given["factor"],
        "beta_fast": given.get("beta_fast") or 32.0,
        "beta_slow": given.get("beta_slow") or 1.0,
        "mscale": given.get("mscale") or 0.0,
        "mscale_all_dim": given.get("mscale_all_dim") or 0.0,
    }
    for name, value in numbers.items():
        _check_number(where, f"yarn's {name}", value, 0 if "mscale" in name else LEAST_NUMBER)
    if type(original) is not int or not 1 <= original <= MOST_SIZE:
        raise ValueError(
            f"{where}: yarn's original_max_position_embeddings is {shown(original)}; it must be an integer over 0 and "
            f"at most {MOST_SIZE}"
        )
    return Rope(theta=theta, original_max_position=original, **numbers)
