"""What the design forbids, read from the sources: imports upwards, acts outside of their place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SRC = TESTS.parent / "src" / "lading"

ROOMS = (
    # values, arithmetic and plans: no torch
    *("errors", "collecting", "records", "dtypes", "regions", "views", "digests"),
    *("ranks", "layouts", "specs", "layers", "names"),
    *("checkpoint", "proof", "binding", "plan", "routes", "messages", "json_values", "plan_json"),
    "shards",
    # parameters, layers, the verbs
    *("writing", "owners", "ledger", "parameter", "schemes", "nn", "transport"),
    *("models", "preflight", "explaining", "explaining_bytes", "gguf"),
    *("verdicts", "targeting", "placing", "loading", "pretrained", "decoding"),
    *("exports", "digesting", "resharding", "sharding", "update", "engines"),
    # processes, checks, eyes
    *("progress", "launch", "verify", "benching", "report", "draw", "demo"),
    *("cli", "__main__"),
)
"""From the top down: a file imports only from rooms above its own, and from its own."""

WITHOUT_TORCH = [
    "errors",
    "records",
    "dtypes",
    "regions",
    "views",
    "digests.rows",
    "digests.sums",
    "ranks",
    "layouts",
    "specs",
    "layers",
    "names",
    "checkpoint",
    "checkpoint.header",
    "proof",
    "plan",
    "routes",
    "messages",
    "json_values",
    "plan_json",
    "shards.manifest",
    "shards.bands",
    "shards.folder",
    "shards.held",
    "digesting.report",
    "digesting.files",
    "digesting.verb",
    "models",
    "preflight",
    "explaining",
    "explaining_bytes",
    "report",
    "schemes",
    "sharding.verbs",
]

UNTESTED = {
    "placing": "by those of loading, of which it is a part",
    "targeting": "by those of loading, of which it is a part",
    "verdicts": "by those of loading and of the faults of real ranks",
    "binding": "by those of plan, of which it is a part",
    "resharding.carrying": "by those of resharding.verb, of which it is a part",
    "cli.running": "by those of the CLI, whose commands share it",
    "sharding.moving": "by those of sharding.verbs, whose verbs it runs",
    "shards.files": "by those of shards.manifest and .folder",
    "shards.plans": "by those of sharding.verbs, whose verbs use it",
    "shards.reader": "by those of shards.folder, which gives it out",
    "sharding.writing": "by those of sharding.verbs, whose verbs use it",
    "__main__": "one line, run by the tests of the CLI",
    "checkpoint.sources": "values and readers, by those of checkpoint.index and .files",
    "models.building": "by those of models.decoder",
    "models.families": "data, by those of models.config",
    "models.reading": "by those of models.config, error by error",
    "models.rope_config": "by those of models.rope and .config",
    "digests.rows": "by those of digests.sums, of which it is a part",
    "digesting.report": "by those of digesting.files and .models, which make reports",
    "report.digests": "by those of digesting, whose commands print it",
    "report.benches": "by those of bench, whose values it prints",
    "report.blocks": "by those of report, of which it is a part",
    "report.explained": "by those of cli.back, which prints it",
    "report.exports": "by those of exporting, which run the command",
    "report.files": "by those of report, of which it is a part",
    "report.folding": "by those of report, of which it is a part",
    "report.loads": "by those of report, of which it is a part",
    "report.plans": "by those of report, of which it is a part",
}
"""Files of src without a test file of their own name, and why. `__init__` files need none."""


@dataclass(frozen=True)
class File:
    """A source file: its dotted name below `lading`, and its syntax tree."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]


def read(path: Path) -> File:
    name = ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")
    return File(name, path, ast.parse(path.read_text(encoding="utf-8")))


FILES = [read(path) for path in sorted(SRC.rglob("*.py"))]
ROOM_FILES = [file for file in FILES if file.name != "__init__"]


def imports(file: File) -> Iterator[tuple[int, str]]:
    """The line and the full name of whatever a file imports, wherever it does so."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.name}:{node.lineno} imports by a relative name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`os.open` for the node that says it, and `.open` where what is before the dot is no name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def calls(file: File) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call):
            yield node, dotted(node.func)


def test_every_file_is_in_a_room() -> None:
    assert {file.room for file in ROOM_FILES} <= set(ROOMS)
    assert len(set(ROOMS)) == len(ROOMS)


@pytest.mark.parametrize("file", ROOM_FILES, ids=lambda file: file.name)
def test_imports_from_rooms_above(file: File) -> None:
    above = {*ROOMS[: ROOMS.index(file.room) + 1], "__version__"}
    wrong = [
        f"{file.path.name}:{line} imports {name}"
        for line, name in imports(file)
        if name.split(".")[0] == "lading" and name.split(".")[1] not in above
    ]
    assert wrong == []


@dataclass(frozen=True)
class Forbidden:
    """What may be done in these files only."""

    id: str
    places: tuple[str, ...]
    found: Callable[[File], Iterator[int]]


def called(*names: str) -> Callable[[File], Iterator[int]]:
    """Calls of these functions; a name that starts with a dot is a method of anything."""

    def find(file: File) -> Iterator[int]:
        for call, name in calls(file):
            if call.args and dotted(call.args[0]) == "os.devnull":
                continue  # no file: where a closed pipe's output goes
            if any(name.endswith(n) if n.startswith(".") else name == n for n in names):
                yield call.lineno

    return find


def imported(*names: str) -> Callable[[File], Iterator[int]]:
    """Imports of these modules when the program runs: annotations may name their types."""

    def find(file: File) -> Iterator[int]:
        checked = {
            inner
            for node in ast.walk(file.tree)
            if isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING"
            for inner in range(node.lineno, (node.body[-1].end_lineno or node.lineno) + 1)
        }
        for line, name in imports(file):
            if line not in checked and any(name == n or name.startswith(f"{n}.") for n in names):
                yield line
        # `import torch` gives all of torch's modules that somebody else has imported.
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Attribute) and dotted(node) in names:
                yield node.lineno

    return find


def asserts_without_a_sentence(file: File) -> Iterator[int]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Assert) and node.msg is None:
            yield node.lineno


def getattr_with_default(file: File) -> Iterator[int]:
    for call, name in calls(file):
        if name == "getattr" and len(call.args) > 2:
            yield call.lineno


def attribute(*names: str) -> Callable[[File], Iterator[int]]:
    """Attributes of these names, of anything."""

    def find(file: File) -> Iterator[int]:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Attribute) and node.attr in names:
                yield node.lineno

    return find


FORBIDDEN = [
    Forbidden(
        "opening files",
        ("checkpoint.files", "checkpoint.writers", "checkpoint.torch_files"),
        called(
            "open",
            "os.open",
            "io.open",
            ".open",
            ".read_text",
            ".read_bytes",
            ".write_text",
            ".write_bytes",
            "mmap.mmap",
            "torch.from_file",
            "np.memmap",
            "numpy.memmap",
        ),
    ),
    # verify reads the files by other means than lading's own; demo makes a checkpoint for others.
    Forbidden(
        "torch's files",
        ("checkpoint.files", "checkpoint.torch_files", "verify"),
        called("torch.load"),
    ),
    Forbidden(
        "the safetensors library", ("verify", "demo", "benching.peers"), imported("safetensors")
    ),
    # torch_files fills the buffer that a reader was given: bytes, whosever they are.
    Forbidden(
        "writing into tensors",
        ("writing", "checkpoint.torch_files"),
        called(".copy_", ".fill_", ".zero_", ".set_"),
    ),
    Forbidden(
        "addresses of tensors",
        ("writing", "ledger", "checkpoint.torch_files"),
        attribute("data_ptr", "untyped_storage"),
    ),
    # What is written to by its address: a plan's targets, buffers, and memory for measuring.
    Forbidden(
        "addresses of arrays",
        ("transport.engine", "transport.python_engine", "benching.ceilings"),
        attribute("ctypes"),
    ),
    Forbidden(
        "the C library, the driver",
        (
            *("transport.python_engine", "transport.cuda", "transport.residency"),
            *("checkpoint.output", "benching.ceilings"),
        ),
        imported("ctypes"),
    ),
    Forbidden("torch.distributed", ("ranks",), imported("torch.distributed")),
    Forbidden("printing", ("cli.running", "report"), called("print", "sys.stdout.write")),
    Forbidden("assert without a sentence", (), asserts_without_a_sentence),
    Forbidden("hasattr", (), called("hasattr")),
    Forbidden("getattr with a default", (), getattr_with_default),
]


@pytest.mark.parametrize("case", FORBIDDEN, ids=lambda case: case.id)
def test_done_in_its_place_only(case: Forbidden) -> None:
    wrong = [
        f"{file.name}:{line}"
        for file in FILES
        if file.name not in case.places
        for line in case.found(file)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("case", "source"),
    [
        ("opening files", "with open(path) as f: pass"),
        ("opening files", "import os\nos.open(path, 0)"),
        ("opening files", "Path(a).open()"),
        ("opening files", "(a / b).read_text()"),
        ("torch's files", "torch.load(path)"),
        ("the safetensors library", "from safetensors import safe_open"),
        ("writing into tensors", "param.data[2:].copy_(x)"),
        ("writing into tensors", "f(x).zero_()"),
        ("addresses of tensors", "x.data_ptr()"),
        ("addresses of arrays", "x.ctypes.data"),
        ("the C library, the driver", "def f():\n    import ctypes"),
        ("torch.distributed", "import torch.distributed as dist"),
        ("torch.distributed", "def f():\n    from torch import distributed"),
        ("torch.distributed", "import torch\ntorch.distributed.barrier()"),
        ("torch.distributed", "if TYPE_CHECKING:\n    x\nelse:\n    import torch.distributed"),
        ("printing", "print(1)"),
        ("assert without a sentence", "assert x"),
        ("hasattr", "hasattr(x, 'y')"),
        ("getattr with a default", "getattr(x, 'y', None)"),
    ],
)
def test_what_is_forbidden_is_seen(case: str, source: str) -> None:
    (rule,) = (rule for rule in FORBIDDEN if rule.id == case)
    assert list(rule.found(File("x", SRC, ast.parse(source))))


@pytest.mark.parametrize(
    "source",
    [
        "assert x, 'why'",
        "getattr(x, 'y')",
        "reader.opened()",
        "copy.copy(x)",
        "import torch",
        "if TYPE_CHECKING:\n    from torch.distributed import ProcessGroup",
        "os.open(os.devnull, os.O_WRONLY)",
    ],
)
def test_what_is_allowed_is_not(source: str) -> None:
    assert [r.id for r in FORBIDDEN if list(r.found(File("x", SRC, ast.parse(source))))] == []


BLOCKED = """
import sys
sys.modules["torch"] = None  # importing it raises
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    __import__("lading." + name)
"""


def test_plans_need_no_torch() -> None:
    names = [n for n in WITHOUT_TORCH if any(file.name == n for file in FILES)]
    command = [sys.executable, "-c", BLOCKED, str(SRC.parent), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def own_tests(file: File) -> list[Path]:
    """src/lading/x.py: tests/test_x.py. src/lading/x/y.py: tests/x/test_y.py, or a test of x.

    A test of x is tests/test_x.py or a file in tests/x, and it has to import x.y by that name.
    """
    *folders, leaf = file.name.split(".")
    found = [TESTS.joinpath(*folders, f"test_{leaf}.py")]
    if folders:
        others = [TESTS / f"test_{folders[0]}.py", *(TESTS / folders[0]).glob("test_*.py")]
        found += [o for o in others if o.exists() and f"lading.{file.name} " in o.read_text()]
    return [path for path in found if path.exists()]


def test_every_file_has_tests() -> None:
    asked = [file for file in ROOM_FILES if file.path.name != "__init__.py"]
    assert [f.name for f in asked if f.name not in UNTESTED and not own_tests(f)] == []
    assert set(UNTESTED) <= {file.name for file in asked}, "exceptions for files that are gone"
