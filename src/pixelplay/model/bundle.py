"""Saved model: a folder of safetensors and one JSON file, without executable code.

bundle.json               format_version, classes, backbone, preprocessing, decision rule, hashes
backbone.safetensors      weights with timm's keys
finetuned.NN.safetensors  likewise, of the fine-tuned stages of branch NN
head.safetensors          weight (K, D), bias (K,); with a hidden layer (K, H), hidden_weight, hidden_bias
calibration.safetensors   scores of held-out images, for prediction sets and abstention
novelty.safetensors       features of training images, and the novelty scale from held-out ones
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from pixelplay.array_types import Float64Array
from pixelplay.atomic import write_json
from pixelplay.config import MAX_INPUT_PX, Metric, Precision
from pixelplay.data.transforms import FILTERS, Fit, Preprocessing, Size
from pixelplay.errors import BundleError, PixelPlayError
from pixelplay.evaluation.conformal import HeldOutScores
from pixelplay.evaluation.novelty import Novelty
from pixelplay.model.backbone import (
    FEATURES_VERSION,
    Backbone,
    FeatureKind,
    check_backbone_name,
    check_input_size,
    create_with_weights,
    load_weights_into,
    stage_modules,
)
from pixelplay.model.classifier import LinearHead
from pixelplay.model.split_backbone import BranchedBackbone, TrainableStages
from pixelplay.model.weights import file_sha256, read_state_dict

FORMAT_VERSION = 4
_BRANCH_FILE = re.compile(r"finetuned\.\d\d\.safetensors")
DIGEST_CHARS = 16  # of a training image's digest: enough to recognise it, too few to guess its content
BACKBONE, HEAD, CALIBRATION, NOVELTY = (
    f"{name}.safetensors" for name in ("backbone", "head", "calibration", "novelty")
)
HELD_OUT = ("lac", "aps", "confidence", "is_right")  # arrays of calibration.safetensors
NOVELTY_ARRAYS = ("mean", "scale", "references", "centre", "spread", "scores")
MAX_BRANCHES = 100  # two digits in a file name


@dataclass(frozen=True, kw_only=True)
class ModelBundle:
    """Everything that prediction needs."""

    backbone: Backbone
    classes: tuple[str, ...]  # (K,) in the order of the logits
    preprocessing: Preprocessing
    hflip: bool  # average the features of each image and its mirror image
    precision: Precision  # of the features the head was trained on
    temperature: float
    tau: float
    priors: Float64Array  # (K,) class frequencies π in training
    metric: str  # that tau was chosen for
    trained_on: frozenset[str]  # shortened hexadecimal digests of the training images
    head: LinearHead
    made_by: Mapping[str, str]  # PixelPlay's version and the origin of the pretrained weights
    held_out: HeldOutScores
    novelty: Novelty


def shorten_digest(digest: bytes) -> str:
    """Shorten a content hash to what a bundle stores of a training image."""
    return digest.hex()[:DIGEST_CHARS]


def write_bundle(bundle: ModelBundle, folder: str) -> None:
    """Write a bundle into an empty folder, bundle.json last."""
    from safetensors.numpy import save as save_arrays
    from safetensors.torch import save as save_tensors

    os.makedirs(folder, exist_ok=True)
    branches = bundle.backbone.branches if isinstance(bundle.backbone, BranchedBackbone) else []
    assert len(branches) <= MAX_BRANCHES
    networks = {BACKBONE: bundle.backbone.network}
    networks |= {_branch_file(i): branch.network for i, branch in enumerate(branches)}
    files = {
        name: save_tensors({key: value.contiguous().cpu() for key, value in network.state_dict().items()})
        for name, network in networks.items()
    }
    files[HEAD] = save_arrays(bundle.head.arrays())
    files[CALIBRATION] = save_arrays({name: getattr(bundle.held_out, name) for name in HELD_OUT})
    files[NOVELTY] = save_arrays({name: getattr(bundle.novelty, name) for name in NOVELTY_ARRAYS})
    for name, data in files.items():
        # written by Python, so that a full disk raises an OSError as everywhere else
        with open(os.path.join(folder, name), "wb") as file:
            file.write(data)
    content = {
        "format_version": FORMAT_VERSION,
        "classes": list(bundle.classes),
        "backbone": {
            "name": bundle.backbone.name,
            "features": bundle.backbone.features,
            "features_version": FEATURES_VERSION,
            "n_frozen": [branch.n_frozen for branch in branches],
        },
        "preprocessing": asdict(bundle.preprocessing),
        "hflip": bundle.hflip,
        "precision": bundle.precision,
        "temperature": bundle.temperature,
        "tau": bundle.tau,
        "priors": [float(p) for p in bundle.priors],
        "metric": bundle.metric,
        "made_by": dict(bundle.made_by),
        "held_out": bundle.held_out.split,
        "sha256": {name: file_sha256(os.path.join(folder, name)) for name in files},
        "trained_on": sorted(bundle.trained_on),
    }
    write_json(content, os.path.join(folder, "bundle.json"))


def read_bundle(folder: str) -> ModelBundle:
    """Read and verify a bundle from its own folder or that of its run.

    Raises:
        BundleError: missing, damaged, from another version, or not a bundle of PixelPlay.
    """
    folder = find_bundle(folder)
    content = _read_json(os.path.join(folder, "bundle.json"))
    branches = filter(_BRANCH_FILE.fullmatch, content["sha256"])
    for name in sorted({BACKBONE, HEAD, CALIBRATION, NOVELTY, *branches}):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise BundleError(f"{folder} lacks {name}; copy the whole folder again")
        if file_sha256(path) != content["sha256"].get(name):
            raise BundleError(f"{path} is damaged: its SHA-256 differs from bundle.json; copy it again")
    try:
        bundle = _build(content, folder)
        _check(bundle)
    except PixelPlayError as error:
        raise BundleError(f"cannot use the model in {folder}: {error}") from None
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise BundleError(
            f"{folder}/bundle.json is damaged ({type(error).__name__}: {error}); copy it again"
        ) from None
    return bundle


def find_bundle(folder: str) -> str:
    """Resolve RUN or RUN/model to the folder that contains bundle.json; BundleError if neither does."""
    for candidate in (folder, os.path.join(folder, "model")):
        if os.path.isfile(os.path.join(candidate, "bundle.json")):
            return candidate
    problem = "is not a model" if os.path.exists(folder) else "does not exist"
    raise BundleError(f"{folder} {problem}; pass a run of pixelplay train or its model folder")


def read_max_value(folder: str) -> float:
    """Return the value of white in images with more than 8 bits, without loading the model.

    Raises:
        BundleError: there is no bundle, or a damaged one.
    """
    folder = find_bundle(folder)
    try:
        return float(_read_json(os.path.join(folder, "bundle.json"))["preprocessing"]["max_value"])
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{folder}/bundle.json is damaged ({type(error).__name__}: {error})") from None


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content: Any = json.load(file)
        version = content["format_version"]
        if not isinstance(version, int) or version < 1:
            raise ValueError(f"format_version {version!r}")
        if version == FORMAT_VERSION and not isinstance(content["sha256"], dict):
            raise ValueError("sha256")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(
            f"{path} is damaged or not a bundle of PixelPlay ({type(error).__name__}: {error}); copy it again"
        ) from None
    if version != FORMAT_VERSION:
        remedy = "update PixelPlay" if version > FORMAT_VERSION else "train the model again"
        raise BundleError(
            f"{path} has format version {version} but this PixelPlay reads {FORMAT_VERSION}; {remedy}"
        )
    return dict(content)


def _build(content: Mapping[str, Any], folder: str) -> ModelBundle:
    name = str(content["backbone"]["name"])
    if content["backbone"]["features_version"] != FEATURES_VERSION:
        raise BundleError(
            f"{folder} was trained on features of version {content['backbone']['features_version']} but this "
            f"version of PixelPlay computes {FEATURES_VERSION}; train the model again"
        )
    check_backbone_name(name)  # only names in timm's list: others could be addresses
    weights = os.path.join(folder, BACKBONE)
    network = create_with_weights(name, read_state_dict(weights), weights)
    if (features := content["backbone"]["features"]) not in get_args(FeatureKind):
        raise ValueError(f"features {features!r}")
    backbone = Backbone(name, network, features)
    if n_frozen := content["backbone"]["n_frozen"]:
        backbone = _with_branches(backbone, n_frozen, content, folder)
    head = read_state_dict(os.path.join(folder, HEAD))
    raw = dict(content["preprocessing"])
    preprocessing = Preprocessing(**{**raw, "mean": tuple(raw["mean"]), "std": tuple(raw["std"])})
    return ModelBundle(
        backbone=backbone,
        classes=tuple(map(str, content["classes"])),
        preprocessing=replace(preprocessing, input_size=_read_size(preprocessing.input_size)),
        hflip=bool(content["hflip"]),
        precision=content["precision"],
        temperature=float(content["temperature"]),
        tau=float(content["tau"]),
        priors=np.array(content["priors"], dtype=np.float64),
        metric=str(content["metric"]),
        trained_on=frozenset(content["trained_on"]),
        head=LinearHead(**{name: value.float().numpy() for name, value in head.items()}),
        made_by=dict(content["made_by"]),
        held_out=_read_held_out(content["held_out"], _read_arrays(os.path.join(folder, CALIBRATION))),
        novelty=_read_novelty(_read_arrays(os.path.join(folder, NOVELTY))),
    )


def _read_held_out(split: str, arrays: Mapping[str, NDArray[Any]]) -> HeldOutScores:
    held_out = HeldOutScores(split=str(split), **{name: arrays[name] for name in HELD_OUT})
    n = len(held_out.lac)
    if not n or any(arrays[name].shape != (n,) or not np.isfinite(arrays[name]).all() for name in HELD_OUT):
        raise ValueError(f"{CALIBRATION} of shapes {[arrays[name].shape for name in HELD_OUT]}")
    checks = {
        "held_out": held_out.split in ("oof", "val"),
        "lac": _is_ascending(held_out.lac),
        "aps": _is_ascending(held_out.aps),
        "confidence": _is_ascending(-held_out.confidence),
        "is_right": held_out.is_right.dtype == np.bool_,
    }
    if wrong := [name for name, is_valid in checks.items() if not is_valid]:
        raise ValueError(f"{CALIBRATION}: {wrong[0]}")
    return held_out


def _read_novelty(arrays: Mapping[str, NDArray[Any]]) -> Novelty:
    novelty = Novelty(**{name: arrays[name] for name in NOVELTY_ARRAYS})
    n_features, n = len(novelty.mean), len(novelty.scores)
    shapes = ((n_features,), (n_features,), (len(novelty.references), n_features), (2,), (2,), (n,))
    wrong = [name for name, shape in zip(NOVELTY_ARRAYS, shapes, strict=True) if arrays[name].shape != shape]
    wrong += [name for name in NOVELTY_ARRAYS if not arrays[name].size or not np.isfinite(arrays[name]).all()]
    wrong += [name for name in ("scale", "spread") if not (arrays[name] > 0).all()]
    wrong += [] if _is_ascending(novelty.scores) else ["scores"]
    if wrong:
        raise ValueError(f"{NOVELTY}: {wrong[0]}")
    return novelty


def _is_ascending(values: NDArray[Any]) -> bool:
    return bool((np.diff(values) >= 0).all())


def _read_arrays(path: str) -> dict[str, NDArray[Any]]:
    return {name: value.numpy() for name, value in read_state_dict(path).items()}


def _with_branches(
    backbone: Backbone, n_frozen: Any, content: Mapping[str, Any], folder: str
) -> BranchedBackbone:
    n_stages = len(stage_modules(backbone.network))
    if not isinstance(n_frozen, list) or len(n_frozen) > MAX_BRANCHES:
        raise ValueError(f"n_frozen {n_frozen!r}")
    if wrong := [n for n in n_frozen if type(n) is not int or n not in range(n_stages)]:
        raise ValueError(f"n_frozen {wrong[0]!r}")
    names = [_branch_file(i) for i in range(len(n_frozen))]
    if unverified := [name for name in names if name not in content["sha256"]]:
        raise ValueError(f"no digest of {unverified[0]}")
    branches = [TrainableStages(backbone, n) for n in n_frozen]
    for name, branch in zip(names, branches, strict=True):
        path = os.path.join(folder, name)
        load_weights_into(branch.network, read_state_dict(path), path)
    return BranchedBackbone(backbone, branches)


def _read_size(sides: Any) -> Size:
    height, width = sides
    return int(height), int(width)


def _branch_file(i: int) -> str:
    return f"finetuned.{i:02}.safetensors"


def _check(bundle: ModelBundle) -> None:
    n_classes, n_features = len(bundle.classes), bundle.backbone.n_features
    head, preprocessing = bundle.head, bundle.preprocessing
    if not head.fits(n_features, n_classes):
        raise ValueError(f"head of shape {head.weight.shape} for {n_classes} classes, {n_features} features")
    checks = {
        "head": all(bool(np.isfinite(values).all()) for values in head.arrays().values()),
        "novelty": len(bundle.novelty.mean) <= n_features,
        "classes": len(set(bundle.classes)) == n_classes >= 2,
        "priors": bundle.priors.shape == (n_classes,) and bool((bundle.priors > 0).all()),
        "temperature": 0 < bundle.temperature < np.inf,
        "tau": bool(np.isfinite(bundle.tau)),
        "metric": bundle.metric in get_args(Metric),
        "precision": bundle.precision in ("fp32", "bf16"),
        "input_size": all(1 <= side <= MAX_INPUT_PX for side in preprocessing.input_size),
        "mean": len(preprocessing.mean) == 3 and bool(np.isfinite(preprocessing.mean).all()),
        "std": len(preprocessing.std) == 3 and all(0 < x < np.inf for x in preprocessing.std),
        "interpolation": isinstance(preprocessing.interpolation, str)
        and preprocessing.interpolation in FILTERS,
        "fit": preprocessing.fit in get_args(Fit),
        "max_value": 0 < preprocessing.max_value < np.inf,
    }
    wrong = [name for name, is_valid in checks.items() if not is_valid]
    if wrong:
        raise ValueError(", ".join(wrong))
    check_input_size(bundle.backbone, preprocessing.input_size)
