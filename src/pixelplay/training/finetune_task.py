"""FinetuneTask: what planning and training share; builds classifier, inputs, schedule and loss."""

from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from pixelplay.array_types import Float32Array, Float64Array, IntArray
from pixelplay.config import Imbalance, TrainConfig
from pixelplay.data.cache import default_cache_dir
from pixelplay.data.pixel_cache import PixelCache
from pixelplay.data.sampling import class_priors, natural_offset
from pixelplay.model.backbone import Backbone
from pixelplay.model.classifier import (
    Classifier,
    LinearHead,
    TrainableLinearHead,
    TrainableMlpHead,
    feature_scale,
)
from pixelplay.model.cpu_layers import freeze_depthwise_filters
from pixelplay.model.features import resolve_batch_size
from pixelplay.model.split_backbone import FrozenStages, TrainableStages
from pixelplay.training.batch_inputs import AugmentedPixels, CachedViews
from pixelplay.training.imbalance import fit_initial_head, refit_probe_head
from pixelplay.training.linear_probe import LinearProbe
from pixelplay.training.losses import LossFunction, make_loss
from pixelplay.training.plan_file import FinetunePlan
from pixelplay.training.prepare import read_rows
from pixelplay.training.run_context import RunContext
from pixelplay.training.schedule import Schedule
from pixelplay.training.trainer import Validation
from pixelplay.training.training_data import TrainingData

PROBE_REFIT_FRAC = 0.5  # of the time of a probe with its search for C: 0.45 to 0.55 measured
UNCACHED_BYTES = 4 << 30  # for views kept in the run's folder, where the cache is switched off


class FinetuneTask:
    """One fine-tuning: its data, the linear probe it starts from, and its settings.

    Attributes:
        ctx: "auto" imbalance is resolved by the probe.
        train: positions of the training images that duplicate no validation image.
        counts: (K,) images per class in train.
        imbalance: how rare classes are corrected for while training.
        n_networks: networks that share the time budget, each trained without one fold.
    """

    def __init__(
        self, data: TrainingData, probe: LinearProbe, ctx: RunContext, *, n_networks: int = 1
    ) -> None:
        config = ctx.config
        imbalance: Imbalance = config.imbalance
        if imbalance == "auto":
            # with oversampling, the equivalent of a class-weighted probe is sampling classes evenly
            oversamples = config.oversample_to is not None and probe.weighting != "none"
            imbalance = "sampler" if oversamples else probe.weighting
        self.data, self.probe, self.n_networks = data, probe, n_networks
        self.ctx = ctx.derive(config=replace(config, imbalance=imbalance))
        self.train, self.val = data.train_without_val_duplicates(), data.split.val
        self.counts = data.counts_of(self.train)
        self.imbalance = imbalance
        self._cache_dir = config.cache_dir or default_cache_dir()
        self._max_bytes = int(config.cache_gb * 1e9)
        preprocessing = ctx.backbone.preprocessing
        pixels = PixelCache(
            data.dataset, data.digests, preprocessing, cache_dir=self._cache_dir, max_bytes=self._max_bytes
        )
        self.pixels = AugmentedPixels(
            pixels=pixels,
            preprocessing=preprocessing,
            augmenting=config.augmenting,
            hflip=config.hflip,
            device=ctx.device,
            seed=config.seed,
        )

    @property
    def eval_batch_size(self) -> int:
        """Images per batch outside training."""
        size = self.ctx.backbone.preprocessing.input_size
        return resolve_batch_size(self.ctx.config.compute.batch_size, self.ctx.device.name, size)

    def cached_views(self, frozen: FrozenStages, n_views: int, *, use_cache: bool = True) -> CachedViews:
        """Return the feature maps of augmented views, kept in the cache or in the run's folder."""
        in_cache = use_cache and self._max_bytes > 0
        backbone = self.ctx.backbone.backbone
        return CachedViews(
            frozen,
            self.pixels,
            self.data.digests,
            network=(backbone.name, backbone.features),
            cached_views=n_views,
            weights_id=self.ctx.backbone.weights_id,
            cache_dir=self._cache_dir if in_cache else self.ctx.checkpoint_dir,
            max_bytes=self._max_bytes if in_cache else UNCACHED_BYTES,
        )

    def classifier(self, frozen: FrozenStages | None, trainable: TrainableStages) -> Classifier:
        """Create trainable stages and a head that starts from the linear probe."""
        settings, n_classes = self.ctx.config.finetuning, self.data.n_known
        # of all images, so that the weights of networks trained on different folds can be averaged
        features, dropout = self.data.features[self.data.fit_rows], settings.dropout
        # the training loss takes logits before the natural-prior offset
        starts_at_probe = settings.head_init == "probe" and settings.head == "linear"
        start = self._initial_head.shifted(-self.offset(self.train)) if starts_at_probe else None
        with torch.random.fork_rng(devices=self.ctx.device.rng_devices()):
            torch.manual_seed(self.ctx.config.seed)
            head: TrainableLinearHead | TrainableMlpHead
            if settings.head == "mlp":
                head = TrainableMlpHead(features.shape[1], n_classes, dropout=dropout)
            else:
                head = TrainableLinearHead(*feature_scale(features), n_classes, start=start, dropout=dropout)
        if frozen is not None:
            fast = self.ctx.device.name == "cpu"
            freeze_depthwise_filters(trainable, frozen.map_shape, frozen.n_stats, fast=fast)
        return Classifier(trainable, head, drop_path=settings.drop_path)

    @cached_property
    def _initial_head(self) -> LinearHead:
        return fit_initial_head(self.probe, self.data.features[self.train], self.data.labels[self.train])

    def schedule(self, plan: FinetunePlan) -> Schedule:
        """Schedule the training on the training split."""
        return Schedule(
            labels=self.data.labels,
            rows=self.train,
            n_classes=self.data.n_known,
            imbalance=self.imbalance,
            epochs=plan.epochs,
            batch_size=plan.batch_size,
            input_size=self.ctx.backbone.preprocessing.input_size,
            config=self.ctx.config,
        )

    def validation(self) -> Validation:
        """Describe how the validation split selects the epoch."""
        config = self.ctx.config
        return Validation(
            rows=self.val,
            labels=self.data.labels[self.val],
            offset=self.offset(self.train),
            priors=class_priors(self.counts),
            metric=config.metric,
            ensemble_probe=config.finetuning.ensemble_probe,
            probe_logits=self.probe.head.logits(self.data.features[self.val])
            if can_average_with_probe(config)
            else None,
        )

    def loss(self, rows: IntArray) -> LossFunction:
        """Create the loss for training on some images."""
        config = self.ctx.config
        return make_loss(
            self.imbalance,
            self.data.counts_of(rows),
            logit_tau=config.logit_tau,
            focal_gamma=config.focal_gamma,
            label_smoothing=config.finetuning.label_smoothing,
            oversample_to=config.oversample_to,
            device=self.ctx.device.name,
        )

    def offset(self, rows: IntArray) -> Float64Array:
        """Return what gives natural priors, (K,), to logits trained on some images."""
        config = self.ctx.config
        counts = self.data.counts_of(rows)
        own = natural_offset(counts, self.imbalance, config.oversample_to, config.logit_tau)
        return own + self._prior_shift(rows)

    def _prior_shift(self, rows: IntArray) -> Float64Array:
        """Shift from the class frequencies of some images to those of train, which T and tau are for."""
        return np.log(class_priors(self.counts)) - np.log(class_priors(self.data.counts_of(rows)))

    def refit_probe(self, rows: IntArray) -> LinearHead:
        """Fit the probe's head on other images with the same settings."""
        head = refit_probe_head(self.probe, self.data.features[rows], self.data.labels[rows])
        return head.shifted(self._prior_shift(rows))

    def read(self, backbone: Backbone, rows: IntArray) -> Float32Array:
        """Compute features (n, D) of some images as prediction computes them."""
        return read_rows(self.data, rows, self.ctx.extractor(backbone), self.ctx.config)

    def time_limit_s(self, plan: FinetunePlan, *, refit: bool = False, n_left: int = 1) -> float | None:
        """Return the seconds left for training or the refit; None where the budget does not apply.

        Args:
            n_left: networks that still have to be trained in that time.
        """
        ctx = self.ctx
        if ctx.plan is not None or ctx.config.finetuning.epochs is not None:
            return None
        n_test = len(self.data.split.test)
        evaluation_s, refit_s = (plan.seconds.get(name, 0.0) for name in ("evaluation", "refit"))
        # by the time of the refit, validation has been evaluated
        later_s = evaluation_s * n_test / max(1, n_test + len(self.val)) if refit else evaluation_s + refit_s
        return max(0.0, ctx.budget_s - ctx.elapsed_s() - later_s - self.probe_refit_s()) / n_left

    def probe_refit_s(self) -> float:
        """Estimate the seconds of fitting the probe's head again after training."""
        return self.probe.seconds * PROBE_REFIT_FRAC

    @property
    def max_view_bytes(self) -> int:
        """Room for cached views on disk."""
        return (self._max_bytes if self._max_bytes > 0 else UNCACHED_BYTES) // 2


def can_average_with_probe(config: TrainConfig) -> bool:
    """Return True if the linear probe may be averaged in: both heads are linear then."""
    return config.finetuning.head == "linear" and config.finetuning.ensemble_probe != "off"
