"""Where a model comes from: environment.json of the run, and the model card in the bundle (README.md)."""

import hashlib
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from pixelplay import __version__
from pixelplay.atomic import write_bytes, write_json
from pixelplay.data.transforms import describe_size
from pixelplay.outputs.console import METRIC_TITLES
from pixelplay.outputs.metrics_json import RunReport
from pixelplay.text import counted
from pixelplay.training.run_context import RunContext
from pixelplay.training.training_data import TrainingData

METHODS = {
    "none": "linear probe: logistic regression on the features of a frozen network",
    "partial": "partial fine-tuning: the last stages of the network and the head",
    "full": "full fine-tuning: all layers",
}
MEASURED_ON = {
    "test": "the test split, which selected nothing",
    "oof": "each predicted by a model that was not trained on it",
    "val": "the validation split, which also selected settings",
}


def describe_environment(data: TrainingData, ctx: RunContext) -> dict[str, Any]:
    """Return date, duration, versions, device, weights and a fingerprint of the data, JSON-ready."""
    import timm
    import torch

    pretrained = ctx.backbone
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(ctx.elapsed_s(), 1),
        "pixelplay": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if ctx.device.name == "cuda" else ctx.device.name,
        "precision": ctx.device.precision,
        "n_cores": os.cpu_count(),
        "n_threads": torch.get_num_threads(),
        "seed": ctx.config.seed,
        "backbone": pretrained.backbone.name,
        "weights": pretrained.origin,
        "weights_sha256": pretrained.weights_id,
        "weights_licence": pretrained.licence,
        "data_sha256": fingerprint(data),
    }


def fingerprint(data: TrainingData) -> str:
    """Return a hash of the content, label and split of all images; names and order do not matter."""
    split_of = np.full(len(data.dataset), "", dtype=object)
    for name, rows in data.split.items():
        split_of[rows] = name
    lines = sorted(
        f"{digest.hex()} {data.classes[label]} {split}"
        for digest, label, split in zip(data.digests, data.labels, split_of, strict=True)
    )
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def write_provenance(report: RunReport, data: TrainingData, ctx: RunContext) -> None:
    """Write environment.json and the model card."""
    environment = describe_environment(data, ctx)
    write_json(environment, os.path.join(ctx.run_dir, "environment.json"))
    card = format_model_card(report, environment, ctx)
    write_bytes(card.encode("utf-8", "backslashreplace"), os.path.join(ctx.run_dir, "model", "README.md"))


def format_model_card(report: RunReport, environment: Mapping[str, Any], ctx: RunContext) -> str:
    """Format the model card as Markdown; the same training gives the same card.

    It contains no paths, user or host names, and no date.
    """
    evaluation, preprocessing, made = report.evaluation, ctx.backbone.preprocessing, environment
    methods = [report.finetune] if isinstance(report.finetune, str) else list(report.finetune)
    names = ("accuracy", "balanced_accuracy", "macro_f1", "log_loss")
    estimates = {METRIC_TITLES[name]: getattr(evaluation, name) for name in names}
    n_train = sum(report.train_counts.values())
    size, versions = describe_size(preprocessing.input_size), ("python", "torch", "timm")
    return "\n".join(
        [
            "# Image classifier",
            "",
            f"{counted(len(report.train_counts), 'class')}, trained with PixelPlay {made['pixelplay']}.",
            "",
            "## Use",
            "",
            "```sh",
            "pixelplay predict MODEL images --out predictions.csv",
            "```",
            "",
            "The model assigns every image to one of its classes, also an image of something else; `novelty`",
            "tells how unusual an image is. It has only been evaluated on images like those below.",
            "",
            "## Metrics",
            "",
            f"On {counted(evaluation.n, 'image')}, {MEASURED_ON[report.measured_on]}; 95 % intervals.",
            "",
            "| metric | value |",
            "|---|---|",
            *(f"| {title} | {value} |" for title, value in estimates.items() if value is not None),
            "",
            "## Training",
            "",
            *(f"- Method: {METHODS[method]}" for method in methods),
            f"- Backbone: {made['backbone']}",
            f"- Pretrained weights: {made['weights']}, licence {made['weights_licence']}",
            f"- Input: {size} px, {preprocessing.fit}",
            f"- Data: {counted(n_train, 'image')}, SHA-256 {made['data_sha256'][:16]}",
            f"- Seed {made['seed']}; {made['device']}, {made['precision']}",
            "- " + ", ".join(f"{name} {made[name]}" for name in versions),
            "",
            "| class | training images |",
            "|---|---|",
            *(f"| {_cell(name)} | {n:,} |" for name, n in report.train_counts.items()),
            "",
        ]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
