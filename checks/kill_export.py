"""Exports killed at random points: `python checks/kill_export.py [DIR] --times 200 --tp 2`.

After each SIGKILL of one rank, or of all, the destination is what it was or the complete new
checkpoint, byte for byte, the source is untouched, and a rerun succeeds and leaves nothing behind.
Without DIR a small checkpoint is made with transformers. The tests run a few rounds of the same
(tests/exports/killed.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Runs the rounds; the exit status says whether every guarantee was kept."""
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    from tests.exports import killed

    if len(sys.argv) < 2 or not Path(sys.argv[1]).exists():
        from tests.end_to_end.checkpoints import checkpoint

        sys.argv.insert(1, str(checkpoint("llama", files=3)))
    if "--times" not in sys.argv:
        sys.argv += ["--times", "200"]
    killed.main()


if __name__ == "__main__":
    main()
