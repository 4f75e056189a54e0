"""What planning and training are put together from: parts, views, network, job."""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from pixelplay.arrays import Float32Array, Float64Array, IntArray
from pixelplay.config import TrainConfig, parse_duration
from pixelplay.data.cache import ArrayCache, default_cache_dir
from pixelplay.data.pixel_cache import PixelCache
from pixelplay.data.sampling import class_priors, epoch_length, natural_offset
from pixelplay.data.splits import assign_folds
from pixelplay.model.backbone import Backbone, PretrainedBackbone
from pixelplay.model.classifier import (
    Classifier,
    LinearHead,
    TrainableLinearHead,
    TrainableMlpHead,
    feature_scale,
)
from pixelplay.model.cpu_layers import freeze_depthwise_filters
from pixelplay.model.features import FeatureExtractor, extract_features_of, make_extractor, pick_batch_size
from pixelplay.model.split_backbone import SplitBackbone
from pixelplay.training.imbalance import ImbalanceProbe, fit_probe_for_imbalance, refit_probe_head
from pixelplay.training.inputs import AugmentedPixels, CachedViews, InputSource
from pixelplay.training.losses import make_loss
from pixelplay.training.plan import AIM, FinetunePlan, WorkAmount
from pixelplay.training.run_context import Workplace
from pixelplay.training.schedule import Job
from pixelplay.training.training_data import TrainingData

ONE_FIT = 0.5  # of the time of a probe, whose strength is searched in folds: 0.45 to 0.55 measured
UNKEPT_BYTES = 4 << 30  # of views beside the run, where the cache is switched off


class Bench:
    """Everything about one tuning that its plan does not say.

    Attributes:
        train: positions in the material that are learned from.
        val: positions that choose.
        learn: both, and the copies of `val` that are kept out of `train`.
        counts: (K,) images of each class in train.
        imbalance: how rare classes are helped; a re-trained head comes later.
        pixels: source of augmented pixels.
    """

    def __init__(
        self,
        data: TrainingData,
        loaded: PretrainedBackbone,
        probe: ImbalanceProbe,
        config: TrainConfig,
        workplace: Workplace,
    ) -> None:
        if config.imbalance == "auto":
            # a class-weighted probe stands for even classes; raised ones are drawn evenly as they are
            is_raised = config.oversample_to is not None and probe.imbalance != "none"
            config = replace(config, imbalance="sampler" if is_raised else probe.imbalance)
        self.train, self.val = data.train_without_val_duplicates(), data.split.val
        self.fit_rows = data.fit_rows
        self.counts = data.counts_of(self.train)
        # a re-trained head comes later; until then nothing is corrected
        self.imbalance = "none" if config.imbalance == "crt" else config.imbalance
        self.data, self.loaded, self.probe = data, loaded, probe
        self.config, self.workplace = config, workplace
        self._cache_dir = config.cache_dir or default_cache_dir()
        self._max_bytes = int(config.cache_gb * 1e9)
        storage = PixelCache(
            data.dataset,
            data.digests,
            loaded.preprocessing,
            cache_dir=self._cache_dir,
            max_bytes=self._max_bytes,
        )
        self.pixels = AugmentedPixels(
            pixels=storage,
            preprocessing=loaded.preprocessing,
            augmenting=config.augmenting,
            hflip=config.hflip,
            device=workplace.device,
            seed=config.seed,
        )

    @property
    def batch_size(self) -> int:
        """Images that the network sees at once where it does not learn."""
        size = self.loaded.preprocessing.input_size
        return pick_batch_size(self.config.compute.batch_size, self.workplace.device.name, size)

    def views(self, stages: SplitBackbone, cached_views: int, *, has_cache: bool = True) -> CachedViews:
        """Views in front of a cut: in the cache, or beside the run where there is none."""
        is_kept = has_cache and self._max_bytes > 0
        backbone = self.loaded.backbone
        return CachedViews(
            stages,
            self.pixels,
            self.data.digests,
            network=(backbone.name, backbone.features),
            cached_views=cached_views,
            weights_id=self.loaded.weights_id,
            cache_dir=self._cache_dir if is_kept else self.workplace.checkpoints,
            max_bytes=self._max_bytes if is_kept else UNKEPT_BYTES,
        )

    def classifier(self, stages: SplitBackbone, *, compile: bool) -> Classifier:
        """Tail and head, ready to train."""
        settings, n_classes = self.config.finetuning, self.data.n_known
        features = self.data.features[self.train]
        with torch.random.fork_rng(devices=self.workplace.device.generators()):
            torch.manual_seed(self.config.seed)
            head: TrainableLinearHead | TrainableMlpHead
            if settings.head == "mlp":
                head = TrainableMlpHead(features.shape[1], n_classes, dropout=settings.dropout)
            else:
                head = TrainableLinearHead(
                    *feature_scale(features),
                    n_classes,
                    # the loop works on logits before they are made natural
                    start=self.probe.probe.head.shifted(-self.offset(self.train))
                    if settings.head_init == "probe"
                    else None,
                    dropout=settings.dropout,
                )
        if stages.front is not None:
            # the compiler finds ways of its own
            is_shortened = self.workplace.device.name == "cpu" and not compile
            freeze_depthwise_filters(stages, is_shortened=is_shortened)
        return Classifier(stages.tail, head, drop_path=settings.drop_path)

    def job(self, source: InputSource, plan: FinetunePlan, *, is_refit: bool = False) -> Job:
        """What the loop does, before the short last epochs or in them."""
        config = self.config
        limit_s = None
        if self.workplace.plan is None and config.finetuning.epochs is None:
            budget_s = parse_duration(config.time_budget)
            spent = time.monotonic() - self.workplace.started
            reading_s, refit_s = (plan.seconds.get(name, 0.0) for name in ("reading and measuring", "refit"))
            # validation has been read when the last epochs begin
            to_come_s = reading_s * self._share_read_last() if is_refit else reading_s + refit_s
            limit_s = max(0.0, budget_s - spent - to_come_s - self.fits_to_come_s())
        probe_logits = self.probe.probe.head.logits(self.data.features[self.val])
        rows = self.fit_rows if is_refit else self.train
        return Job(
            source=source,
            labels=self.data.labels,
            train=rows,
            val=self.val,
            offset=self.offset(rows),
            loss=make_loss(
                self.imbalance,
                self.data.counts_of(rows),
                logit_tau=config.logit_tau,
                focal_gamma=config.focal_gamma,
                label_smoothing=config.finetuning.label_smoothing,
                oversample_to=config.oversample_to,
                device=self.workplace.device.name,
            ),
            imbalance=self.imbalance,
            config=config,
            epochs=plan.epochs,
            batch_size=plan.batch_size,
            compile=plan.compile,
            limit_s=limit_s,
            device=self.workplace.device,
            input_size=self.loaded.preprocessing.input_size,
            beside=probe_logits if may_answer_together(config) else None,
        )

    def offset(self, rows: IntArray) -> Float64Array:
        """What makes logits natural that were learned from some rows, (K,); natural is what train has."""
        config = self.config
        own = natural_offset(
            self.data.counts_of(rows), self.imbalance, config.oversample_to, config.logit_tau
        )
        return own + self._shift(rows)

    def _shift(self, rows: IntArray) -> Float64Array:
        """From the class mix of some rows to that of train, (K,): temperature and tau belong to it."""
        return np.log(class_priors(self.counts)) - np.log(class_priors(self.data.counts_of(rows)))

    def refit_probe(self, rows: IntArray) -> LinearHead:
        """The probe's head, fitted again on other rows in the same way and with the same strength."""
        head = refit_probe_head(self.probe, self.data.features[rows], self.data.labels[rows])
        return head.shifted(self._shift(rows))

    def refit_head(self, backbone: Backbone, rows: IntArray) -> LinearHead:
        """Classifier re-training: a class-balanced head on what the tuned backbone makes of some rows.

        Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition",
        ICLR 2020, arXiv:1910.09217, section 4.1.
        """
        labels, groups = self.data.labels[rows], self.data.split.groups[rows]
        folds = assign_folds(labels, groups, self.config.n_folds, self.config.seed)
        fair = fit_probe_for_imbalance(
            self.read(backbone, rows), labels, groups, folds, self.config, head_only=True
        )
        return fair.probe.head.shifted(self._shift(rows))

    def read(self, backbone: Backbone, rows: IntArray) -> Float32Array:
        """Features (n, D) of images as prediction will make them."""
        extractor = make_extractor(backbone, self.loaded.preprocessing, self.config, self.workplace.device)
        return read_rows(self.data, rows, extractor, self.config)

    def amount(self) -> WorkAmount:
        """How much work there is."""
        config = self.config
        free = self._max_bytes if self._max_bytes > 0 else UNKEPT_BYTES
        n_final = len(self.val) + len(self.data.split.test)
        if self.config.imbalance == "crt":  # the head is fitted again before and after the last epochs
            n_final += len(self.train) + len(self.fit_rows)
        n_epoch = epoch_length(self.counts, self.imbalance, config.oversample_to)
        refit_epochs = config.finetuning.refit_epochs
        return WorkAmount(
            n_train=len(self.fit_rows if refit_epochs else self.train),
            n_epoch=n_epoch,
            n_refit=refit_epochs * round(n_epoch * len(self.fit_rows) / len(self.train)),
            n_val=len(self.val),
            n_final=n_final * (2 if config.hflip else 1),
            max_view_bytes=free // 2,
        )

    def _share_read_last(self) -> float:
        """Share of the test part in what is read with the finished network."""
        n_test = len(self.data.split.test)
        return n_test / max(1, n_test + len(self.val))

    def fits_to_come_s(self) -> float:
        """Seconds of fitting heads after the training; crt searches for a strength again, twice."""
        return self.probe.seconds * (2.0 if self.config.imbalance == "crt" else ONE_FIT)

    def left_s(self) -> float:
        """Seconds that are left of what is aimed at of the time budget."""
        spent = time.monotonic() - self.workplace.started
        return AIM * parse_duration(self.config.time_budget) - spent - self.fits_to_come_s()


def may_answer_together(config: TrainConfig) -> bool:
    """Whether the probe may answer beside the tuned network: both heads are linear then."""
    return config.finetuning.head == "linear" and config.finetuning.ensemble_probe != "off"


def read_rows(
    data: TrainingData,
    rows: IntArray,
    extractor: FeatureExtractor,
    config: TrainConfig,
    on_progress: Callable[[int], object] = lambda n: None,
) -> Float32Array:
    """Features (n, D) of some images of the material, read anew.

    Raises:
        ImageError: one of them can no longer be read.
    """
    where = np.zeros(len(data.dataset), dtype=np.bool_)
    where[rows] = True
    no_cache = ArrayCache("", "features", "", max_bytes=0)
    found = extract_features_of(
        data.dataset.select(where),
        extractor,
        no_cache,
        num_workers=config.compute.num_workers,
        on_progress=on_progress,
    )
    for error in found.errors.values():
        raise error
    return found.values[np.searchsorted(np.flatnonzero(where), rows)]
