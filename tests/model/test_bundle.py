import getpass
import json
import resource
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from conftest import TINY
from pixelplay.data.transforms import Preprocessing
from pixelplay.errors import BundleError
from pixelplay.evaluation.conformal import HeldOutScores
from pixelplay.evaluation.novelty import Novelty
from pixelplay.model.backbone import load_backbone
from pixelplay.model.bundle import (
    ModelBundle,
    file_sha256,
    find_bundle,
    read_bundle,
    shorten_digest,
    write_bundle,
)
from pixelplay.model.classifier import LinearHead
from pixelplay.model.split_backbone import BranchedBackbone, TrainableStages

FILES = [
    "backbone.safetensors",
    "bundle.json",
    "calibration.safetensors",
    "head.safetensors",
    "novelty.safetensors",
]


@pytest.fixture(scope="module")
def bundle(tiny_weights: Path) -> ModelBundle:
    loaded = load_backbone(TINY, str(tiny_weights), offline=True)
    rng = np.random.default_rng(0)
    n_features = loaded.backbone.n_features
    return ModelBundle(
        backbone=loaded.backbone,
        classes=("2", "10", "Größe\n,'=x"),
        preprocessing=loaded.preprocessing,
        hflip=True,
        precision="bf16",
        temperature=1.37,
        tau=0.35,
        priors=np.array([0.5, 0.3, 0.2]),
        metric="macro_f1",
        trained_on=frozenset({shorten_digest(bytes(range(16))), shorten_digest(bytes(16))}),
        head=LinearHead(
            weight=rng.normal(size=(3, n_features)).astype(np.float32),
            bias=rng.normal(size=3).astype(np.float32),
        ),
        made_by={"pixelplay": "0", "weights": loaded.origin},
        held_out=HeldOutScores(
            split="val",
            lac=np.array([0.1, 0.4]),
            aps=np.array([0.6, 1.0]),
            confidence=np.array([0.9, 0.5]),
            is_right=np.array([True, False]),
        ),
        novelty=Novelty(
            mean=rng.normal(size=n_features).astype(np.float32),
            scale=np.ones(n_features, np.float32),
            references=rng.normal(size=(5, n_features)).astype(np.float16),
            centre=np.array([0.3, -2.0]),
            spread=np.array([1.0, 0.5]),
            scores=np.array([-1.0, 0.0, 2.5]),
        ),
    )


@pytest.fixture
def folder(bundle: ModelBundle, tmp_path: Path) -> Path:
    write_bundle(bundle, str(tmp_path / "model"))
    return tmp_path / "model"


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "bundle.json"
    content = json.loads(path.read_text("utf-8"))
    edit(content)
    path.write_text(json.dumps(content), "utf-8")


def replace_head(folder: Path, **arrays: np.ndarray) -> None:
    """Replace arrays of the head and update its checksum."""
    path = folder / "head.safetensors"
    save_file(load_file(path) | arrays, path)
    change(folder, lambda content: content["sha256"].update({"head.safetensors": file_sha256(str(path))}))


def refused(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        read_bundle(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_bundle_round_trip(bundle: ModelBundle, folder: Path) -> None:
    again = read_bundle(str(folder))
    for name in {field.name for field in fields(ModelBundle)} - {
        "backbone",
        "head",
        "priors",
        "held_out",
        "novelty",
    }:
        assert getattr(again, name) == getattr(bundle, name), name
    np.testing.assert_array_equal(again.priors, bundle.priors)
    for split in ("held_out", "novelty"):
        for name, values in vars(getattr(bundle, split)).items():
            np.testing.assert_array_equal(getattr(getattr(again, split), name), values, strict=True)
    np.testing.assert_array_equal(again.head.weight, bundle.head.weight)
    np.testing.assert_array_equal(again.head.bias, bundle.head.bias)
    old, new = bundle.backbone.state_dict(), again.backbone.state_dict()
    assert list(new) == list(old)
    assert all(torch.equal(new[key], old[key]) for key in old)
    assert (again.backbone.name, again.backbone.n_features) == (TINY, bundle.backbone.n_features)


def test_bundle_is_written_deterministically(bundle: ModelBundle, folder: Path, tmp_path: Path) -> None:
    write_bundle(read_bundle(str(folder)), str(tmp_path / "again"))
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_bundle_contains_only_safetensors_and_json(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == FILES
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
        if path.suffix == ".safetensors":  # the length of a JSON header, the header, numbers
            data = path.read_bytes()
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    json.loads((folder / "bundle.json").read_text("utf-8"))


def test_bundle_json_contains_no_path_user_or_host(tiny_run: Path) -> None:
    text = (tiny_run / "model" / "bundle.json").read_text("utf-8")
    strings = set(all_strings(json.loads(text)))
    own = {str(Path.home()), getpass.getuser(), socket.gethostname(), str(tiny_run), "/tmp"}
    assert not [s for s in strings if s.startswith(("/", "~", "\\")) or ":\\" in s or s in own]
    assert str(tiny_run.parent) not in text
    assert "tiny.safetensors" in strings  # the file name of the weights, without folder


def all_strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [s for key, item in value.items() for s in (key, *all_strings(item))]
    if isinstance(value, list):
        return [s for item in value for s in all_strings(item)]
    return [value] if isinstance(value, str) else []


def test_bundle_is_found_in_run_and_model_folder(tiny_run: Path) -> None:
    assert find_bundle(str(tiny_run)) == find_bundle(str(tiny_run / "model")) == str(tiny_run / "model")


def test_folder_without_bundle_is_named(tmp_path: Path) -> None:
    assert (
        refused(tmp_path) == f"{tmp_path} is not a model; pass a run of pixelplay train or its model folder"
    )
    assert "does not exist; pass a run" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["backbone.safetensors", "head.safetensors"])
def test_bundle_with_a_flipped_bit_is_refused(name: str, folder: Path) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-5] ^= 4
    (folder / name).write_bytes(data)
    assert f"{name} is damaged: its SHA-256" in refused(folder)


@pytest.mark.parametrize("name", ["backbone.safetensors", "head.safetensors"])
def test_missing_bundle_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    assert f"lacks {name}; copy the whole folder again" in refused(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '{"classes": []}', '{"format_version": "1", "sha256": {}}', "[" * 100_000,
     '{"format_version": 4}', '{"format_version": 0, "sha256": {}}', "\udcff"],
)  # fmt: skip
def test_foreign_bundle_json_is_refused_in_one_line(text: str, folder: Path) -> None:
    (folder / "bundle.json").write_text(text, "utf-8", errors="surrogateescape")
    assert "damaged or not a bundle of PixelPlay" in refused(folder)


def test_truncated_bundle_json_is_refused_in_one_line(folder: Path) -> None:
    path = folder / "bundle.json"
    path.write_bytes(path.read_bytes()[:-200])
    assert "damaged or not a bundle of PixelPlay" in refused(folder)


def test_older_bundle_version_is_refused(folder: Path) -> None:
    change(folder, lambda content: content.update(format_version=1))
    assert "format version 1 but this PixelPlay reads 4; train the model again" in refused(folder)


def test_newer_bundle_version_is_refused(folder: Path) -> None:
    change(folder, lambda content: (content.clear(), content.update(format_version=99)))
    assert "format version 99 but this PixelPlay reads 4; update PixelPlay" in refused(folder)


@pytest.mark.parametrize(
    "name", ["hf-hub:evil/model", "local-dir:/etc", "evil/model", "no_such_net", "lite0"]
)
def test_hostile_backbone_name_in_bundle_is_refused(name: str, folder: Path) -> None:
    change(folder, lambda content: content["backbone"].update(name=name))
    assert name in refused(folder)


def test_bundle_with_another_backbone_is_refused(folder: Path) -> None:
    change(folder, lambda content: content["backbone"].update(name="test_resnet"))
    assert "does not fit test_resnet: it lacks" in refused(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory use from /proc")
def test_name_of_an_enormous_network_allocates_no_memory(folder: Path) -> None:
    change(folder, lambda content: content["backbone"].update(name="vit_huge_patch14_clip_224"))
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 10**9, limits[1]))  # its weights take 2.5 GB
    try:
        message = refused(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "does not fit vit_huge_patch14_clip_224: it lacks" in message


def test_unsupported_input_size_is_refused_in_one_line(folder: Path) -> None:
    change(folder, lambda content: content["preprocessing"].update(input_size=[2, 2]))
    assert "test_convnext does not support images of 2 px" in refused(folder)


def test_head_with_wrong_shape_is_refused(bundle: ModelBundle, folder: Path) -> None:
    n = bundle.backbone.n_features
    replace_head(folder, weight=np.zeros((3, n - 1), np.float32))
    assert f"head of shape (3, {n - 1}) for 3 classes, {n} features" in refused(folder)
    replace_head(folder, weight=np.full((3, n), np.nan, np.float32))
    assert "ValueError: head" in refused(folder)


def test_head_that_is_not_safetensors_is_refused(folder: Path) -> None:
    path = folder / "head.safetensors"
    path.write_bytes(b"not a tensor")
    change(folder, lambda content: content["sha256"].update({path.name: file_sha256(str(path))}))
    assert "cannot be read" in refused(folder)


def test_held_out_scores_round_trip(folder: Path, bundle: ModelBundle) -> None:
    again = read_bundle(str(folder)).held_out
    assert again.split == bundle.held_out.split
    for name in ("lac", "aps", "confidence", "is_right"):
        np.testing.assert_array_equal(getattr(again, name), getattr(bundle.held_out, name))


@pytest.mark.parametrize("values", [np.empty(0), np.array([0.1]), np.array([0.1, np.nan])])
def test_invalid_held_out_scores_are_refused(values: np.ndarray, folder: Path) -> None:
    path = folder / "calibration.safetensors"
    save_file({**load_file(path), "lac": values}, path)
    change(folder, lambda content: content["sha256"].update({path.name: file_sha256(str(path))}))
    assert "calibration.safetensors of shapes" in refused(folder)


@pytest.fixture
def branched_folder(bundle: ModelBundle, tmp_path: Path) -> Path:
    """Write a bundle with a branch: its last two stages frozen and fine-tuned."""
    branch = TrainableStages(bundle.backbone, 2)
    with torch.no_grad():
        for value in branch.parameters():
            value.mul_(1.5)
    branched = BranchedBackbone(bundle.backbone, [branch])
    rng = np.random.default_rng(1)
    head = replace(bundle.head, weight=rng.normal(size=(3, branched.n_features)).astype(np.float32))
    write_bundle(replace(bundle, backbone=branched, head=head), str(tmp_path / "branched"))
    return tmp_path / "branched"


def test_branched_backbone_round_trip(branched_folder: Path, tmp_path: Path) -> None:
    again = read_bundle(str(branched_folder))
    assert isinstance(again.backbone, BranchedBackbone)
    assert [branch.n_frozen for branch in again.backbone.branches] == [2]
    kept = load_file(branched_folder / "finetuned.00.safetensors")
    assert kept
    assert not any(name.startswith(("stem.", "stages.0.", "stages.1.")) for name in kept)
    frozen = load_file(branched_folder / "backbone.safetensors")
    weights = [name for name in kept if name.endswith("weight")]
    assert all(np.allclose(kept[name], 1.5 * frozen[name]) for name in weights)
    write_bundle(again, str(tmp_path / "again"))
    assert {path.name for path in branched_folder.iterdir()} == {*FILES, "finetuned.00.safetensors"}
    for path in branched_folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_damaged_missing_or_unlisted_branch_is_refused(branched_folder: Path) -> None:
    path = branched_folder / "finetuned.00.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "SHA-256" in refused(branched_folder)
    path.unlink()
    assert "lacks finetuned.00.safetensors" in refused(branched_folder)
    path.write_bytes(data)
    change(branched_folder, lambda content: content["sha256"].pop("finetuned.00.safetensors"))
    assert "no digest of finetuned.00.safetensors" in refused(branched_folder)


@pytest.mark.parametrize("n_frozen", [-1, 4, 1.5, "2", True, [], 1])
def test_invalid_branch_is_refused(n_frozen: object, branched_folder: Path) -> None:
    change(branched_folder, lambda content: content["backbone"].update(n_frozen=[n_frozen]))
    refused(branched_folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", ["a", "a", "b"]),
        ("classes", 3),
        ("classes", []),
        ("priors", [0.5, 0.5, 0.0]),
        ("priors", [0.5, 0.5]),
        ("priors", [0.5, float("nan"), 0.5]),
        ("temperature", 0),
        ("temperature", float("inf")),
        ("temperature", None),
        ("tau", float("nan")),
        ("precision", "int4"),
        ("metric", "f1"),
        ("backbone", []),
        ("preprocessing", []),
        ("preprocessing", {"input_size": [10, 10], "mean": [0], "std": [1], "pickle": 1}),
        ("trained_on", 1),
        ("made_by", [1]),
        ("sha256", {}),
    ],
)
def test_invalid_bundle_value_is_refused_in_one_line(key: str, value: object, folder: Path) -> None:
    change(folder, lambda content: content.update({key: value}))
    refused(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("interpolation", "random"), ("interpolation", []),
     ("input_size", 224), ("input_size", [9]), ("input_size", [0, 9]), ("input_size", [9, 10**6]),
     ("input_size", [9, float("inf")]), ("mean", [0.5]),
     ("std", [0, 1, 1]), ("std", ["a", "b", "c"]), ("fit", "random"), ("fit", [])],
)  # fmt: skip
def test_invalid_preprocessing_is_refused(key: str, value: object, folder: Path) -> None:
    change(folder, lambda content: content["preprocessing"].update({key: value}))
    assert "bundle.json is damaged" in refused(folder)


@pytest.mark.parametrize(
    "key", ["classes", "backbone", "preprocessing", "hflip", "temperature", "trained_on"]
)
def test_missing_bundle_key_is_named(key: str, folder: Path) -> None:
    change(folder, lambda content: content.pop(key))
    assert f"KeyError: '{key}'" in refused(folder)


def test_bundle_stores_every_preprocessing_setting(folder: Path) -> None:
    stored = json.loads((folder / "bundle.json").read_text("utf-8"))["preprocessing"]
    assert set(stored) == {field.name for field in fields(Preprocessing)}


def test_bundle_can_be_copied(bundle: ModelBundle, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere")
    shutil.rmtree(folder)
    assert read_bundle(str(tmp_path / "elsewhere")).classes == bundle.classes


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("calibration.safetensors", "lac", np.array([0.4, 0.1])),
        ("calibration.safetensors", "confidence", np.array([0.5, 0.9])),
        ("calibration.safetensors", "is_right", np.array([1.0, 0.0])),
        ("novelty.safetensors", "scores", None),
    ],
)
def test_unsorted_held_out_scores_are_refused(
    file: str, name: str, value: np.ndarray | None, bundle: ModelBundle, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    write_bundle(bundle, str(folder))
    kept = load_file(folder / file)
    kept[name] = kept[name][::-1].copy() if value is None else value
    save_file(kept, folder / file)
    change(folder, lambda content: content["sha256"].update({file: file_sha256(str(folder / file))}))
    assert name in refused(folder)


def test_unknown_held_out_split_is_refused(bundle: ModelBundle, tmp_path: Path) -> None:
    write_bundle(bundle, str(tmp_path / "model"))
    change(tmp_path / "model", lambda content: content.update(held_out="somewhere"))
    assert "held_out" in refused(tmp_path / "model")
