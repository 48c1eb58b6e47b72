"""`lading.json`, the manifest of a pre-sharded folder, as a value; and what follows from it.

A pre-sharded folder holds one safetensors file a rank, with that rank's parameters as the plan cuts
them, byte for byte as the checkpoint stored them, and what is needed for the way back:

    lading.json                               the manifest
    model-rank-00000-of-0000T.safetensors     rank 0's parameters, in model order; ... T files
    model-rest.safetensors                    checkpoint tensors that no rank keeps: skipped ones,
                                              constants, tied twins; absent where there are none
    config.json, tokenizer.json, ...          the checkpoint's other files

    "format": "lading.shards", "version": 2, "tp_size": T
    "id"        sha256 of the checkpoint's contents; each file of the folder carries it, so that
                files of another run are told apart
    "plan"      lading.plan_json, of all T ranks, in stored dtypes
    "came_as"   "safetensors", or "torch": then `files` are what merge makes, not what was there.
                Since version 2
    "files"     [{"name", "bytes", "header"}] of the original files, in order; the header is the
                JSON text between a file's length and its data, spaces included
    "index"     {"name", "text"} of the original index, or null
    "others"    [{"name", "bytes", "sha256"}]
    "digests"   {checkpoint tensor: its digest (lading.digests)}
    "ranks"     {checkpoint tensor: [the digest of what rank 0 holds of it, ... T of them]}, where
                some rank holds less than all; {} where none was taken. Since version 2: a manifest
                of version 1 is read as one with {}
    "shards"    [{"file", "bytes"}], one a rank
    "rest"      {"file", "bytes"}, or null

A manifest is read as a stranger's: every value is checked, the plan is proved again, and no name in
it chooses a file outside of the folder. Every fault is a PlanFileError that says where. No torch.

Letters: T = tp_size, r = tp_rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from lading.checkpoint import Header, Source, header_length, parse_header, source_of
from lading.checkpoint.header import PREFIX_BYTES
from lading.errors import HeaderError, PlanFileError
from lading.json_values import (
    fail,
    read_int,
    read_items,
    read_list,
    read_mapping,
    read_object,
    read_text,
    short,
)
from lading.plan import Plan
from lading.plan_json import plan_from_json, plan_to_json
from lading.ranks import all_ranks
from lading.shards.files import (
    MANIFEST,
    REST,
    data_bytes_of_rank,
    header_of_rank,
    header_of_rest,
    rank_file,
    rest_of,
)

__all__ = [
    "MAX_MANIFEST_BYTES",
    "Manifest",
    "OriginalFile",
    "OriginalIndex",
    "OtherFile",
    "manifest_from_json",
    "manifest_to_json",
    "sources_of",
]

FORMAT = "lading.shards"
VERSION = 2
_KEYS = {1: "", 2: " ranks came_as"}
"""What a manifest of each version has beyond the first's."""

MAX_MANIFEST_BYTES = 4 * 2**30
"""A manifest has the copies of all ranks: some 150 bytes for each parameter and rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginalFile:
    """One of the files that the checkpoint came in.

    name        relative to the folder, with forward slashes
    num_bytes   of the whole file
    header      its header's JSON text, with the spaces that pad it
    """

    name: str
    num_bytes: int
    header: str

    @staticmethod
    def of_head(name: str, num_bytes: int, head: bytes) -> OriginalFile:
        """The file that begins with these bytes: the header's length, and the header."""
        return OriginalFile(name=name, num_bytes=num_bytes, header=head[PREFIX_BYTES:].decode())

    @property
    def head(self) -> bytes:
        """The first bytes of the file: the header's length, and the header."""
        raw = self.header.encode()
        return len(raw).to_bytes(PREFIX_BYTES, "little") + raw

    def parsed(self) -> Header:
        """The checked header. Raises a HeaderError."""
        return parse_header(self.head[PREFIX_BYTES:], self.num_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginalIndex:
    """The checkpoint's index file, word for word."""

    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherFile:
    """A file that is no weights: config.json, tokenizer.json, ..."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that a pre-sharded folder says of itself. `manifest_from_json` makes checked ones.

    plan      from the original checkpoint's tensors to all ranks, each parameter in stored dtype
    files     the original files
    index     the original index, None where one file was all
    others    what came along
    digests   by checkpoint tensor
    ranks     by checkpoint tensor: the digest of what each rank holds (`held.rank_digests`)
    came_as   "safetensors" or "torch"
    sources   the original checkpoint's tensors by name: follows from `files`
    """

    plan: Plan
    files: tuple[OriginalFile, ...]
    index: OriginalIndex | None
    others: tuple[OtherFile, ...]
    digests: Mapping[str, str]
    ranks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    came_as: str = "safetensors"
    sources: Mapping[str, Source] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", sources_of(self.files))

    @property
    def tp_size(self) -> int:
        """T."""
        return self.plan.tp_size

    @property
    def id(self) -> str:
        """A sha256 of what the checkpoint holds; the same for every tp_size."""
        facts = [
            [(file.name, file.num_bytes, file.header) for file in self.files],
            None if self.index is None else (self.index.name, self.index.text),
            sorted((other.name, other.num_bytes, other.sha256) for other in self.others),
            sorted(self.digests.items()),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def sources_of(files: Sequence[OriginalFile]) -> dict[str, Source]:
    """The tensors of the original files, in the order of files and bytes. Raises a HeaderError."""
    return {
        name: source_of(name, info, file.name)
        for file in files
        for name, info in file.parsed().tensors.items()
    }


# --------------------------------------------------------------------------------------------- JSON


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as JSON values; `manifest_from_json` gives an equal one back."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "tp_size": manifest.tp_size,
        "id": manifest.id,
        "came_as": manifest.came_as,
        "files": [
            {"name": f.name, "bytes": f.num_bytes, "header": f.header} for f in manifest.files
        ],
        "index": None
        if manifest.index is None
        else {"name": manifest.index.name, "text": manifest.index.text},
        "others": [
            {"name": o.name, "bytes": o.num_bytes, "sha256": o.sha256} for o in manifest.others
        ],
        "digests": dict(manifest.digests),
        "ranks": {name: list(digests) for name, digests in manifest.ranks.items()},
        "shards": _shards(manifest.plan),
        "rest": _rest(manifest.plan, manifest.sources),
        "plan": plan_to_json(manifest.plan),
    }


def _shards(plan: Plan) -> list[dict[str, Any]]:
    size = len(header_of_rank(plan, 0)) + data_bytes_of_rank(plan)
    return [{"file": rank_file(r, plan.tp_size), "bytes": size} for r in range(plan.tp_size)]


def _rest(plan: Plan, sources: Mapping[str, Source]) -> dict[str, Any] | None:
    rest = rest_of(plan, sources)
    if not rest:
        return None
    return {"file": REST, "bytes": len(header_of_rest(rest)) + sum(s.num_bytes for s in rest)}


def manifest_from_json(value: object) -> Manifest:
    """The manifest that a JSON value describes, with its plan proved again.

    Raises a PlanFileError: for a value that is no manifest or of another version, a key that is
    missing or unknown, a name that leaves the folder, a header that lies about its file, a plan
    that is not proved or is not of these files, a digest that is missing, contents of which `id` is
    not the sha256.
    """
    version = value.get("version") if isinstance(value, dict) else None
    more = _KEYS.get(version, _KEYS[VERSION]) if type(version) is int else _KEYS[VERSION]
    facts = read_object(
        value,
        "manifest",
        "format version tp_size id plan files index others digests shards rest" + more,
    )
    if facts["format"] != FORMAT:
        fail("format", f"is {short(facts['format'])}, needs {FORMAT!r}")
    if type(version) is not int or version not in _KEYS:
        fail("version", f"is {short(version)}, needs {' or '.join(map(str, _KEYS))}")
    if facts.get("came_as", "torch") not in ("safetensors", "torch"):
        fail("came_as", f"is {short(facts['came_as'])}, needs 'safetensors' or 'torch'")
    files = tuple(read_list(facts["files"], "files", _original))
    index = None if facts["index"] is None else _index(facts["index"], "index")
    others = tuple(read_list(facts["others"], "others", _other))
    _check_names(files, index, others)
    plan = _plan(facts["plan"], facts["tp_size"])
    sources = _sources(files)
    _check_plan(plan, sources)
    digests = _digests(facts["digests"], sources)
    manifest = Manifest(
        plan=plan,
        files=files,
        index=index,
        others=others,
        digests=digests,
        ranks=_ranks(facts.get("ranks", {}), plan),
        came_as=facts.get("came_as", "safetensors"),
    )
    _check_written(facts["shards"], "shards", _shards(plan))
    _check_written(facts["rest"], "rest", _rest(plan, sources))
    if read_text(facts["id"], "id") != manifest.id:
        fail(
            "id",
            f"is {short(facts['id'])}, needs {manifest.id!r} (the sha256 of files, index, others "
            "and digests; one of these was edited)",
        )
    return manifest


def _original(value: object, at: str) -> OriginalFile:
    facts = read_object(value, at, "name bytes header")
    name = _inside(facts["name"], f"{at}.name")
    if not name.endswith(".safetensors"):
        fail(f"{at}.name", f"is {short(name)}, needs the name of a .safetensors file")
    return OriginalFile(
        name=name,
        num_bytes=read_int(facts["bytes"], f"{at}.bytes"),
        header=_unicode(facts["header"], f"{at}.header"),
    )


def _index(value: object, at: str) -> OriginalIndex:
    facts = read_object(value, at, "name text")
    name = _plain(facts["name"], f"{at}.name")
    if not name.endswith(".safetensors.index.json"):
        fail(f"{at}.name", f"is {short(name)}, needs to end in .safetensors.index.json")
    return OriginalIndex(name=name, text=_unicode(facts["text"], f"{at}.text"))


def _other(value: object, at: str) -> OtherFile:
    facts = read_object(value, at, "name bytes sha256")
    name = _plain(facts["name"], f"{at}.name")
    if name == MANIFEST or name.endswith((".safetensors", ".safetensors.index.json")):
        fail(f"{at}.name", f"is {short(name)}, needs a file that is no weights and no manifest")
    return OtherFile(
        name=name,
        num_bytes=read_int(facts["bytes"], f"{at}.bytes"),
        sha256=_hex(facts["sha256"], f"{at}.sha256"),
    )


def _inside(value: object, at: str) -> str:
    """A name inside the folder, with forward slashes."""
    name = _unicode(value, at)
    steps = name.split("/")
    if {"", ".", ".."} & set(steps) or "\\" in name or ":" in steps[0] or "\0" in name:
        fail(at, f"is {short(name)}, needs a file inside the folder")
    return name


def _plain(value: object, at: str) -> str:
    """A name in the folder itself."""
    name = _inside(value, at)
    if "/" in name:
        fail(at, f"is {short(name)}, needs a file in the folder itself")
    return name


def _unicode(value: object, at: str) -> str:
    text = read_text(value, at)
    if any("\ud800" <= char <= "\udfff" for char in text):
        fail(at, f"is {short(text)}, needs Unicode (it has half of a surrogate pair)")
    return text


def _hex(value: object, at: str) -> str:
    text = read_text(value, at)
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        fail(at, f"is {short(text)}, needs 64 hexadecimal digits")
    return text


def _check_names(
    files: Sequence[OriginalFile], index: OriginalIndex | None, others: Sequence[OtherFile]
) -> None:
    named = [(f"files[{i}].name", file.name) for i, file in enumerate(files)]
    named += [] if index is None else [("index.name", index.name)]
    named += [(f"others[{i}].name", other.name) for i, other in enumerate(others)]
    seen: dict[str, str] = {}
    for at, name in named:
        if name in seen:
            fail(at, f"is {short(name)}, needs a name of its own (it is that of {seen[name]})")
        seen[name] = at


def _plan(value: object, tp_size: object) -> Plan:
    try:
        plan = plan_from_json(value)
    except PlanFileError as error:
        error.subject = f"plan.{error.subject}" if error.subject != "plan" else "plan"
        raise
    size = read_int(tp_size, "tp_size", at_least=1)
    if plan.tp_size != size:
        fail("tp_size", f"is {size}, needs {plan.tp_size} (the plan's)")
    if tuple(share.ranks for share in plan.shares) != all_ranks(size):
        fail("plan.ranks", f"are not those of tp_size {size}, needs all {size}, in order")
    return plan


def _sources(files: Sequence[OriginalFile]) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for i, file in enumerate(files):
        try:
            if header_length(file.head[:PREFIX_BYTES], file.num_bytes) + PREFIX_BYTES != len(
                file.head
            ):
                raise HeaderError("is of another length than it says", subject="header")
            tensors = file.parsed().tensors
        except HeaderError as error:
            fail(f"files[{i}].header", f"cannot be: {error}")
        for name, info in tensors.items():
            if name in found:
                fail(f"files[{i}].header", f"has {name!r}, which {found[name].file} has, too")
            found[name] = source_of(name, info, file.name)
    return found


def _check_plan(plan: Plan, sources: Mapping[str, Source]) -> None:
    """The plan is of these files, leaves nothing of them unexplained, and casts nothing."""
    for name, source in plan.sources.items():
        if sources.get(name) != source:
            found = "no file has such a tensor" if name not in sources else "the file's differs"
            fail(f"plan.sources[{name!r}]", f"{found}, needs the tensor that `files` describes")
    explained = {*plan.sources, *(skipped.source for skipped in plan.skipped)}
    for name in sources:
        if name not in explained:
            fail("plan", f"says nothing of {name!r}, which `files` describes")
    for name in explained - sources.keys():
        fail("plan.skipped", f"names {short(name)}, which no file has")
    for target, stored, dtype in plan.casts():
        if plan.target(target).expected is None:
            fail(f"plan.targets[{target!r}].dtype", f"is {dtype}, needs {stored} (as it is stored)")


def _digests(value: object, sources: Mapping[str, Source]) -> dict[str, str]:
    digests = {
        name: _hex(text, f"digests[{name!r}]")
        for name, text in read_mapping(value, "digests").items()
    }
    for name in sources:
        if name not in digests:
            fail("digests", f"has none of {name!r}, needs one for each checkpoint tensor")
    for name in digests:
        if name not in sources:
            fail(f"digests[{short(name)}]", "is of a tensor that no file has")
    return digests


def _ranks(value: object, plan: Plan) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name, digests in read_mapping(value, "ranks").items():
        at = f"ranks[{short(name)}]"
        if name not in plan.sources:
            fail(at, "is of a tensor that the plan does not know")
        found[name] = tuple(read_list(digests, at, _hex))
        if len(found[name]) != plan.tp_size:
            fail(at, f"has {len(found[name])} digests, needs {plan.tp_size} (one a rank)")
    return found


def _check_written(value: object, at: str, needed: Any) -> None:
    """What follows from the plan is in the file for those who read no plan; it has to agree."""
    if isinstance(needed, list):
        found = read_items(value, at)
        if len(found) != len(needed):
            fail(at, f"has {len(found)} entries, needs {len(needed)} (one a rank)")
        for i, (one, other) in enumerate(zip(found, needed, strict=True)):
            _check_written(one, f"{at}[{i}]", other)
        return
    if needed is None or value is None:
        if value is not needed:
            fail(at, f"is {short(value)}, needs {short(needed)}")
        return
    facts = read_object(value, at, "file bytes")
    for key, wanted in needed.items():
        if type(facts[key]) is not type(wanted) or facts[key] != wanted:
            _fail_derived(f"{at}.{key}", facts[key], wanted)


def _fail_derived(at: str, found: object, needed: object) -> NoReturn:
    fail(at, f"is {short(found)}, needs {needed!r} (it follows from the plan)")
