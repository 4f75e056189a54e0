"""Whether a setting is legal."""

import dataclasses
import math
import numbers
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from tyro.conf import DisallowNone, arg

from pixelplay.errors import ConfigError
from pixelplay.text import suggest


def parse_duration(text: str) -> float:
    """Seconds of a duration written 90s, 5m or 2h.

    Raises:
        ConfigError: written otherwise, or nothing.
    """
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", str(text).strip())
    seconds = float(matched[1]) * {"s": 1, "m": 60, "h": 3600}[matched[2]] if matched else 0.0
    if not seconds:
        raise ConfigError(f"time_budget={text!r} is no duration; write 90s, 5m or 2h")
    return seconds


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ConfigError unless a setting has one of the values that there are."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(choices)}")


def check_names(name: str, noun: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ConfigError unless a setting is a sequence of known names."""
    if isinstance(names, str):
        raise ConfigError(f"{name}={names!r} is one text; give a tuple, ({names!r},)")
    for each in names:
        if each not in known:
            raise ConfigError(
                f"{noun} {each!r} is unknown{suggest(each, known)}; there are {', '.join(known)}"
            )


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless a setting is a number in its range, ends included."""
    if not isinstance(value, int | float):
        raise ConfigError(f"{name}={value!r} is no plain number; its range is {low} to {high}")
    if not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r} is outside its range {low} to {high}")


def check_count(name: str, value: int, low: int, high: int) -> None:
    """Raise ConfigError unless a setting is a whole number in its range."""
    check_range(name, value, low, high)
    if not isinstance(value, int):
        raise ConfigError(f"{name}={value!r} is no whole number; its range is {low} to {high}")


def check_regex(name: str, pattern: str) -> None:
    """Raise ConfigError unless a setting is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{name}={pattern!r} is not a regular expression: {error}") from None


def check_groups(config: Any) -> None:
    """Raise ConfigError where a group of settings in a configuration is something else."""
    for each in dataclasses.fields(config):
        kind, value = each.default_factory, getattr(config, each.name)
        if isinstance(kind, type) and not isinstance(value, kind):
            raise ConfigError(f"{each.name}={value!r} is no {kind.__name__}; give {kind.__name__}(...)")


def take_paths(config: object, *names: str) -> None:
    """Make texts of a frozen configuration's paths, as its JSON holds them."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not isinstance(value, str | os.PathLike):
            raise ConfigError(f"{name}={value!r} is no path; give a text")
        if value is not None:
            object.__setattr__(config, name, os.fsdecode(value))


def check_share(name: str, value: float) -> None:
    """Raise ConfigError unless a setting lies between 0 and 1, both excluded."""
    if not isinstance(value, numbers.Real) or not 0 < value < 1:
        raise ConfigError(f"{name}={value!r} is outside its range, above 0 and below 1; ask for 0.9, say")


StrPath = str | os.PathLike[str]
Metric = Literal["accuracy", "balanced_accuracy", "macro_f1"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
FinetuneMethod = Literal["auto", "none", "partial", "full"]
Imbalance = Literal[
    "auto", "none", "sampler", "class_weights", "balanced_softmax", "logit_adjusted", "focal", "crt"
]
HeadInit = Literal["probe", "random"]
HeadKind = Literal["linear", "mlp"]
Switch = Literal["auto", "on", "off"]
AUGMENTATIONS = ("crop", "rotation", "erasing", "mixup", "cutmix")
ConformalScore = Literal["lac", "aps"]
Tta = Literal["none", "flip"]
CamName = Literal["gradcam", "gradcam++", "layercam"]
SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
MAX_INPUT_PX = 4096
SMALLEST_NORMED = 3  # images a batch: its norm needs two, and a last batch may hold one less than others


def shown(metavar: str | None = None) -> object:
    """Say how help shows a setting: a word for its value, and its default unless that is None."""
    return arg(
        metavar=metavar,
        help_behavior_hint=lambda value: "" if value == "None" else f"(default: {value})",
    )


# hflip is on by default, so the command line has --no-hflip, which needs its own words
NO_NEAR_DUPLICATES_HELP = (
    "Do not look for resized, cut, mirrored and otherwise altered copies before splitting."
)
NO_HFLIP_HELP = "Tell an image from its mirror image, which is no copy then: for digits, arrows, text."
Flag = Annotated[bool, arg(help_behavior_hint="")]
Count = Annotated[int, shown("N")]
File = DisallowNone[Annotated[str | None, shown("FILE")]]  # a name may be "None"; a number is then off
Folder = DisallowNone[Annotated[str | None, shown("FOLDER")]]
Column = DisallowNone[Annotated[str | None, shown("COLUMN")]]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How paths, labels, parts and groups are read."""

    path_column: Column = None
    """Column of a table that names the image; found by its usual names when not given."""
    label_column: Column = None
    """Column of a table that holds the class name; found by its usual names when not given."""
    split_column: Column = None
    """Column of a table that says train, val or test; found by its usual names when not given."""
    group_column: Column = None
    """Column of a table naming what must stay on one side of a split: patient, camera, burst."""
    group_regex: DisallowNone[Annotated[str | None, shown("REGEX")]] = None
    """Regular expression on the path; its first bracket (or whole match) names the group."""
    group_by_folder: Flag = False
    """Images of one folder below the class folder are one group."""
    images_dir: Folder = None
    """Folder that the paths or ids of a table are looked up in (default: the table's own folder)."""

    def __post_init__(self) -> None:
        take_paths(self, "images_dir")
        if self.group_regex is not None:
            check_regex("group_regex", self.group_regex)
        ways = [self.group_column is not None, self.group_regex is not None, self.group_by_folder]
        if sum(ways) > 1:
            raise ConfigError("group_column, group_regex and group_by_folder exclude each other: give one")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """What the work runs on."""

    device: Device = "auto"
    """Where the network runs; auto takes cuda, then mps, then cpu."""
    precision: Precision = "auto"
    """Number format of the network; auto takes bf16 where the device computes it natively."""
    batch_size: Annotated[int | None, shown("N")] = None
    """Images seen at once outside training, on a CPU for each core (default: 32; a CPU: 8 of 224 px)."""
    num_workers: Annotated[int | None, shown("N")] = None
    """Threads that read and decode (default: one a core, at most 16)."""

    def __post_init__(self) -> None:
        check_choice("device", self.device, get_args(Device))
        check_choice("precision", self.precision, get_args(Precision))
        for name, most in (("batch_size", 4096), ("num_workers", 256)):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1, most)


@dataclass(frozen=True, kw_only=True)
class UncertaintyConfig:
    """What a prediction says about its own worth; each setting adds a column to the table."""

    coverage: Annotated[float | None, shown("SHARE")] = None
    """prediction_set: classes among which the true one is, for this share of images."""
    conformal_score: ConformalScore = "lac"
    """lac: the smallest sets on average; aps: sets that grow with how hard an image is."""
    min_confidence: Annotated[float | None, shown("PROB")] = None
    """answered: false where the label's probability is lower."""
    target_accuracy: Annotated[float | None, shown("SHARE")] = None
    """answered: likewise, at the probability from which held-out images promise this accuracy."""

    def __post_init__(self) -> None:
        check_choice("conformal_score", self.conformal_score, get_args(ConformalScore))
        if self.min_confidence is not None:
            check_range("min_confidence", self.min_confidence, 0, 1)
            if self.target_accuracy is not None:
                raise ConfigError("min_confidence and target_accuracy both say when to answer; give one")
        if self.conformal_score != "lac" and self.coverage is None:
            raise ConfigError(
                f"conformal_score={self.conformal_score!r} needs a coverage; add --coverage 0.9"
            )
        for name in ("coverage", "target_accuracy"):
            if getattr(self, name) is not None:
                check_share(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How partial and full tuning learn; the probe needs none of it."""

    head_init: HeadInit = "probe"
    """Where a linear head starts: from the probe fitted first, or from nothing; an mlp starts random."""
    head: HeadKind = "linear"
    """linear, on the features of several stages; mlp: one hidden layer on the last stage's features."""
    epochs: Annotated[int | None, shown("N")] = None
    """Passes over the learning part (default: by time budget)."""
    cached_views: Annotated[int | None, shown("N")] = None
    """Augmented views of each image that partial keeps (default: by time budget and cache)."""
    unfreeze_stages: Annotated[int | None, shown("N")] = None
    """Last stages of the backbone that partial trains (default: by time budget and cache)."""
    train_batch_size: Annotated[int | None, shown("N")] = None
    """Images a training step (default: 32; with CUDA 128, or what fits)."""
    lr: Annotated[float | None, shown("LR")] = None
    """Peak rate of AdamW for the last stage, for 32 images a step (default: 2e-3; full: 2e-4)."""
    head_lr: Annotated[float, shown("LR")] = 5e-4
    """Peak learning rate for the head; both go with the root of the images a step."""
    layer_decay: Annotated[float | None, shown("FACTOR")] = None
    """Factor on the learning rate from each stage to the one in front of it (default: 1; full: 0.7)."""
    weight_decay: Annotated[float, shown("RATE")] = 0.05
    """AdamW's decay; norms, biases and layer scales have none."""
    warmup_frac: Annotated[float, shown("FRACTION")] = 0.1
    """Fraction of the steps in which the learning rate rises; a cosine brings it to 0 after that."""
    label_smoothing: Annotated[float, shown("FRACTION")] = 0.0
    """Share of each label that is spread over all classes, as frequent as they are drawn, below 1."""
    dropout: Annotated[float, shown("FRACTION")] = 0.0
    """Share of the features that the head does not see in a step, below 1."""
    drop_path: Annotated[float, shown("FRACTION")] = 0.0
    """Stochastic depth: share of the residual branches left out in the last stage, below 1."""
    hard_example_frac: Annotated[float, shown("FRACTION")] = 0.5
    """Share of an epoch for what is still wrong, each time with less weight; 0 (and beside mixup): none."""
    clip_grad_norm: Annotated[float | None, shown("NORM")] = 1.0
    """Largest norm of the gradient."""
    grad_accum_steps: Annotated[int, shown("N")] = 1
    """Batches whose gradients are added up before each step."""
    initial_size_frac: Annotated[float, shown("FRACTION")] = 1.0
    """Full only: image size at the start as a fraction of the last; it grows in between."""
    ensemble_probe: Switch = "auto"
    """Answer with the mean of the tuned network's and the probe's logits; auto: validation chooses."""
    refit_epochs: Annotated[int, shown("N")] = 2
    """Short last epochs that learn from validation images too, once they have chosen; 0: none."""
    patience: Annotated[int | None, shown("EPOCHS")] = None
    """Stop once validation loss has not fallen for so many epochs (default: never)."""
    compile: Switch = "auto"
    """torch.compile; auto: with CUDA, where the job is long enough to repay it."""
    deterministic: Flag = False
    """With CUDA: the same weights from every run, at some cost in speed. A CPU always does."""

    def __post_init__(self) -> None:
        check_choice("head_init", self.head_init, get_args(HeadInit))
        check_choice("head", self.head, get_args(HeadKind))
        check_choice("ensemble_probe", self.ensemble_probe, get_args(Switch))
        check_choice("compile", self.compile, get_args(Switch))
        for name in ("epochs", "cached_views", "unfreeze_stages", "train_batch_size", "patience"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1, 10_000)
        check_count("grad_accum_steps", self.grad_accum_steps, 1, 1024)
        check_count("refit_epochs", self.refit_epochs, 0, 1000)
        if self.head == "mlp" and self.train_batch_size is not None:
            check_count("train_batch_size", self.train_batch_size, SMALLEST_NORMED, 10_000)
        if self.head == "mlp" and self.ensemble_probe == "on":
            raise ConfigError(
                "ensemble_probe='on' averages linear heads, and head='mlp' is none; leave one out"
            )
        check_range("head_lr", self.head_lr, 1e-8, 10)
        check_range("weight_decay", self.weight_decay, 0, 10)
        check_range("initial_size_frac", self.initial_size_frac, 0.25, 1)
        check_range("hard_example_frac", self.hard_example_frac, 0, 0.9)
        for name, low, high in (("lr", 1e-8, 10), ("layer_decay", 0.01, 1), ("clip_grad_norm", 1e-6, 1e6)):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low, high)
        for name in ("warmup_frac", "label_smoothing", "dropout", "drop_path"):
            check_range(name, getattr(self, name), 0, 0.99)

    def rates(self, *, is_full: bool) -> tuple[float, float]:
        """`lr` and `layer_decay`, the defaults of the depth in place of None."""
        return self.lr or (2e-4 if is_full else 2e-3), self.layer_decay or (0.7 if is_full else 1.0)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How the images that are learned from are varied; mirroring follows hflip."""

    augment: Annotated[tuple[str, ...], arg(metavar="[NAME ...]")] = ("crop",)
    """Any of crop, rotation, erasing, mixup, cutmix; none named: no variation."""
    crop_scale: Annotated[float, shown("FRACTION")] = 0.7
    """crop: smallest share of the image's area that a view shows."""
    rotation_deg: Annotated[float, shown("DEGREES")] = 15.0
    """rotation: largest angle to either side, up to 180."""
    erasing_prob: Annotated[float, shown("FRACTION")] = 0.25
    """erasing: share of the views in which a rectangle is replaced by noise."""
    mixup_alpha: Annotated[float, shown("ALPHA")] = 0.2
    """mixup: the larger, the more evenly two images are mixed."""
    cutmix_alpha: Annotated[float, shown("ALPHA")] = 1.0
    """cutmix: the larger, the larger the patch that comes from another image."""
    mix_prob: Annotated[float, shown("FRACTION")] = 0.5
    """mixup and cutmix: share of the batches that are mixed."""
    mix_off_frac: Annotated[float, shown("FRACTION")] = 0.2
    """Last part of the steps in which nothing is mixed."""

    def __post_init__(self) -> None:
        check_names("augment", "augmentation", self.augment, AUGMENTATIONS)
        check_range("crop_scale", self.crop_scale, 0.01, 1)
        check_range("rotation_deg", self.rotation_deg, 0, 180)
        for name in ("erasing_prob", "mix_prob", "mix_off_frac"):
            check_range(name, getattr(self, name), 0, 1)
        for name in ("mixup_alpha", "cutmix_alpha"):
            check_range(name, getattr(self, name), 0.01, 100)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a classifier is learned."""

    metric: Metric = "accuracy"
    """What decisions are tuned for: accuracy; balanced_accuracy or macro_f1 where rare classes count."""
    finetune: FinetuneMethod = "auto"
    """Depth: a probe on frozen features, partial (last stages too), full; auto: the best that time allows."""
    time_budget: Annotated[str, shown("TIME")] = "10m"
    """Time for partial, full and auto: 90s, 5m or 2h, in crossval for each fold; --epochs take their own."""
    backbone: Annotated[str, shown("NAME")] = "auto"
    """auto (on a CPU lite0, on a GPU ConvNeXt-Tiny), lite0, lite2, or any timm model name."""
    weights: File = None
    """Local .safetensors or .pth file with the weights of the network that --backbone names."""
    input_size: Annotated[int | None, shown("PX")] = None
    """Side of the square that the network sees, px (default: as its weights were trained)."""
    classes: File = None
    """File of the classes that the test side expects: a list, `class,count` rows, a sample submission."""
    relabel: File = None
    """Table of path and label (label_issues.csv, mended): other labels to learn from; an empty one leaves out."""
    drop_label_issues: Flag = False
    """Do not learn from training images whose labels look wrong to a probe that has not seen them."""
    hflip: Annotated[bool, arg(help=NO_HFLIP_HELP, help_behavior_hint="")] = True
    """An image and its mirror image mean the same; switch off for digits, arrows, text."""
    near_duplicates: Annotated[bool, arg(help=NO_NEAR_DUPLICATES_HELP, help_behavior_hint="")] = True
    """Keep resized, cut, mirrored and otherwise altered copies of an image on one side of each split."""
    imbalance: Imbalance = "auto"
    """How rare classes are helped while learning; auto: beyond 5 : 1 class_weights, if folds agree."""
    logit_tau: Annotated[float, shown("TAU")] = 1.0
    """logit_adjusted: strength of its correction; at 1 it is balanced_softmax."""
    focal_gamma: Annotated[float, shown("GAMMA")] = 2.0
    """focal: how much less an image counts that is recognised already."""
    oversample_to: Annotated[int | Literal["largest"] | None, shown("N")] = None
    """Raise smaller classes to N samples an epoch (largest: to it); with imbalance auto, none or sampler."""
    test_frac: Annotated[float, shown("FRACTION")] = 0.2
    """Fraction held out as test part when the data gives none, 0 to 0.9; 0 and crossval hold out nothing."""
    val_frac: Annotated[float, shown("FRACTION")] = 0.15
    """Fraction of the rest that partial and full hold out to choose on, where the data gives none."""
    n_folds: Count = 5
    """Folds of crossval, and inside a learning part those that choose strength, T and tau, 2 to 20."""
    seed: Count = 0
    """Seed of everything random."""
    cache_dir: Folder = None
    """Folder of the cache (default: the user's cache folder)."""
    cache_gb: Annotated[float, shown("GB")] = 4.0
    """Upper bound of the cache in gigabytes; 0 neither reads nor writes it."""
    offline: Flag = False
    """Never touch the network, even where weights are missing."""
    finetuning: FinetuneConfig = field(default_factory=FinetuneConfig)
    augmenting: AugmentConfig = field(default_factory=AugmentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        take_paths(self, "weights", "classes", "relabel", "cache_dir")
        check_groups(self)
        check_choice("metric", self.metric, get_args(Metric))
        check_choice("finetune", self.finetune, get_args(FinetuneMethod))
        check_choice("imbalance", self.imbalance, get_args(Imbalance))
        parse_duration(self.time_budget)
        check_range("test_frac", self.test_frac, 0, 0.9)
        check_range("val_frac", self.val_frac, 0.01, 0.9)
        if self.input_size is not None:
            check_count("input_size", self.input_size, 16, MAX_INPUT_PX)
        check_range("logit_tau", self.logit_tau, 0, 10)
        check_range("focal_gamma", self.focal_gamma, 0, 20)
        check_count("n_folds", self.n_folds, 2, 20)
        check_count("seed", self.seed, 0, 2**32 - 1)
        check_range("cache_gb", self.cache_gb, 0, 1_000_000)
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        if isinstance(self.oversample_to, str):
            check_choice("oversample_to", self.oversample_to, ("largest",))
        elif self.oversample_to is not None:
            check_count("oversample_to", self.oversample_to, 1, 1_000_000)
        if self.oversample_to is not None and self.imbalance not in ("auto", "none", "sampler"):
            raise ConfigError(
                f"oversample_to={self.oversample_to!r} and imbalance={self.imbalance!r} both correct for "
                "class sizes while learning; give one of them (None switches the first off)"
            )
        if self.finetune == "none" and self.oversample_to is not None:
            raise ConfigError(
                "oversample_to needs augmented views, and a probe has none; use --finetune partial"
            )
        head = self.finetuning.head
        if self.finetune in ("none", "auto") and head != "linear":
            raise ConfigError(f"head={head!r} is not fitted by a probe; use --finetune partial or full")
        if self.imbalance == "crt" and head != "linear":
            raise ConfigError(f"imbalance='crt' ends with a linear head, not head={head!r}; leave one out")
        soft: list[str] = [name for name in ("mixup", "cutmix") if name in self.augmenting.augment]
        soft += ["label_smoothing"] if self.finetuning.label_smoothing else []
        if soft and self.imbalance == "focal" and self.finetune != "none":
            raise ConfigError(
                f"{soft[0]} makes labels soft, which the focal loss cannot take; leave it out "
                "or choose another imbalance"
            )


def to_json(config: Any) -> dict[str, Any]:
    """Turn a configuration into the nested dictionary that is stored beside a model."""
    return dataclasses.asdict(config)


Recipe = Literal["pixelplay", "pixelplay25"]


def original_recipe(**settings: Any) -> TrainConfig:
    """Settings of PixelPlay's first competition entry; those given replace them, `finetune` as a whole.

    ConvNeXt-Tiny fine-tuned in full under a two-layer head, weighted sampling over classes raised
    to equal size, label smoothing, AdamW with cosine annealing, early stopping on validation loss.
    """
    recipe: dict[str, Any] = {
        "finetune": "full",
        "backbone": "convnext_tiny.in12k_ft_in1k",
        "imbalance": "sampler",
        "oversample_to": "largest",
        "finetuning": FinetuneConfig(
            head_init="random",
            head="mlp",
            epochs=30,
            lr=1e-4,
            head_lr=1e-4,
            layer_decay=1.0,
            weight_decay=0.01,
            warmup_frac=0.0,
            label_smoothing=0.1,
            dropout=0.6,
            clip_grad_norm=None,
            hard_example_frac=0.0,
            ensemble_probe="off",
            refit_epochs=0,
            patience=3,
        ),
        "augmenting": AugmentConfig(augment=("crop", "rotation"), crop_scale=0.5),
    }
    return TrainConfig(**{**recipe, **settings})


RECIPES: dict[Recipe, Callable[..., TrainConfig]] = {"pixelplay": TrainConfig, "pixelplay25": original_recipe}
