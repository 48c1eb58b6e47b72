"""The model families as a table: what each adds to the one decoder, and what it takes for granted
where config.json leaves a key out. Values only; no torch, no parsing.

Defaults are those of the family's config class in transformers 5.23 (`configuration_llama.py`, ...)
from which the published config.json files were written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from lading.names import DEFAULT_FUSED, Names

__all__ = ["FAMILIES", "Experts", "Family", "Flag", "Windows"]

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


class Windows(str, Enum):
    """How a family says which layers attend to a sliding window."""

    NEVER = "never"
    EVERY_LAYER = "every layer"
    EVERY_LAYER_IF_USED = "every layer, if use_sliding_window"
    BY_LAYER = "by layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """A yes or no: the same for all models of a family (key = None), or a key of config.json."""

    key: str | None = None
    default: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """What a family of mixture-of-experts models has in place of an MLP, in some layers or in all.

    num_experts, num_experts_per_tok   where the keys are left out
    size_key     the key of an expert's intermediate size
    size         where that key is left out
    normalised   the weights of a token's experts add up to 1
    choosable    decoder_sparse_step and mlp_only_layers say which layers have experts; else all do
    block, down  names of the modules: of router and experts, of an expert's second layer
    """

    num_experts: int
    num_experts_per_tok: int
    size_key: str
    size: int | None = None
    normalised: Flag
    choosable: bool = False
    block: str = "mlp"
    down: str = "down_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family.

    model_type, architectures   how config.json calls it
    num_kv_heads                where the key is left out; None = as many as q heads
    head_dim                    likewise; None = hidden_size / num_attention_heads
    max_position, rms_norm_eps, sliding_window, rope_theta      likewise
    qkv_bias, o_bias, mlp_bias  which linear layers have a bias
    qk_norm                     q and k are normalised head by head, before the rotation
    windows                     which layers have a sliding window
    rope_kinds                  rotary scalings that the family knows
    rope_aliases                its older names for them
    partial_rotary              whether a head may be rotated in part
    original_max_position       where the key is left out and a rotary scaling needs it; None =
                                max_position_embeddings
    fused                       modules that the decoder fuses and the checkpoint stores apart
    other_names                 names in the files of some tools, as `lading.names.Names.others`
    experts                     None = an MLP in every layer
    """

    model_type: str
    architectures: tuple[str, ...]
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_position: int
    rms_norm_eps: float = 1e-6
    sliding_window: int | None = None
    rope_theta: float = 10000.0
    qkv_bias: Flag = Flag()
    o_bias: Flag = Flag()
    mlp_bias: Flag = Flag()
    qk_norm: bool = False
    windows: Windows = Windows.NEVER
    rope_kinds: tuple[str, ...] = ROPE_KINDS
    rope_aliases: Mapping[str, str] = field(default_factory=dict, hash=False)
    partial_rotary: bool = False
    original_max_position: int | None = None
    fused: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: dict(DEFAULT_FUSED), hash=False
    )
    other_names: tuple[tuple[str, Names], ...] = field(default=(), hash=False)
    experts: Experts | None = None

    @property
    def names(self) -> Names:
        """The naming rules of the family's checkpoints."""
        return replace(Names.of(self.fused), others=self.other_names)


_MIXTRAL_SPELLINGS = (
    (  # llmcompressor 0.14
        r".*\.block_sparse_moe\.experts\.\d+\.(gate|up|down)_proj\..*",
        Names(renames=((r"(\.block_sparse_moe\.experts\.\d+)\.w2\.", r"\1.down_proj."),)),
    ),
    (  # gptqmodel 7.4: the modules of transformers 5
        r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj\..*",
        Names(
            renames=(
                (r"\.block_sparse_moe\.", ".mlp."),
                (r"(\.mlp\.experts\.\d+)\.w2\.", r"\1.down_proj."),
            )
        ),
    ),
)

_TABLE = (
    Family(
        model_type="llama",
        architectures=("LlamaForCausalLM",),
        max_position=2048,
        qkv_bias=Flag(key="attention_bias"),
        o_bias=Flag(key="attention_bias"),
        mlp_bias=Flag(key="mlp_bias"),
    ),
    Family(
        model_type="mistral",
        architectures=("MistralForCausalLM",),
        num_kv_heads=8,
        max_position=131072,
        sliding_window=4096,
        windows=Windows.EVERY_LAYER,
    ),
    Family(
        model_type="qwen2",
        architectures=("Qwen2ForCausalLM",),
        num_kv_heads=32,
        max_position=32768,
        sliding_window=4096,
        windows=Windows.BY_LAYER,
        qkv_bias=Flag(default=True),
    ),
    Family(
        model_type="qwen3",
        architectures=("Qwen3ForCausalLM",),
        num_kv_heads=32,
        head_dim=128,
        max_position=32768,
        sliding_window=4096,
        windows=Windows.BY_LAYER,
        qkv_bias=Flag(key="attention_bias"),
        o_bias=Flag(key="attention_bias"),
        qk_norm=True,
    ),
    Family(
        model_type="phi3",
        architectures=("Phi3ForCausalLM",),
        max_position=4096,
        rms_norm_eps=1e-5,
        windows=Windows.EVERY_LAYER,
        rope_kinds=("default", "longrope"),
        # The first Phi-3 configs call it "su"; those of some sizes, wrongly, "yarn".
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        partial_rotary=True,
        original_max_position=4096,
        fused={},  # stored fused already
    ),
    Family(
        model_type="qwen3_moe",
        architectures=("Qwen3MoeForCausalLM",),
        num_kv_heads=4,
        max_position=32768,
        sliding_window=4096,
        windows=Windows.EVERY_LAYER_IF_USED,
        qkv_bias=Flag(key="attention_bias"),
        o_bias=Flag(key="attention_bias"),
        qk_norm=True,
        experts=Experts(
            num_experts=128,
            num_experts_per_tok=8,
            size_key="moe_intermediate_size",
            size=768,
            normalised=Flag(key="norm_topk_prob"),
            choosable=True,
        ),
    ),
    Family(
        model_type="mixtral",
        architectures=("MixtralForCausalLM",),
        num_kv_heads=8,
        max_position=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        windows=Windows.EVERY_LAYER,
        fused={**DEFAULT_FUSED, "gate_up_proj": ("w1", "w3")},
        other_names=_MIXTRAL_SPELLINGS,
        experts=Experts(
            num_experts=8,
            num_experts_per_tok=2,
            size_key="intermediate_size",
            normalised=Flag(default=True),
            block="block_sparse_moe",
            down="w2",
        ),
    ),
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _TABLE}
"""The known families by model_type."""
