"""What a finished classifier is used to: the scale of novelty that its bundle carries."""

import numpy as np

from pixelplay.arrays import Float32Array, IntArray
from pixelplay.config import TrainConfig
from pixelplay.evaluation.novelty import MAX_REFERENCES, Novelty, choose_references, fit_novelty
from pixelplay.model.backbone import Backbone, LoadedBackbone
from pixelplay.model.device import Device
from pixelplay.model.features import make_extractor
from pixelplay.model.split_backbone import BranchedBackbone
from pixelplay.training.bench import read_rows, train_apart
from pixelplay.training.material import Material

MAX_READ = 300  # photographs of either kind, where tuning has changed all features and they are read anew


def see_rows(
    backbone: Backbone,
    material: Material,
    loaded: LoadedBackbone,
    config: TrainConfig,
    device: Device,
    rows: IntArray,
) -> Float32Array:
    """Features (n, D) of some photographs of the material under a finished network."""
    if backbone is loaded.backbone:
        return material.features[rows]
    return read_rows(material, rows, make_extractor(backbone, loaded.preprocessing, config, device), config)


def make_novelty(
    backbone: Backbone,
    material: Material,
    loaded: LoadedBackbone,
    config: TrainConfig,
    device: Device,
    held_out: tuple[IntArray, Float32Array, IntArray | None],
) -> Novelty:
    """Set the scale of novelty by photographs that a classifier, or one like it, has not learned from.

    Where a tuned network answers alone, its features of them are those after it has learned from them too,
    for some short epochs: then what is new looks a little newer than it is.

    Args:
        backbone: of the finished classifier.
        held_out: positions (n,), ascending; their logits (n, K), NaN where one could not be held out; and
            their folds (n,), None where they are a validation part.
    """
    rows, logits, folds = held_out
    references = train_apart(material) if folds is None else rows
    kept = np.flatnonzero(np.isfinite(logits).all(axis=1))
    # beside its tails a network has its frozen features, and they come first
    is_frozen = backbone is loaded.backbone or isinstance(backbone, BranchedBackbone)
    if is_frozen:
        chosen = references[choose_references(material.labels[references], MAX_REFERENCES, config.seed)]
    else:
        kept = kept[choose_references(material.labels[rows[kept]], MAX_READ, config.seed)]
        chosen = references[choose_references(material.labels[references], MAX_READ, config.seed)]

    def see(wanted: IntArray) -> Float32Array:
        if is_frozen:
            return material.features[wanted]
        return see_rows(backbone, material, loaded, config, device, wanted)

    if folds is None:
        own, others = np.zeros(len(kept), dtype=np.int64), np.ones(len(chosen), dtype=np.int64)
    else:
        own, others = folds[kept], folds[np.searchsorted(rows, chosen)]
    return fit_novelty(see(chosen), others, see(rows[kept]), own, logits[kept])
