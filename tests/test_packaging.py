"""What is installed: the native engine where there is a compiler, and a package without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the sources as they are developed"
)


def build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder / "base")]
    return subprocess.run(
        [*command, "--build-lib", str(folder / "lib")],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def compiler() -> str | None:
    found = (sysconfig.get_config_var("CC") or "cc").split()[0]
    return shutil.which(found) if Path(sysconfig.get_path("include"), "Python.h").exists() else None


LOADS = """
import sys
sys.path.insert(0, sys.argv[1])
import lading.transport.engine as engine
assert engine.__file__.startswith(sys.argv[1]), engine.__file__
import os, numpy as np
print(engine.native_engine() is not None)
with open(sys.argv[2], "rb") as stream:
    into = np.zeros(5000, dtype=np.uint8)
    jobs = np.array([[0, 7, into.ctypes.data, 5000, 1, 5000, 5000, 0]], dtype=np.int64)
    assert engine.Engine().run(jobs, [(stream.fileno(), -1)]) is None
assert into.tobytes() == (bytes(range(256)) * 40)[7:5007]
os.environ["LADING_ENGINE"] = "python"
assert engine.native_engine() is None
"""


def loaded(folder: Path, **variables: str) -> str:
    """Reads a file with the engine of an installed package; whether that was the native one."""
    data = folder / "data"
    data.write_bytes(bytes(range(256)) * 40)
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(folder / "lib"), str(data)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.mark.skipif(compiler() is None, reason="no C compiler")
def test_with_a_compiler(tmp_path: Path) -> None:
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    transport = tmp_path / "lib" / "lading" / "transport"
    names = {path.name for path in transport.iterdir()}
    assert "_engine.pyi" in names, "its types"
    assert any(name.startswith("_engine.") and name.endswith((".so", ".pyd")) for name in names)
    assert (tmp_path / "lib" / "lading" / "py.typed").exists()
    assert loaded(tmp_path, LADING_ENGINE="") == "True"


def test_without_a_compiler(tmp_path: Path) -> None:
    done = build(tmp_path, CC="/nowhere/cc", LDSHARED="/nowhere/cc")
    assert done.returncode == 0, done.stderr
    transport = tmp_path / "lib" / "lading" / "transport"
    assert not list(transport.glob("_engine*.so"))
    assert (transport / "engine.py").exists()
    assert loaded(tmp_path, LADING_ENGINE="") == "False"
