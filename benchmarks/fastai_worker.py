"""Train one fastai setting for compare_fastai.py until its epochs or its time limit are over.

Needs fastai 2.8 or newer and timm, not PixelPlay. The first JSON line on stdout contains versions and the
number of epochs; each epoch adds a line with the seconds since the process was started, validation
accuracy and test accuracy. Nothing is chosen on the test split. The clock stops while it is evaluated,
and during the trial steps that choose the number of epochs for the time limit.

fastai has no bf16 on a CPU (its to_bf16 is for CUDA only), so it computes in fp32, as its users do.

Usage: started by compare_fastai.py.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import fastai
import timm
import torch
from fastai.vision.all import (
    Callback,
    CategoryBlock,
    DataBlock,
    DataLoaders,
    GrandparentSplitter,
    ImageBlock,
    LabelSmoothingCrossEntropy,
    Learner,
    MixUp,
    Normalize,
    Resize,
    ResizeMethod,
    accuracy,
    aug_transforms,
    get_image_files,
    parent_label,
    set_seed,
    vision_learner,
)
from safetensors.torch import load_file
from torch import nn

ARCHITECTURE = "tf_efficientnet_lite0"
MEAN = STD = (0.5, 0.5, 0.5)  # what these weights were trained with
FILL = 0.9  # of the time limit, so that the schedule ends before it
N_TRIAL_STEPS = 4
MIN_EPOCHS = 2  # two of the settings train only the head in the first


class TimeLimitReached(Exception):
    """The time limit is reached."""


class Clock:
    """Measure the time since the process was started, without time that a user would not spend."""

    def __init__(self, started: float) -> None:
        self._started = started
        self._uncounted = 0.0

    def seconds(self) -> float:
        """Return the counted seconds."""
        return time.time() - self._started - self._uncounted

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the clock while the block runs."""
        start = time.time()
        yield
        self._uncounted += time.time() - start


class Reporter(Callback):
    """Print a line after every epoch and stop at the time limit."""

    order = 90  # after the Recorder, which has evaluated val by then

    def __init__(self, setting: str, test: Any, clock: Clock, limit_s: float) -> None:
        self.setting, self.test, self.clock, self.limit_s = setting, test, clock, limit_s
        self.n_epochs_done = 0  # over all fits of the setting; fastai counts each fit separately

    def after_batch(self) -> None:
        """Stop at the time limit."""
        if self.clock.seconds() > self.limit_s:
            raise TimeLimitReached("time limit")  # fastai reads the first argument of exceptions in callbacks

    def after_epoch(self) -> None:
        """Evaluate the test split and print a line."""
        self.n_epochs_done += 1
        seconds = self.clock.seconds()
        with self.clock.stopped():
            test_accuracy = measure(self.learn.model, self.test)
        line = {
            "setting": self.setting,
            "seconds": round(seconds, 1),
            "epoch": self.n_epochs_done,
            "val_accuracy": round(float(self.learn.final_record[-1]), 4),
            "test_accuracy": round(test_accuracy, 4),
        }
        print(json.dumps(line), flush=True)


@torch.no_grad()
def measure(model: nn.Module, loader: Any) -> float:
    """Return the accuracy on a loader's images."""
    model.eval()  # fastai switches back before the next epoch
    hits = [model(images).argmax(1) == labels for images, labels in map(to_tensors, loader)]
    return float(torch.cat(hits).float().mean())


def to_tensors(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert images and labels from fastai's tensor types, which some torch functions refuse."""
    images, labels = batch
    return images.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor)


def make_loaders(args: argparse.Namespace) -> DataLoaders:
    """Load the official train and val splits; images are squashed to the square as in PixelPlay."""
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_items=partial(get_image_files, folders=["train", "val"]),
        splitter=GrandparentSplitter(train_name="train", valid_name="val"),
        get_y=parent_label,
        item_tfms=Resize(args.size, method=ResizeMethod.Squish),
        batch_tfms=[*aug_transforms(), Normalize.from_stats(MEAN, STD, cuda=False)],
    )
    return block.dataloaders(
        args.data, bs=args.batch_size, num_workers=args.threads, device=torch.device("cpu")
    )


def split_in_three(model: nn.Module) -> list[list[nn.Parameter]]:
    """Split into early blocks, late blocks and head for discriminative learning rates."""
    body: Any = model[0].model  # type: ignore[index]
    early = [body.conv_stem, body.bn1, *body.blocks[:4]]
    late = [*body.blocks[4:], body.conv_head, body.bn2]
    return [list(nn.ModuleList(group).parameters()) for group in (early, late, [model[1]])]  # type: ignore[index]


def fine_tune(learn: Learner, n_epochs: int) -> None:
    """Train the head for one epoch, then all layers: fastai's own recipe."""
    learn.fine_tune(n_epochs - 1)


def frozen_then_slices(learn: Learner, n_epochs: int, lr: float = 2e-3) -> None:
    """Train the head for one epoch, then all layers, early blocks at a twentieth of the head's rate."""
    learn.freeze()
    learn.fit_one_cycle(1, lr)
    learn.unfreeze()
    learn.fit_one_cycle(n_epochs - 1, slice(lr / 20, lr))


def one_cycle_mixup(learn: Learner, n_epochs: int) -> None:
    """Train all layers at fastai's default rate with MixUp and label smoothing."""
    learn.unfreeze()
    learn.fit_one_cycle(n_epochs, cbs=MixUp())


SETTINGS: dict[str, tuple[Callable[[Learner, int], None], dict[str, Any]]] = {
    "fine_tune": (fine_tune, {}),
    "frozen_then_slices": (frozen_then_slices, {"splitter": split_in_three}),
    "one_cycle_mixup": (one_cycle_mixup, {"loss_func": LabelSmoothingCrossEntropy()}),
}


def make_learner(loaders: DataLoaders, weights: str, options: dict[str, Any]) -> Learner:
    """Build fastai's default head on the same ImageNet weights."""
    # pretrained=True would download other weights
    learn = vision_learner(loaders, ARCHITECTURE, pretrained=False, metrics=accuracy, **options)
    learn.model[0].model.load_state_dict(load_file(weights), strict=True)
    return learn


def epoch_seconds(learn: Learner) -> float:
    """Estimate the time of an epoch, in s, from a few steps on a copy of the network."""
    model = copy.deepcopy(learn.model).train()
    optimizer = torch.optim.Adam(model.parameters())

    def step(batch: Any) -> None:
        images, labels = to_tensors(batch)
        learn.loss_func(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def evaluate(batch: Any) -> None:
        with torch.no_grad():
            model(to_tensors(batch)[0])

    total = 0.0
    for work, loader in ((step, learn.dls.train), (evaluate, learn.dls.valid)):
        start = time.perf_counter()
        batches = iter(loader)
        first = next(batches)
        total += time.perf_counter() - start  # every epoch starts its loading processes again
        work(first)  # the first is slower than the rest
        rest = list(islice(batches, N_TRIAL_STEPS)) or [first]
        start = time.perf_counter()
        for batch in rest:
            work(batch)
        total += (time.perf_counter() - start) / len(rest) * len(loader)
    return total


def main() -> None:
    """Train one setting."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--setting", choices=list(SETTINGS), required=True)
    parser.add_argument("--weights", required=True, help=f".safetensors with timm's keys of {ARCHITECTURE}")
    parser.add_argument("--started", type=float, required=True, help="time.time() before the process")
    parser.add_argument("--limit-s", type=float, required=True)
    parser.add_argument("--epochs", type=int, help="default: as many as the time limit allows")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--channels-last", action="store_true", help="fastai's to_channelslast()")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    clock = Clock(args.started)
    torch.set_num_threads(args.threads)
    set_seed(args.seed, reproducible=True)
    loaders = make_loaders(args)
    test = loaders.test_dl(get_image_files(args.data / "test"), with_labels=True)
    fit, options = SETTINGS[args.setting]
    learn = make_learner(loaders, args.weights, options)
    if args.channels_last:
        learn.to_channelslast(use_amp=False)
    n_epochs = args.epochs
    if n_epochs is None:
        with clock.stopped():
            per_epoch = epoch_seconds(learn)
        n_epochs = int((FILL * args.limit_s - clock.seconds()) / per_epoch)
        set_seed(args.seed, reproducible=True)
    n_epochs = max(MIN_EPOCHS, n_epochs)
    versions = {"fastai": fastai.__version__, "torch": torch.__version__, "timm": timm.__version__}
    print(json.dumps({**versions, "n_epochs": n_epochs}), flush=True)
    learn.add_cb(Reporter(args.setting, test, clock, args.limit_s))
    try:
        with learn.no_bar(), learn.no_logging():
            fit(learn, n_epochs)
    except TimeLimitReached:
        pass


if __name__ == "__main__":
    main()
