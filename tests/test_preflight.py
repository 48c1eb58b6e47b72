"""Preflight: what is known of a load before any process is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from lading.demo import write_checkpoint
from lading.errors import ConfigError, PlanError
from lading.preflight import preflight, tp_sizes
from lading.ranks import all_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(str(path))
    return str(path)


def test_preflight(folder: str) -> None:
    found = preflight(folder, all_ranks(2))
    assert len(found.plan.shares) == 2
    assert found.config.family == "llama"
    assert {target.dtype for target in found.plan.targets} == {"BF16"}
    cast = preflight(folder, all_ranks(2), dtype="F16")
    assert {target.dtype for target in cast.plan.targets} == {"F16"}


def test_preflight_is_the_plan_of_the_load(folder: str) -> None:
    from lading.pretrained import prepare_pretrained

    for ranks in all_ranks(2):
        ahead = preflight(folder, [ranks]).plan
        assert ahead.digest == prepare_pretrained(folder, ranks=ranks).plan.digest


def test_preflight_says_which_sizes_divide(folder: str) -> None:
    with pytest.raises(PlanError) as caught:
        preflight(folder, all_ranks(3))
    assert caught.value.hint == "TP 1, 2: there every layer divides"


def test_preflight_without_a_config(folder: str, tmp_path: Path) -> None:
    import numpy
    from safetensors.numpy import save_file

    save_file({"x": numpy.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"^config.json: is missing, needs one beside"):
        preflight(str(tmp_path), all_ranks(1))


def test_tp_sizes(folder: str) -> None:
    assert tp_sizes(folder) == (1, 2)


def test_quantised_tensors_that_no_config_declares(folder: str, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import save_file

    shutil.copy(Path(folder) / "config.json", tmp_path)
    name = "model.layers.0.mlp.down_proj.qweight"
    save_file({name: torch.zeros(2, 2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        preflight(str(tmp_path), all_ranks(1))
    assert str(caught.value) == (
        f"quantization_config: is missing, needs to say how {name!r} is quantised (only quantising "
        "tools give such names). In config.json. Try: the config.json that came with these files."
    )


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool", "float8_e4m3fn"])
def test_a_dense_weight_of_a_storage_dtype(folder: str, tmp_path: Path, dtype: str) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "copy")
    name = "model.layers.0.self_attn.k_proj.weight"
    for file in (tmp_path / "copy").glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = tensors[name].to(vars(torch)[dtype])
            save_file(tensors, file)
    with pytest.raises(PlanError) as caught:
        preflight(tmp_path / "copy", all_ranks(1))
    (problem,) = caught.value.problems
    assert problem.part == "k"
    assert "looks quantised, and config.json declares no scheme for it" in str(problem)
