"""Eyes: plans, checkpoints, loads and checks as text for people and as JSON values for programs.

Values in, values out: nothing here opens a file, asks for a rank or needs torch. A report is a
tuple of blocks (lines, tables, sections); `render` makes text of it with rich, for a width and with
colour or without. Numbers of bytes print as GB = 10^9 bytes, three figures.

Rows fold (`model.layers.{0..31}.mlp.down_proj.weight`, 32 layers) only where the layers are
contiguous and every printed column is equal up to the layer's number.
"""

from lading.report.benches import bench_json, bench_report
from lading.report.blocks import (
    Block,
    Indented,
    Line,
    Look,
    Section,
    Sections,
    Table,
    indented,
    look_of,
    render,
    spell_bytes,
)
from lading.report.digests import (
    differences_report,
    digest_checks_json,
    digest_checks_report,
    digest_report,
    digest_summary,
)
from lading.report.explained import explain_json, explain_report
from lading.report.exports import export_json, export_report
from lading.report.files import inspect_json, inspect_report
from lading.report.folding import fold
from lading.report.loads import checks_json, checks_report, load_json, load_report, speed
from lading.report.plans import (
    notes,
    overview,
    plan_json,
    plan_report,
    proof,
    proof_block,
    proof_lines,
    where,
)

__all__ = [
    "Block",
    "Indented",
    "Line",
    "Look",
    "Section",
    "Sections",
    "Table",
    "bench_json",
    "bench_report",
    "checks_json",
    "checks_report",
    "differences_report",
    "digest_checks_json",
    "digest_checks_report",
    "digest_report",
    "digest_summary",
    "explain_json",
    "explain_report",
    "export_json",
    "export_report",
    "fold",
    "indented",
    "inspect_json",
    "inspect_report",
    "load_json",
    "load_report",
    "look_of",
    "notes",
    "overview",
    "plan_json",
    "plan_report",
    "proof",
    "proof_block",
    "proof_lines",
    "render",
    "speed",
    "spell_bytes",
    "where",
]
