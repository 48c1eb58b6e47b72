"""From a parameter's name to the names of its checkpoint tensors: rules as data.

The field's convention (`packed_modules_mapping` of vLLM's models) is a mapping from a fused module
to the modules that it is made of, in the order of its parts:

    {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

`model.layers.3.self_attn.qkv_proj.weight`, part 'k', is then
`model.layers.3.self_attn.k_proj.weight`, or a slice of `model.layers.3.self_attn.qkv_proj.weight`
in a checkpoint that is fused on disk.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lading.errors import DeclarationError

__all__ = ["DEFAULT_FUSED", "DEFAULT_SKIPS", "Names", "SkipRule"]

DEFAULT_FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipRule:
    """Checkpoint tensors that a load leaves alone on purpose.

    pattern   a regular expression; a tensor is skipped where it matches the whole name
    reason    why nothing is lost, shown in reports
    """

    pattern: str
    reason: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise DeclarationError(
                f"{self.pattern!r} is no regular expression: {error}", subject="skip rule"
            ) from None

    def matches(self, name: str) -> bool:
        """Whether the rule skips a tensor of this name."""
        return re.fullmatch(self.pattern, name) is not None


DEFAULT_SKIPS: tuple[SkipRule, ...] = (
    SkipRule(
        pattern=r".*\brotary_emb\.inv_freq",
        reason="rotary frequencies are computed from config.json",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The naming rules of one model.

    fused    module name → names of the modules that its parts are stored under, in part order
    renames  (regular expression, replacement) pairs, applied in order with re.sub to a parameter's
             name to get the checkpoint's; none by default: names are equal
    skips    checkpoint tensors to leave alone, with the reason
    others   (regular expression, rules) pairs for files of tools that spell the names in their own
             way: the rules count where the expression matches the whole name of a tensor
    """

    fused: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(DEFAULT_FUSED))
    renames: tuple[tuple[str, str], ...] = ()
    skips: tuple[SkipRule, ...] = DEFAULT_SKIPS
    others: tuple[tuple[str, Names], ...] = ()

    def __post_init__(self) -> None:
        for pattern, _ in self.others:
            try:
                re.compile(pattern)
            except re.error as error:
                raise DeclarationError(
                    f"{pattern!r} is no regular expression: {error}", subject="other names"
                ) from None
        for pattern, replacement in self.renames:
            try:
                re.sub(pattern, replacement, "")
            except (re.error, IndexError) as error:
                raise DeclarationError(
                    f"({pattern!r}, {replacement!r}) cannot be: {error}", subject="rename rule"
                ) from None

    @staticmethod
    def of(
        fused: Mapping[str, Sequence[str]] | None = None, skips: Sequence[SkipRule] = ()
    ) -> Names:
        """Rules from a `packed_modules_mapping` and extra skips, on top of the defaults."""
        mapping = dict(DEFAULT_FUSED)
        mapping.update({name: tuple(parts) for name, parts in (fused or {}).items()})
        return Names(fused=mapping, skips=(*DEFAULT_SKIPS, *skips))

    def fitting(self, tensors: Collection[str]) -> Names:
        """The rules in which a checkpoint is spelt: the first of `others` with a match, else these.

        tensors   the names of all its tensors
        """
        for pattern, names in self.others:
            matches = re.compile(pattern).fullmatch
            if any(matches(name) for name in tensors):
                return names
        return self

    def whole(self, target: str) -> str:
        """The checkpoint's name of a parameter that is stored as one tensor."""
        for pattern, replacement in self.renames:
            target = re.sub(pattern, replacement, target)
        return target

    def parts(self, target: str, num_parts: int, leaf: str = "") -> tuple[str, ...] | None:
        """The checkpoint's names of a fused parameter's parts, None where no rule knows the module.

        leaf   what follows the module's name; by default the last component of `target`
        Raises a DeclarationError where the rule has another number of parts.
        """
        whole = self.whole(target)
        leaf = leaf or whole.rpartition(".")[2]
        module = whole.removesuffix(leaf).removesuffix(".")
        head, _, last = module.rpartition(".")
        if last not in self.fused:
            return None
        stored = self.fused[last]
        if len(stored) != num_parts:
            raise DeclarationError(
                f"has {num_parts} parts, the naming rule for {last!r} names {len(stored)}: "
                f"{', '.join(stored)}",
                subject=target,
            )
        prefix = f"{head}." if head else ""
        return tuple(f"{prefix}{name}.{leaf}" for name in stored)

    def skipped_by(self, tensor: str) -> SkipRule | None:
        """The rule that skips a checkpoint tensor, None where none does."""
        for rule in self.skips:
            if rule.matches(tensor):
                return rule
        return None
