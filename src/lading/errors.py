"""Every error that lading raises, by whose fault it is.

    LadingError
    ├── DeclarationError        the declaration's: a parameter, layer or config that cannot be
    │   ├── LayoutError         a cut that does not divide: heads, rows, groups   (a ValueError)
    │   └── ConfigError         config.json: a key missing, of the wrong type, or contradicting
    ├── CheckpointError         the file's
    │   ├── FileError           cannot be opened or read: missing, no permission, short read
    │   ├── HeaderError         the safetensors header is damaged or lies about the file
    │   ├── IndexFileError      the index file is damaged or names impossible files
    │   ├── PlanFileError       a saved plan is damaged, or does not prove what it claims
    │   ├── MissingTensorError  a parameter (or part) for which the checkpoint has nothing
    │   ├── SurplusTensorError  a checkpoint tensor that nothing uses and no rule skips
    │   ├── ShapeError          of another shape than the declaration needs       (a ValueError)
    │   └── DtypeError          of a dtype that would lose values                 (a ValueError)
    ├── CallError               the caller's: a keyword, shard id, offset, rank   (a ValueError)
    │   ├── KeywordError        a keyword misspelt or missing                     (a TypeError too)
    │   └── ConflictError       the same part written twice with other bytes
    ├── NotLoadedError          weights are used that were not wholly written     (a RuntimeError)
    ├── PlanError               every problem of a plan at once; `.problems` has them all
    ├── VerifyError             a loaded element differs from an independent read of the file
    ├── DeviceError             a GPU, its driver or its memory refused           (a RuntimeError)
    └── RankError               another rank failed outside lading: which, why    (a RuntimeError)

A message is `<subject>: <found>, <needed> (<why that number>). In <file>. Try: ...`. Deep code
raises the local fact (`found`, `needed`, ...); the public verb adds the subject and the file once
with `located`. Facts are attributes, so that programs need not parse text. Nothing here imports
anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

__all__ = [
    "CallError",
    "CheckpointError",
    "ConfigError",
    "ConflictError",
    "DeclarationError",
    "DeviceError",
    "DtypeError",
    "FileError",
    "HeaderError",
    "IndexFileError",
    "KeywordError",
    "LadingError",
    "LayoutError",
    "MissingTensorError",
    "NotLoadedError",
    "PlanError",
    "PlanFileError",
    "RankError",
    "ShapeError",
    "SurplusTensorError",
    "VerifyError",
]

_Self = TypeVar("_Self", bound="LadingError")

MAX_PRINTED_PROBLEMS = 20
"""How many problems a PlanError prints; `.problems` and `--json` have all of them."""


class LadingError(Exception):
    """The base of all; carries the facts that the message is made from.

    fact      what is wrong, complete without its subject: "is bf16[4, 8], needs bf16[8, 8] (...)"
    subject   whose fault: a parameter's qualified name, a file, a config key; None until known
    part      the part of a fused parameter: 'q', 'k', 0; None when the parameter is not fused
    file      the file's name, None when no file is concerned
    hint      what to do, only where that is certain
    rank      the only rank that met the error, None where it is everyone's
    """

    def __init__(
        self,
        fact: str,
        *,
        subject: str | None = None,
        part: str | int | None = None,
        file: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(fact)
        self.fact = fact
        self.subject = subject
        self.part = part
        self.file = file
        self.hint = hint
        self.rank: int | None = None

    def __str__(self) -> str:
        head = self.subject or ""
        if self.part is not None:
            head += f"{', ' if head else ''}part {self.part!r}"
        text = f"{head}: {self.fact}" if head else self.fact
        if not text.endswith((".", "?")):
            text += "."
        if self.file is not None:
            text += f" In {self.file}."
        if self.rank is not None:
            text += f" On rank {self.rank}."
        if self.hint is not None:
            text += f" Try: {self.hint}"
            if not text.endswith((".", "?")):
                text += "."
        return text

    def located(
        self: _Self,
        *,
        subject: str | None = None,
        part: str | int | None = None,
        file: str | None = None,
    ) -> _Self:
        """The same error with what its raiser could not know; what is known already is kept."""
        self.subject = subject if self.subject is None else self.subject
        self.part = part if self.part is None else self.part
        self.file = file if self.file is None else self.file
        return self

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return {
            "error": type(self).__name__,
            "subject": self.subject,
            "part": self.part,
            "fact": self.fact,
            "file": self.file,
            "hint": self.hint,
            "rank": self.rank,
            "message": str(self),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors travel between ranks by pickle; keyword-only arguments need a rebuilder.
        return _rebuild, (type(self), self.args, dict(self.__dict__))


def _rebuild(cls: type[LadingError], args: tuple[Any, ...], state: dict[str, Any]) -> LadingError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class DeclarationError(LadingError):
    """A parameter, layer or config that cannot be."""


class LayoutError(DeclarationError, ValueError):
    """A cut that does not divide exactly."""


class ConfigError(DeclarationError):
    """config.json lacks a key, or a value is impossible."""


class CheckpointError(LadingError):
    """The checkpoint's fault."""


class FileError(CheckpointError):
    """A file cannot be opened or read."""


class HeaderError(CheckpointError):
    """A safetensors header is damaged or lies about the file."""


class IndexFileError(CheckpointError):
    """The index of a sharded checkpoint is damaged or names impossible files."""


class PlanFileError(CheckpointError):
    """A saved plan is damaged, or does not prove what it claims."""


class MissingTensorError(CheckpointError):
    """The checkpoint has nothing for a parameter or part."""


class SurplusTensorError(CheckpointError):
    """The checkpoint has a tensor that nothing uses and no rule skips."""


class ShapeError(CheckpointError, ValueError):
    """A tensor has another shape than its declaration needs."""


class DtypeError(CheckpointError, ValueError):
    """A tensor has a dtype whose conversion would lose values."""


class CallError(LadingError, ValueError):
    """A call that cannot be meant: shard id, offset, size, rank."""


class KeywordError(CallError, TypeError):
    """A keyword is misspelt or missing."""


class ConflictError(CallError):
    """The same elements were written before, with other bytes."""


class NotLoadedError(LadingError, RuntimeError):
    """Weights are used that were never, or only partly, written."""


class VerifyError(LadingError):
    """A loaded element differs from an independent read of the file."""


class DeviceError(LadingError, RuntimeError):
    """A GPU, its driver or its memory refused."""


class RankError(LadingError, RuntimeError):
    """Another rank failed for a reason outside lading."""


class PlanError(LadingError):
    """Every problem of a plan at once, the same on every rank; nothing was read or written.

    problems   all of them, in the order of parameters, then of checkpoint tensors
    """

    def __init__(self, problems: Iterable[LadingError], *, what: str = "the plan") -> None:
        self.problems: tuple[LadingError, ...] = tuple(problems)
        count = len(self.problems)
        super().__init__(f"{what} has {count} problem{'s' if count != 1 else ''}")
        self.what = what

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = [f"{self.fact}:"]
        lines += [f"  {problem}" for problem in self.problems[:MAX_PRINTED_PROBLEMS]]
        left = len(self.problems) - MAX_PRINTED_PROBLEMS
        if left > 0:
            lines.append(f"  ... and {left} more (`.problems` or --json has all)")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The facts of every problem as JSON values."""
        return {
            "error": type(self).__name__,
            "message": str(self),
            "problems": [problem.to_dict() for problem in self.problems],
        }
