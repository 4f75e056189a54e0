"""Features and duplicate groups as the linear probe uses them."""

from dataclasses import dataclass

from pixelplay.array_types import Float32Array, IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.audit import find_duplicates
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.sources import open_dataset
from pixelplay.data.splits import join_groups
from pixelplay.model.backbone import load_backbone
from pixelplay.model.device import resolve_device
from pixelplay.model.features import extract_features, find_near_duplicates
from pixelplay.run_log import RunLog


@dataclass(frozen=True, kw_only=True)
class ProbeData:
    """N labelled images outside the predefined test split.

    Attributes:
        dataset: the images.
        features: (N, D) of the frozen backbone.
        groups: (N,) images of one group, duplicates and near-duplicates among them, belong in one split.
    """

    dataset: ImageDataset
    features: Float32Array
    groups: IntArray


def load_probe_data(source: str, backbone: str = "lite0") -> ProbeData:
    """Read the labelled images of a dataset, leaving out its test split."""
    dataset = open_dataset(source)
    dataset = dataset.select((dataset.labels >= 0) & ~dataset.in_split("test"))
    config, log = TrainConfig(finetune="none"), RunLog(quiet=True)
    loaded = load_backbone(backbone, None, offline=True)
    images = extract_features(dataset, loaded, config, resolve_device(config.compute), log)
    near = [pair.members for pair in find_near_duplicates(dataset, images, config, log)]
    groups = join_groups(dataset, find_duplicates(dataset, images.digests, near))
    return ProbeData(dataset=dataset, features=images.values, groups=groups)
