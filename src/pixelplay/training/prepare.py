"""Photographs → material: each is read once, copies are found, and all are sorted into parts."""

from pixelplay.config import TrainConfig
from pixelplay.data.dataset import ImageIndex
from pixelplay.data.relabel import read_corrections
from pixelplay.model.backbone import LoadedBackbone, load_backbone, pick_backbone_name
from pixelplay.model.features import look_for_copies, read_photographs
from pixelplay.run_log import Journal
from pixelplay.training.bench import Workplace
from pixelplay.training.findings import say_what_was_found
from pixelplay.training.material import Material, sort_out
from pixelplay.training.resume import check_photographs


def prepare_material(
    index: ImageIndex, config: TrainConfig, workplace: Workplace, journal: Journal
) -> tuple[Material, LoadedBackbone]:
    """Read each photograph once with the backbone as it came, sort them, and say what is wrong with them.

    Nothing is learned here.

    Raises:
        DataError: too little can be read, corrections name what is not there, or the photographs are not
            those of the run that is resumed.
        ConfigError: the backbone cannot be used, or is not that of the run that is resumed.
    """
    corrections = None if config.relabel is None else read_corrections(config.relabel, index)
    backbone = load_backbone(
        pick_backbone_name(config.backbone, workplace.device.name),
        config.weights,
        is_offline=config.offline,
        features="stages" if config.finetune.head == "linear" else "pooled",
        input_size=config.input_size,
    )
    photographs = read_photographs(index, backbone, config, workplace.device, journal)
    near = []
    if config.near_duplicates:
        near = look_for_copies(index, photographs, config.compute.num_workers, journal, hflip=config.hflip)
    material = sort_out(index, photographs, config, corrections, [pair.members for pair in near])
    say_what_was_found(material, config, journal)
    check_photographs(workplace.checkpoints, material, backbone.weights_id)
    return material, backbone
