"""The first look at photographs, before anything is learned."""

from pixelplay.config import TrainConfig
from pixelplay.data.corrections import read_corrections, read_reviewed
from pixelplay.data.index import ImageIndex
from pixelplay.journal import Journal
from pixelplay.model.backbone import LoadedBackbone, load_backbone, pick_backbone_name
from pixelplay.model.copies import look_for_copies
from pixelplay.model.reading import read_photographs
from pixelplay.training.bench import Workplace
from pixelplay.training.findings import say_what_was_found
from pixelplay.training.material import Material, sort_out
from pixelplay.training.resume import check_photographs


def see(
    index: ImageIndex, config: TrainConfig, workplace: Workplace, journal: Journal
) -> tuple[Material, LoadedBackbone]:
    """See each photograph once with the backbone as it came, and sort them into parts.

    Nothing is learned here.
    """
    corrected = None if config.relabel is None else read_corrections(config.relabel, index)
    device = workplace.device
    backbone = load_backbone(
        pick_backbone_name(config.backbone, device.name),
        config.weights,
        is_offline=config.offline,
        features="stages" if config.finetune.head == "linear" else "pooled",
        input_size=config.input_size,
    )
    photographs = read_photographs(index, backbone, config, device, journal)
    near = []
    if config.near_duplicates:
        near = look_for_copies(index, photographs, config.compute.num_workers, journal)
    reviewed = None if config.relabel is None else read_reviewed(config.relabel, index)
    material = sort_out(index, photographs, config, corrected, [pair.members for pair in near], reviewed)
    say_what_was_found(material, config, journal)
    check_photographs(workplace.checkpoints, material, backbone.weights_id)
    return material, backbone
