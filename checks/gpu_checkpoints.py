"""Random checkpoints for gpu_back.py; what each rank has to hold of them, by safetensors slices."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

GROUP, BLOCK = 128, 128


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama. kind: "dense" (bf16), "gptq" (int4, groups of 128), "fp8" (blocks of 128)."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    layers: int = 1
    kind: str = "dense"

    def modules(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(module, [O, I]) of each, norms with one size."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "self_attn.q_proj", (q, self.hidden)
            yield prefix + "self_attn.k_proj", (kv, self.hidden)
            yield prefix + "self_attn.v_proj", (kv, self.hidden)
            yield prefix + "self_attn.o_proj", (self.hidden, q)
            yield prefix + "mlp.gate_proj", (self.intermediate, self.hidden)
            yield prefix + "mlp.up_proj", (self.intermediate, self.hidden)
            yield prefix + "mlp.down_proj", (self.hidden, self.intermediate)
            yield prefix + "input_layernorm", (self.hidden,)
            yield prefix + "post_attention_layernorm", (self.hidden,)
        yield "model.norm", (self.hidden,)
        yield "lm_head", (self.vocabulary, self.hidden)

    def stored(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of every tensor."""
        for module, shape in self.modules():
            if self.kind == "dense" or "proj" not in module:
                yield f"{module}.weight", "bf16", shape
                continue
            rows, columns = shape
            if self.kind == "fp8":
                yield f"{module}.weight", "fp8", shape
                yield f"{module}.weight_scale_inv", "fp32", (rows // BLOCK, columns // BLOCK)
                continue
            yield f"{module}.qweight", "int32", (columns // 8, rows)
            yield f"{module}.qzeros", "int32", (columns // GROUP, rows // 8)
            yield f"{module}.scales", "fp16", (columns // GROUP, rows)
            yield f"{module}.g_idx", "g_idx", (columns,)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        sizes = {"bf16": 2, "fp16": 2, "fp8": 1}
        return sum(torch.Size(s).numel() * sizes.get(dtype, 4) for _, dtype, s in self.stored())

    def of_size(self, gigabytes: float) -> Shape:
        """With as many layers as come to so much."""
        one, two = (Shape(**{**asdict(self), "layers": n}).num_bytes for n in (1, 2))
        layers = max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1)
        return Shape(**{**asdict(self), "layers": layers})

    def config(self) -> dict[str, object]:
        """config.json."""
        found: dict[str, object] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
        if self.kind == "gptq":
            found["quantization_config"] = {
                "quant_method": "gptq",
                "bits": 4,
                "group_size": GROUP,
                "desc_act": False,
                "sym": True,
                "checkpoint_format": "gptq",
            }
        if self.kind == "fp8":
            found["quantization_config"] = {
                "quant_method": "fp8",
                "weight_block_size": [BLOCK, BLOCK],
                "activation_scheme": "dynamic",
            }
        return found


def random(dtype: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Values of any bits, but for group indices, which are in order, and no NaN in fp8."""
    if dtype == "g_idx":
        return torch.arange(shape[0], dtype=torch.int32) // GROUP
    if dtype == "int32":
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device).cpu()
    if dtype == "fp8":
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        codes[(codes & 0x7F) == 0x7F] = 0
        return codes.cpu().view(torch.float8_e4m3fn)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    return torch.randn(shape, dtype=kind, device=device).mul_(0.02).cpu()


def make(folder: Path, shape: Shape, device: torch.device, files: int = 4) -> None:
    """The checkpoint, unless the folder has one."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    every = list(shape.stored())
    held: dict[str, torch.Tensor] = {}
    where: dict[str, str] = {}
    number = 1
    for at, (name, dtype, size) in enumerate(every):
        held[name] = random(dtype, size, device)
        full = sum(t.nbytes for t in held.values()) > shape.num_bytes / files
        if (full and number < files) or at == len(every) - 1:
            file = f"model-{number:05}-of-{files:05}.safetensors"
            save_file(held, folder / file, metadata={"format": "pt"})
            where.update(dict.fromkeys(held, file))
            held, number = {}, number + 1
    index = {"metadata": {"total_size": shape.num_bytes}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config()))


def make_replicated(folder: Path, count: int, size: int) -> None:
    """`count` square matrices, which a model of plain layers keeps whole on every rank."""
    if (folder / "model.safetensors").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    noise = torch.randn(size, size).to(torch.bfloat16)
    save_file({f"{i}.weight": noise + i for i in range(count)}, folder / "model.safetensors")


def plain_model(count: int, size: int) -> nn.Module:
    """The layers of `make_replicated`, without memory."""
    layers = [
        nn.Linear(size, size, bias=False, device="meta", dtype=torch.bfloat16) for _ in range(count)
    ]
    return nn.Sequential(*layers)


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ROW = ("o_proj", "down_proj")
SWAPPED = ("qweight", "qzeros", "scales")
"""[in, out] in the file."""


@dataclass(frozen=True)
class Share:
    """What rank `rank` of `size` holds, by safetensors' own slices; open files."""

    where: dict[str, safe_open]
    rank: int
    size: int
    kv_heads: int

    def expected(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The values of a parameter of this name and shape."""
        module, leaf = name.rsplit(".", 1)
        head, _, last = module.rpartition(".")
        if last in FUSED:
            parts = [self.piece(f"{head}.{one}.{leaf}", None) for one in FUSED[last]]
            return torch.cat(parts, 1 if leaf in SWAPPED else 0)
        padded = shape[0] if last in ("embed_tokens", "lm_head") else None
        return self.piece(name, padded)

    def piece(self, name: str, padded: int | None) -> torch.Tensor:
        """This rank's part of a checkpoint tensor; of a vocabulary `padded` rows."""
        stored = self.where[name].get_slice(name)
        module, leaf = name.rsplit(".", 1)
        last = module.rpartition(".")[2]
        shape = stored.get_shape()
        if len(shape) == 1:
            return stored[:]
        if padded is not None:
            rows = stored[
                min(self.rank * padded, shape[0]) : min((self.rank + 1) * padded, shape[0])
            ]
            return torch.cat([rows, rows.new_zeros(padded - len(rows), shape[1])])
        dim = int((last in ROW) != (leaf in SWAPPED))
        count = min(self.size, self.kv_heads) if last in ("k_proj", "v_proj") else self.size
        n = shape[dim] // count
        at = self.rank * count // self.size * n
        return stored[at : at + n] if dim == 0 else stored[:, at : at + n]


def differing(model: nn.Module, folder: Path, shape: Shape, rank: int, size: int) -> list[str]:
    """The parameters of which any bit is not that of the files."""
    with ExitStack() as stack:
        where = {}
        for path in sorted(glob(os.path.join(folder, "*.safetensors"))):
            handle = stack.enter_context(safe_open(path, "pt"))
            where.update(dict.fromkeys(handle.keys(), handle))
        share = Share(where, rank, size, shape.kv_heads)
        return [
            name
            for name, found in model.state_dict().items()
            if not same_bits(found, share.expected(name, found.shape))
        ]


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether the bytes are equal; compared where the first is."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    two = two.contiguous().to(one.device)
    return torch.equal(one.detach().contiguous().view(torch.uint8), two.view(torch.uint8))
