"""The manifest: back and forth, and each edit of it refused with where it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lading.errors import PlanFileError
from lading.sharding.verbs import shard
from lading.shards.files import parameters_of, rank_file, rest_of
from lading.shards.manifest import Manifest, manifest_from_json, manifest_to_json
from tests.sharding.made import made


@pytest.fixture(scope="module")
def value(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A manifest's JSON."""
    base = tmp_path_factory.mktemp("manifest")
    shard(made(base / "source"), tp_size=2, out=base / "tp2")
    read: dict[str, Any] = json.loads((base / "tp2" / "lading.json").read_text())
    return read


def test_back_and_forth(value: dict[str, Any]) -> None:
    manifest = manifest_from_json(value)
    assert manifest_to_json(manifest) == value
    assert manifest.tp_size == 2
    assert [share.ranks.tp_rank for share in manifest.plan.shares] == [0, 1]
    assert manifest.index is not None
    assert json.loads(manifest.index.text)["weight_map"].keys() == manifest.sources.keys()
    assert {other.name for other in manifest.others} == {
        "README.md",
        "config.json",
        "tokenizer.json",
    }


def test_the_first_version(value: dict[str, Any]) -> None:
    older = {key: kept for key, kept in value.items() if key not in ("ranks", "came_as")}
    older["version"] = 1
    assert manifest_to_json(manifest_from_json(older)) == value | {"ranks": {}}


def test_the_identity_does_not_depend_on_the_ranks(value: dict[str, Any], tmp_path: Path) -> None:
    shard(made(tmp_path / "source"), tp_size=4, out=tmp_path / "tp4")
    other = json.loads((tmp_path / "tp4" / "lading.json").read_text())
    assert other["id"] == value["id"]
    shard(made(tmp_path / "2", rms_norm_eps=1e-6), tp_size=2, out=tmp_path / "tp2")
    assert json.loads((tmp_path / "tp2" / "lading.json").read_text())["id"] != value["id"]


def test_names_of_files() -> None:
    assert rank_file(1, 4) == "model-rank-00001-of-00004.safetensors"


def test_every_tensor_begins_at_a_multiple_of_its_element(value: dict[str, Any]) -> None:
    manifest = manifest_from_json(value)
    order = [target.name for target in parameters_of(manifest.plan)]
    assert order == [target.name for target in manifest.plan.targets]  # sizes are multiples of 8
    assert rest_of(manifest.plan, manifest.sources) == ()


Edit = Callable[[dict[str, Any]], Any]


def put(*path: Any) -> Edit:
    """Sets the last of `path` at the place that the others lead to."""

    def edit(tree: dict[str, Any]) -> None:
        at: Any = tree
        for key in path[:-2]:
            at = at[key]
        at[path[-2]] = path[-1]

    return edit


def header(old: str, new: str) -> Edit:
    """Another text in the first header."""

    def edit(tree: dict[str, Any]) -> None:
        text = tree["files"][0]["header"]
        assert old in text
        tree["files"][0]["header"] = text.replace(old, new, 1)

    return edit


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "subject", "text"),
    [
        (put("format", "lading.plan"), "format", "is 'lading.plan', needs 'lading.shards'"),
        (put("version", 3), "version", "is 3, needs 1 or 2"),
        (put("version", True), "version", "is True, needs 1 or 2"),
        (put("version", []), "version", "is [], needs 1 or 2"),
        (put("version", 1), "manifest", "has the key 'came_as', needs no others than"),
        (put("came_as", "gguf"), "came_as", "is 'gguf', needs 'safetensors' or 'torch'"),
        (put("came_as", []), "came_as", "is [], needs 'safetensors' or 'torch'"),
        (lambda tree: tree.pop("ranks"), "manifest", "has no key 'ranks'"),
        (put("ranks", []), "ranks", "needs an object"),
        (put("ranks", "x", []), "ranks['x']", "is of a tensor that the plan does not know"),
        (put("ranks", NORM, ["0" * 64]), f"ranks['{NORM}']", "has 1 digests, needs 2 (one a rank)"),
        (put("ranks", NORM, [1, 2]), f"ranks['{NORM}'][0]", "is 1, needs a string"),
        (put("tp_size", 4), "tp_size", "is 4, needs 2 (the plan's)"),
        (put("tp_size", "2"), "tp_size", "is '2', needs an int from 1"),
        (put("id", "0" * 64), "id", "is '0000"),
        (put("id", 5), "id", "is 5, needs a string"),
        (put("more", 1), "manifest", "has the key 'more', needs no others than"),
        (lambda tree: tree.pop("plan"), "manifest", "has no key 'plan'"),
        (put("files", {}), "files", "is {}, needs a list"),
        (put("files", []), "plan.sources['model.embed_tokens.weight']", "no file has such a"),
        (put("files", 0, "name", "../a.safetensors"), "files[0].name", "is '../a.safetensors', n"),
        (put("files", 0, "name", "/a.safetensors"), "files[0].name", "is '/a.safetensors', needs"),
        (put("files", 0, "name", "C:/a.safetensors"), "files[0].name", "is 'C:/a.safetensors'"),
        (put("files", 0, "name", "a\\b.safetensors"), "files[0].name", "is 'a\\\\b.safetensors'"),
        (put("files", 0, "name", "a.bin"), "files[0].name", "is 'a.bin', needs the name of a"),
        (put("files", 0, "name", "\ud800.safetensors"), "files[0].name", "half of a surrogate"),
        (put("files", 0, "bytes", -1), "files[0].bytes", "is -1, needs an int"),
        (put("files", 0, "bytes", 10**6), "files[0].header", "cannot be: header: its tensors end"),
        (put("files", 0, "header", "{}"), "files[0].header", "cannot be: header: its tensors en"),
        (put("files", 0, "header", None), "files[0].header", "is None, needs a string"),
        (header('"BF16"', '"F16" '), "plan.sources['model.embed_tokens.weight']", "the file's"),
        (header("model.embed", "model.embec"), "plan.sources[", "no file has such a tensor"),
        (put("index", "name", "../index"), "index.name", "is '../index', needs a file inside"),
        (put("index", "text", "{}"), "id", "one of these was edited"),
        (put("index", "name", "index.json"), "index.name", "needs to end in .safetensors.index"),
        (put("index", []), "index", "is [], needs an object"),
        (put("others", 0, "name", "a/b"), "others[0].name", "needs a file in the folder itself"),
        (put("others", 0, "name", ".."), "others[0].name", "is '..', needs a file inside"),
        (put("others", 0, "name", "lading.json"), "others[0].name", "no weights and no manifest"),
        (put("others", 0, "name", "x.safetensors"), "others[0].name", "no weights and no manifest"),
        (put("others", 0, "sha256", "F" * 64), "others[0].sha256", "needs 64 hexadecimal digits"),
        (
            put("digests", NORM, "0" * 64),
            "id",
            "(the sha256 of files, index, others and digests; o",
        ),
        (put("digests", NORM, 3), f"digests['{NORM}']", "is 3, needs a string"),
        (put("digests", "x", "0" * 64), "digests['x']", "is of a tensor that no file has"),
        (lambda t: t["digests"].pop(NORM), "digests", f"has none of {NORM!r}, needs one for each"),
        (put("shards", []), "shards", "has 0 entries, needs 2 (one a rank)"),
        (put("shards", 1, "file", "../x"), "shards[1].file", "is '../x', needs 'model-rank-00001"),
        (put("shards", 1, "bytes", 5), "shards[1].bytes", "it follows from the plan"),
        (put("rest", {"file": "x", "bytes": 1}), "rest", "needs None"),
        (put("plan", "tp_size", 3), "plan.", "needs"),
        (put("plan", "version", 9), "plan.version", "is 9, needs 1"),
        (
            put("plan", "targets", 0, "dtype", "F32"),
            "plan.targets['model.embed_tokens.weight'].dtype",
            "is F32, needs BF16 (as it is stored)",
        ),
        (put("plan", "sources", NORM, "file", "../x"), f"plan.sources['{NORM}'].file", "is '../x'"),
        (
            put("plan", "shares", 0, "copies", 0, "from", [[0, 999], [0, 24]]),
            "plan.shares[0].copies[0].from",
            "leaves the tensor of shape [101, 24]",
        ),
        (put("plan", "ranks", [[1, 2, 0, 1], [0, 2, 0, 1]]), "plan.", "needs"),
        (put("plan", "skipped", [{"source": "y", "reason": ""}]), "plan.skipped", "no file has"),
    ],
)
def test_edits(edit: Edit, subject: str, text: str, value: dict[str, Any]) -> None:
    tree = copy.deepcopy(value)
    edit(tree)
    with pytest.raises(PlanFileError) as caught:
        manifest_from_json(tree)
    assert (caught.value.subject or "").startswith(subject), str(caught.value)
    assert text in str(caught.value), str(caught.value)


def test_names_that_are_used_twice(value: dict[str, Any]) -> None:
    tree = copy.deepcopy(value)
    tree["others"].append(dict(tree["others"][0]))
    with pytest.raises(PlanFileError, match=r"^others\[3\].name: is 'README.md', needs a name of"):
        manifest_from_json(tree)


@pytest.mark.parametrize("tree", [None, [], "x", 3, {}, {"format": "lading.shards"}])
def test_what_is_no_manifest(tree: Any) -> None:
    with pytest.raises(PlanFileError, match=r"^manifest: "):
        manifest_from_json(tree)


def test_a_manifest_is_a_value(value: dict[str, Any]) -> None:
    one, two = manifest_from_json(value), manifest_from_json(copy.deepcopy(value))
    assert isinstance(one, Manifest)
    assert one == two
