"""Every setting with its type, range, default and help text; recipes are named sets of values."""

import dataclasses
import functools
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from tyro.conf import DisallowNone, arg

from pixelplay.errors import ConfigError
from pixelplay.text import suggest

StrPath = str | os.PathLike[str]
Metric = Literal["accuracy", "balanced_accuracy", "macro_f1"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
FinetuneMethod = Literal["auto", "none", "partial", "full"]
Imbalance = Literal["auto", "none", "sampler", "class_weights", "balanced_softmax", "logit_adjusted", "focal"]
HeadInit = Literal["probe", "random"]
HeadKind = Literal["linear", "mlp"]
Switch = Literal["auto", "on", "off"]
AUGMENTATIONS = ("crop", "rotation", "erasing", "mixup", "cutmix")
ConformalScore = Literal["lac", "aps"]
Tta = Literal["none", "flip"]
CamName = Literal["gradcam", "gradcam++", "layercam"]
ExportFormat = Literal["onnx", "openvino"]
SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
MIN_INPUT_PX, MAX_INPUT_PX = 16, 4096
ENOUGH_FOR_VAL = 3000  # images of which a fraction is enough to compare methods
MIN_MLP_BATCH = 3  # batch norm needs two images, and the last batch may be one smaller than the others


@dataclass(frozen=True)
class Range:
    """Allowed values of a number, used by its check and its help text; `closed` includes the bounds."""

    low: float
    high: float
    closed: bool = True

    def check(self, name: str, value: object, *, whole: bool = False) -> None:
        """Raise ConfigError unless a setting is a number in this range.

        NumPy integers are refused, because JSON cannot store them.
        """
        if not isinstance(value, int if whole else int | float):
            kind = "whole" if whole else "plain"
            raise ConfigError(f"{name}={value!r} is outside its range {self}: it must be a {kind} number")
        inside = self.low <= value <= self.high if self.closed else self.low < value < self.high
        if not inside:  # NaN is in no range
            raise ConfigError(f"{name}={value!r} is outside its range {self}")

    def __str__(self) -> str:
        return f"{self.low} to {self.high}" + ("" if self.closed else ", both excluded")


FRACTION = Range(0, 1)
SHARE = Range(0, 1, closed=False)
COUNT = Range(1, 10_000)
REPEATS = Range(1, 20)
DROP_RATE = Range(0, 0.99)
LEARNING_RATE = Range(1e-8, 10)


def metavar(word: str) -> object:
    """Set the placeholder of an option in the help; a default of None is not shown."""
    return arg(
        metavar=word, help_behavior_hint=lambda value: "" if value == "None" else f"(default: {value})"
    )


Flag = Annotated[bool, arg(help_behavior_hint="")]
# DisallowNone: the text "None" is a name like any other; for numbers it switches the setting off
File = DisallowNone[Annotated[str | None, metavar("FILE")]]
Folder = DisallowNone[Annotated[str | None, metavar("FOLDER")]]
Column = DisallowNone[Annotated[str | None, metavar("COLUMN")]]


def parse_duration(text: str) -> float:
    """Convert 90s, 5m or 2h to seconds.

    Raises:
        ConfigError: another notation, or zero.
    """
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", str(text).strip())
    seconds = float(matched[1]) * {"s": 1, "m": 60, "h": 3600}[matched[2]] if matched else 0.0
    if not seconds:
        raise ConfigError(f"time_budget={text!r} is not a duration; use 90s, 5m or 2h")
    return seconds


def parse_size(text: str) -> tuple[int, int]:
    """Convert 224 or 224x384 to height and width.

    Raises:
        ConfigError: another notation, or a side out of range.
    """
    matched = re.fullmatch(r"(\d+)(?:\s*[x×]\s*(\d+))?", str(text).strip())
    if not matched:
        raise ConfigError(f"input_size={text!r} is not a size; use 224 or 224x384 (height x width)")
    height, width = int(matched[1]), int(matched[2] or matched[1])
    for side in (height, width):
        Range(MIN_INPUT_PX, MAX_INPUT_PX).check("input_size", side, whole=True)
    return height, width


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ConfigError unless a setting has one of the listed values."""
    if value not in choices:
        hint = suggest(value, choices) if isinstance(value, str) else ""
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(choices)}{hint}")


@functools.cache
def field_types(owner: Any) -> dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Split the annotation of each field, or argument, into the types it allows and its metadata.

    Returns:
        name → (types, metadata); `Annotated[int | None, COUNT]` gives ((int, NoneType), (COUNT,)).
    """
    found = {}
    for name, hint in get_type_hints(owner, include_extras=True).items():
        base, *metadata = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        allowed = get_args(base) if get_origin(base) in (Union, types.UnionType) else (base,)
        found[name] = (allowed, tuple(metadata))
    return found


def check_fields(config: Any) -> None:
    """Raise ConfigError for the first setting that contradicts its annotation: choices, range or group."""
    for name, (allowed, metadata) in field_types(config.__class__).items():
        value = getattr(config, name)
        choices = [choice for kind in allowed if get_origin(kind) is Literal for choice in get_args(kind)]
        range_ = next((each for each in metadata if isinstance(each, Range)), None)
        if value is None and types.NoneType in allowed:
            continue
        if choices and (range_ is None or isinstance(value, str)):
            check_choice(name, value, choices)
        elif range_ is not None:
            range_.check(name, value, whole=int in allowed)
        elif dataclasses.is_dataclass(kind := cast(type, allowed[0])) and not isinstance(value, kind):
            raise ConfigError(f"{name}={value!r} is not a {kind.__name__}; pass {kind.__name__}(...)")


def _store_paths_as_text(config: object, *names: str) -> None:
    """Replace path objects in a frozen configuration by strings, as in its JSON."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not isinstance(value, str | os.PathLike):
            raise ConfigError(f"{name}={value!r} is not a path; pass a string")
        if value is not None:
            object.__setattr__(config, name, os.fsdecode(value))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where paths, labels, splits and groups come from."""

    path_column: Column = None
    """Table column with the image paths (default: found by its usual names)."""
    label_column: Column = None
    """Table column with the labels (default: found by its usual names)."""
    split_column: Column = None
    """Table column with train, val or test (default: found by its usual names)."""
    missing_label: DisallowNone[Annotated[str | None, metavar("WORD")]] = None
    """Label that means there is none (default: nan, None, NA, null, - and the like; '': no word)."""
    group_column: Column = None
    """Table column with groups that must not be divided between splits: patient, camera, burst."""
    group_regex: DisallowNone[Annotated[str | None, metavar("REGEX")]] = None
    """Regular expression on the path; its first parenthesis, or the whole match, is the group."""
    group_by_folder: Flag = False
    """Use the folders below each class folder as groups."""
    images_dir: Folder = None
    """Folder that the paths or ids of a table are relative to (default: the folder of the table)."""

    def __post_init__(self) -> None:
        _store_paths_as_text(self, "images_dir")
        if self.group_regex is not None:
            try:
                re.compile(self.group_regex)
            except (re.error, OverflowError, RecursionError) as error:
                raise ConfigError(f"group_regex={self.group_regex!r} is invalid: {error}") from None
        if (self.group_column is not None) + (self.group_regex is not None) + self.group_by_folder > 1:
            raise ConfigError("use only one of group_column, group_regex and group_by_folder")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Device, precision, batch size and threads."""

    device: Annotated[Device, metavar("DEVICE")] = "auto"
    """Device to run on: auto (the first available of cuda, mps, cpu), cpu, cuda, mps."""
    precision: Annotated[Precision, metavar("DTYPE")] = "auto"
    """Precision: auto (bf16 where the device supports it natively), fp32, bf16."""
    batch_size: Annotated[int | None, metavar("N"), Range(1, 4096)] = None
    """Batch size outside training, per core on a CPU (default: 32; 8 on a CPU with 224 px)."""
    num_workers: Annotated[int | None, metavar("N"), Range(1, 256)] = None
    """Threads that read and decode images (default: one per core, at most 16)."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class UncertaintyConfig:
    """Prediction sets and abstention; each adds a column to the table of predictions."""

    coverage: Annotated[float | None, metavar("SHARE"), SHARE] = None
    """Add prediction_set: classes that include the true one for this fraction of images."""
    conformal_score: Annotated[ConformalScore, metavar("SCORE")] = "lac"
    """Score behind prediction sets: lac (smallest on average), aps (larger for harder images)."""
    min_confidence: Annotated[float | None, metavar("PROB"), FRACTION] = None
    """Add abstained: true where the probability of the predicted class is lower."""
    target_accuracy: Annotated[float | None, metavar("SHARE"), SHARE] = None
    """Add abstained, with the confidence that reaches this accuracy on held-out images."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.min_confidence is not None and self.target_accuracy is not None:
            raise ConfigError("use only one of min_confidence and target_accuracy to abstain")
        if self.conformal_score != "lac" and self.coverage is None:
            score = f"conformal_score={self.conformal_score!r}"
            raise ConfigError(f"{score} has no effect without coverage; add --coverage 0.9")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of partial and full fine-tuning; none of them affects a linear probe."""

    head_init: Annotated[HeadInit, metavar("INIT")] = "probe"
    """Initial weights of a linear head: probe (the linear probe), random; an mlp head starts random."""
    head: Annotated[HeadKind, metavar("HEAD")] = "linear"
    """Head: linear (on features of several stages), mlp (one hidden layer on the last stage)."""
    epochs: Annotated[int | None, metavar("N"), COUNT] = None
    """Training epochs, whatever the time budget (default: as many as it allows)."""
    cached_views: Annotated[int | None, metavar("N"), COUNT] = None
    """partial: augmented views of each image to cache (default: by time budget and cache)."""
    unfreeze_stages: Annotated[int | None, metavar("N"), COUNT] = None
    """partial: last backbone stages to train (default: by time budget and cache)."""
    train_batch_size: Annotated[int | None, metavar("N"), COUNT] = None
    """Training batch size (default: 32; with CUDA 128, or what fits in memory)."""
    lr: Annotated[float | None, metavar("LR"), LEARNING_RATE] = None
    """Peak learning rate of the last stage, for a batch size of 32 (default: 1e-3; full: 2e-4)."""
    head_lr: Annotated[float, metavar("LR"), LEARNING_RATE] = 5e-4
    """Peak learning rate of the head; both rates scale with the square root of the batch size."""
    layer_decay: Annotated[float | None, metavar("FACTOR"), Range(0.01, 1)] = None
    """Factor on the learning rate from each stage to the one before it (default: 1; full: 0.7)."""
    weight_decay: Annotated[float, metavar("RATE"), Range(0, 10)] = 0.05
    """AdamW weight decay; norms, biases and layer scales have none."""
    warmup_frac: Annotated[float, metavar("FRACTION"), DROP_RATE] = 0.3
    """Fraction of the steps with linear warm-up; cosine decay to 0 follows."""
    label_smoothing: Annotated[float, metavar("FRACTION"), DROP_RATE] = 0.0
    """Fraction of each label that is spread over all classes by their frequency in training."""
    dropout: Annotated[float, metavar("FRACTION"), DROP_RATE] = 0.0
    """Dropout rate on the features before the head."""
    drop_path: Annotated[float, metavar("FRACTION"), DROP_RATE] = 0.0
    """Stochastic depth: rate of dropped residual branches in the last stage."""
    hard_example_frac: Annotated[float, metavar("FRACTION"), Range(0, 0.9)] = 0.5
    """Fraction of each epoch reserved for hard examples, with decreasing weight; unused with mixup."""
    clip_grad_norm: Annotated[float | None, metavar("NORM"), Range(1e-6, 1e6)] = 1.0
    """Maximum gradient norm; None does not clip."""
    grad_accum_steps: Annotated[int, metavar("N"), Range(1, 1024)] = 1
    """Batches whose gradients are accumulated for each optimizer step."""
    initial_size_frac: Annotated[float, metavar("FRACTION"), Range(0.25, 1)] = 1.0
    """full: initial image size as a fraction of the final size; it grows in between."""
    ensemble_probe: Annotated[Switch, metavar("MODE")] = "auto"
    """Average the logits with those of the linear probe: auto (validation decides), on, off."""
    refit_epochs: Annotated[int, metavar("N"), Range(0, 1000)] = 2
    """Short final epochs that also train on the validation images; 0 disables them."""
    patience: Annotated[int | None, metavar("EPOCHS"), COUNT] = None
    """Early stopping: epochs without a lower validation loss (default: off)."""
    deterministic: Flag = False
    """Reproducible weights with CUDA, at some cost in speed; always on with a CPU."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.head != "mlp":
            return
        if self.train_batch_size is not None:
            Range(MIN_MLP_BATCH, COUNT.high).check("train_batch_size", self.train_batch_size)
        if self.ensemble_probe == "on":
            raise ConfigError("ensemble_probe='on' needs a linear head, not head='mlp'; remove one of them")

    def rates(self, *, full: bool) -> tuple[float, float]:
        """Return `lr` and `layer_decay`, with the defaults of the method where they are None."""
        return self.lr or (2e-4 if full else 1e-3), self.layer_decay or (0.7 if full else 1.0)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of training images; `hflip` of TrainConfig controls horizontal flips."""

    augment: Annotated[tuple[str, ...], arg(metavar="[NAME ...]")] = ("crop",)
    """Any of crop, rotation, erasing, mixup, cutmix; an empty list switches augmentation off."""
    crop_scale: Annotated[float, metavar("FRACTION"), Range(0.01, 1)] = 0.7
    """crop: smallest fraction of the image area that a crop covers."""
    rotation_deg: Annotated[float, metavar("DEGREES"), Range(0, 180)] = 15.0
    """rotation: largest angle in either direction."""
    erasing_prob: Annotated[float, metavar("FRACTION"), FRACTION] = 0.25
    """erasing: probability that a rectangle is replaced by noise."""
    mixup_alpha: Annotated[float, metavar("ALPHA"), Range(0.01, 100)] = 0.2
    """mixup: parameter of the Beta distribution; larger values mix two images more evenly."""
    cutmix_alpha: Annotated[float, metavar("ALPHA"), Range(0.01, 100)] = 1.0
    """cutmix: parameter of the Beta distribution of the patch area."""
    mix_prob: Annotated[float, metavar("FRACTION"), FRACTION] = 0.5
    """mixup and cutmix: fraction of the batches that are mixed."""
    mix_off_frac: Annotated[float, metavar("FRACTION"), FRACTION] = 0.2
    """mixup and cutmix: fraction of the steps at the end without mixing."""

    def __post_init__(self) -> None:
        if isinstance(self.augment, str):
            raise ConfigError(f"augment={self.augment!r} is a string; pass a tuple, ({self.augment!r},)")
        for name in self.augment:
            check_choice("augment", name, AUGMENTATIONS)
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings for training a classifier."""

    metric: Annotated[Metric, metavar("METRIC")] = "accuracy"
    """Selection metric, by which settings are chosen: accuracy, balanced_accuracy, macro_f1."""
    finetune: Annotated[FinetuneMethod, metavar("METHOD")] = "auto"
    """auto (by time budget), none (linear probe), partial, full."""
    time_budget: Annotated[str, metavar("TIME")] = "10m"
    """Training time, in crossval per fold: 90s, 5m, 2h."""
    backbone: Annotated[str, metavar("NAME")] = "auto"
    """auto (lite0; on a GPU ConvNeXt-Tiny), lite0, lite2, any timm model; of several, separated by commas,
    or best (a short list), the one whose linear probe has the lowest out-of-fold log loss."""
    weights: File = None
    """Local .safetensors or .pth file with the weights of --backbone."""
    input_size: Annotated[str | None, metavar("PX")] = None
    """Size of the network's input in pixels, 224 or HEIGHTxWIDTH (default: as the weights were trained)."""
    bit_range: Annotated[int | None, metavar("BITS"), Range(1, 32)] = None
    """Bits that images with more than 8 bits per channel use, such as 12 (default: found from all images)."""
    fit: Annotated[Literal["squash", "pad", "crop", "auto"], metavar("FIT")] = "squash"
    """How images are fitted into the input: squash (changes the aspect ratio), pad, crop, auto (if most
    images have another aspect ratio, the one whose linear probe has the lowest out-of-fold log loss)."""
    classes: File = None
    """File with the classes expected in the test data: a list, `class,count` rows, a sample submission."""
    relabel: File = None
    """Table of paths and corrected labels, such as an edited label_issues.csv; an empty label excludes."""
    drop_label_issues: Flag = False
    """Exclude training images whose label looks wrong to a cross-validated linear probe."""
    hflip: Annotated[
        bool, arg(help="Do not mirror images (text, digits, arrows).", help_behavior_hint="")
    ] = True
    """Mirrored images have the same label; switch off for text, digits, arrows."""
    near_duplicates: Annotated[
        bool,
        arg(
            help="Do not search for near-duplicates (resized, cropped, mirrored or edited) before splitting.",
            help_behavior_hint="",
        ),
    ] = True
    """Keep near-duplicates (resized, cropped, mirrored or otherwise edited) in one split."""
    imbalance: Annotated[Imbalance, metavar("METHOD")] = "auto"
    """Handling of rare classes: auto, none, sampler, class_weights, balanced_softmax, logit_adjusted, focal;
    auto is class_weights beyond 5:1 if cross-validation agrees."""
    logit_tau: Annotated[float, metavar("TAU"), Range(0, 10)] = 1.0
    """Strength of --imbalance logit_adjusted; 1 equals balanced_softmax."""
    focal_gamma: Annotated[float, metavar("GAMMA"), Range(0, 20)] = 2.0
    """Exponent of --imbalance focal: larger values give less weight to easy images."""
    oversample_to: Annotated[int | Literal["largest"] | None, metavar("N"), Range(1, 1_000_000)] = None
    """Repeat images of smaller classes up to N per epoch, or largest; with imbalance auto, none, sampler."""
    test_frac: Annotated[float, metavar("FRACTION"), Range(0, 0.9)] = 0.2
    """Fraction held out for testing if there is no test split."""
    val_frac: Annotated[float | None, metavar("FRACTION"), Range(0.01, 0.9)] = None
    """Fraction of the rest held out for validation in fine-tuning if there is no val split (default: below
    3,000 images none, out-of-fold predictions select; else 0.15)."""
    n_folds: Annotated[int, metavar("N"), Range(2, 20)] = 5
    """Cross-validation folds: of crossval, and of the linear probe to choose C, temperature and tau."""
    seed: Annotated[int, metavar("N"), Range(0, 2**32 - 1)] = 0
    """Random seed."""
    cache_dir: Folder = None
    """Cache folder (default: the user's cache folder)."""
    cache_gb: Annotated[float, metavar("GB"), Range(0, 1_000_000)] = 4.0
    """Maximum size of the cache in gigabytes; 0 disables it."""
    offline: Flag = False
    """Never use the network, not even to download missing weights."""
    finetuning: FinetuneConfig = field(default_factory=FinetuneConfig)
    augmenting: AugmentConfig = field(default_factory=AugmentConfig)
    reading: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        _store_paths_as_text(self, "weights", "classes", "relabel", "cache_dir")
        check_fields(self)
        parse_duration(self.time_budget)
        if self.input_size is not None:
            parse_size(self.input_size)
        self._check_contradictions()

    def validation_frac(self, n_images: int) -> float:
        """Return the fraction to hold out for validation; 0 where out-of-fold predictions select.

        Several networks can only be averaged if they start from the same head, and early stopping needs a
        validation split.
        """
        settings = self.finetuning
        starts_alike = settings.head == "linear" and settings.head_init == "probe"
        is_averaged = starts_alike and settings.patience is None
        if self.val_frac is None and is_averaged and n_images < ENOUGH_FOR_VAL:
            return 0.0
        return self.val_frac or 0.15

    def _check_contradictions(self) -> None:
        head, oversample = self.finetuning.head, f"oversample_to={self.oversample_to!r}"
        if self.weights is not None and (self.backbone == "best" or "," in self.backbone):
            raise ConfigError(f"weights needs one backbone, not backbone={self.backbone!r}; name one")
        if self.oversample_to is not None:
            if self.imbalance not in ("auto", "none", "sampler"):
                raise ConfigError(
                    f"{oversample} does not work with imbalance={self.imbalance!r}; use one of them (None "
                    "disables the first)"
                )
            if self.finetune == "none":
                raise ConfigError(f"{oversample} has no effect on a linear probe; use --finetune partial")
        if self.finetune in ("none", "auto") and head != "linear":
            raise ConfigError(f"head={head!r} needs fine-tuning; use --finetune partial or full")
        soft: list[str] = [name for name in ("mixup", "cutmix") if name in self.augmenting.augment]
        soft += ["label_smoothing"] * bool(self.finetuning.label_smoothing)
        if soft and self.imbalance == "focal" and self.finetune != "none":
            raise ConfigError(
                f"{soft[0]} makes soft labels, unsupported by imbalance='focal'; remove one of them"
            )


def with_settings(config: TrainConfig | None, settings: Mapping[str, Any]) -> TrainConfig:
    """Return a configuration with some settings changed, those of its groups included.

    Args:
        config: None for the defaults.
        settings: by the names of the command line, with underscores.

    Raises:
        ConfigError: an unknown setting; the nearest names are suggested.
    """
    config = config or TrainConfig()
    groups: dict[str, Any] = {
        k: value for k, value in vars(config).items() if dataclasses.is_dataclass(value)
    }
    home = {name: group for group, value in groups.items() for name in vars(value)}
    changed: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        if name not in home and name not in vars(config):
            hint = suggest(name, [*vars(config), *home])
            raise ConfigError(f"unknown setting {name!r}{hint}")
        changed.setdefault(home.get(name, ""), {})[name] = value
    own = changed.pop("", {})
    own |= {group: dataclasses.replace(groups[group], **values) for group, values in changed.items()}
    return dataclasses.replace(config, **own)


Recipe = Literal["pixelplay", "pixelplay25"]


def original_recipe(**settings: Any) -> TrainConfig:
    """Return the settings of PixelPlay's first competition entry (2025).

    ConvNeXt-Tiny, fully fine-tuned with a two-layer head: weighted sampling over classes raised to
    equal size, label smoothing, AdamW with cosine annealing, early stopping on the validation loss.

    Args:
        settings: fields of TrainConfig that replace those of the recipe; `finetuning` as a whole.
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
