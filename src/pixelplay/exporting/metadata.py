"""Metadata of an exported model: what its user must know to prepare images and read the outputs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pixelplay import __version__
from pixelplay.data.transforms import Preprocessing
from pixelplay.errors import BundleError, DataError
from pixelplay.evaluation.conformal import fit_conformal_threshold
from pixelplay.exporting.graph import ClassifierGraph
from pixelplay.model.bundle import ModelBundle

EXPORT_VERSION = 1
INPUT, OUTPUTS = "pixels", ("probs", "prediction", "novelty")
COVERAGES = (0.8, 0.9, 0.95, 0.99)

KEYS = (
    "export_version",
    "pixelplay",
    "precision",
    "classes",
    "preprocessing",
    "hflip",
    "temperature",
    "tau",
    "priors",
    "metric",
    "backbone",
    "made_by",
    "prediction_sets",
)
PARITY = "parity"  # absent until it has been measured

Metadata = Mapping[str, Any]  # JSON-ready; in the file every value is JSON


def describe_model(graph: ClassifierGraph, bundles: Sequence[ModelBundle], precision: str) -> dict[str, Any]:
    """Describe an exported model; lists have one entry for each model of an ensemble.

    `prediction_sets` maps a coverage to the largest 1 − probability of the classes in a set; it is empty for
    an ensemble, which has no held-out scores.
    """
    return {
        "export_version": EXPORT_VERSION,
        "pixelplay": __version__,
        "precision": precision,
        "classes": list(graph.classes),
        "preprocessing": asdict(graph.preprocessing),
        "hflip": [bundle.hflip for bundle in bundles],
        "temperature": [bundle.temperature for bundle in bundles],
        "tau": [bundle.tau for bundle in bundles],
        "priors": [dict(zip(bundle.classes, bundle.priors.tolist(), strict=True)) for bundle in bundles],
        "metric": [bundle.metric for bundle in bundles],
        "backbone": [bundle.backbone.name for bundle in bundles],
        "made_by": [dict(bundle.made_by) for bundle in bundles],
        "prediction_sets": _set_thresholds(bundles[0]) if len(bundles) == 1 else {},
    }


def pack(metadata: Metadata) -> dict[str, str]:
    """Turn each value into JSON."""
    return {key: json.dumps(value, ensure_ascii=False, allow_nan=False) for key, value in metadata.items()}


def unpack(texts: Mapping[str, str], path: str) -> dict[str, Any]:
    """Parse the metadata of a file.

    Raises:
        BundleError: they are missing, damaged or of a newer version.
    """
    try:
        metadata = {key: json.loads(texts[key]) for key in KEYS}  # other tools may have added more
        if (version := metadata["export_version"]) != EXPORT_VERSION:
            raise BundleError(
                f"{path} has export version {version} but this PixelPlay reads {EXPORT_VERSION}; "
                "export the model again"
            )
        if PARITY in texts:
            metadata[PARITY] = json.loads(texts[PARITY])
        read_preprocessing(metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{path} is not a model exported by pixelplay export ({type(error).__name__}: {error})"
        ) from None
    return metadata


def read_preprocessing(metadata: Metadata) -> Preprocessing:
    """Return how the pixels of an exported model are prepared."""
    raw = dict(metadata["preprocessing"])
    height, width = raw.pop("input_size")
    mean, std = tuple(raw.pop("mean")), tuple(raw.pop("std"))
    return Preprocessing(input_size=(height, width), mean=mean, std=std, **raw)


def _set_thresholds(bundle: ModelBundle) -> dict[str, float]:
    """Map each coverage that the held-out images support to its threshold."""
    thresholds = {}
    for coverage in COVERAGES:
        try:
            thresholds[str(coverage)] = fit_conformal_threshold(bundle.held_out.lac, coverage)
        except DataError:
            break
    return thresholds
