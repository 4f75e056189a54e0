"""RunContext: the settings, device, folder, clock and log of one training."""

import copy
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pixelplay.config import StrPath, TrainConfig, parse_duration, parse_size
from pixelplay.data.decode import MAX_VALUE
from pixelplay.model.backbone import (
    Backbone,
    PretrainedBackbone,
    check_backbone_name,
    load_backbone,
    resolve_backbone_names,
)
from pixelplay.model.device import Device, resolve_device
from pixelplay.model.features import FeatureExtractor, make_extractor
from pixelplay.run_log import RunLog
from pixelplay.training.plan_file import FinetunePlan
from pixelplay.training.resume import check_settings, load_plan
from pixelplay.training.run_dir import new_run_dir
from pixelplay.training.settings_conflicts import check_compatible


@dataclass(kw_only=True)
class RunContext:
    """Settings, log and device that every stage of training needs, without the data."""

    config: TrainConfig
    device: Device
    run_dir: str  # folder of the run while it is written
    log: RunLog
    started: float  # monotonic clock time from which the time budget counts
    plan: FinetunePlan | None = None  # to repeat; None to make one
    max_value: float = MAX_VALUE  # of white in images with more than 8 bits
    # "backbone" and "fit" → why they were selected, where there were several candidates
    input_evidence: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def open(
        cls,
        out_dir: StrPath,
        config: TrainConfig,
        log: RunLog,
        *,
        force: bool,
        resume: bool,
        started: float | None = None,
        plan: StrPath | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> "Iterator[RunContext]":
        """Check settings and the output folder; on success the folder of the run appears under its name.

        Args:
            plan: plan.json of another run to repeat.
            options: settings of the command that are not part of `config`; a resumed run must repeat them.
        """
        started = time.monotonic() if started is None else started
        repeated, config = (None, config) if plan is None else load_plan(os.fspath(plan), config, log)
        check_compatible(config)
        with new_run_dir(os.fspath(out_dir), force=force, resume=resume) as run_dir:
            device = resolve_device(config.compute)
            _set_cublas_workspace(config, device)
            ctx = cls(config=config, device=device, run_dir=run_dir, log=log, started=started, plan=repeated)
            check_settings(ctx.checkpoint_dir, config, device, repeated, log, options)
            yield ctx

    @property
    def backbone_names(self) -> tuple[str, ...]:
        """The backbones among which one is selected; ConfigError for an unknown name."""
        names = resolve_backbone_names(self.config.backbone, self.device.name, offline=self.config.offline)
        for name in names:
            check_backbone_name(name)
        return names

    @cached_property
    def backbone(self) -> PretrainedBackbone:
        """The pretrained backbone, loaded on first use; the first of several."""
        return self.load_backbone(self.backbone_names[0])

    def load_backbone(self, name: str) -> PretrainedBackbone:
        """Load a pretrained backbone with the configured features, input size and fit."""
        size, fit = self.config.input_size, self.config.fit
        loaded = load_backbone(
            name,
            self.config.weights,
            offline=self.config.offline,
            features="stages" if self.config.finetuning.head == "linear" else "pooled",
            input_size=None if size is None else parse_size(size),
            fit="squash" if fit == "auto" else fit,
        )
        return replace(loaded, preprocessing=replace(loaded.preprocessing, max_value=self.max_value))

    @property
    def checkpoint_dir(self) -> str:
        """Folder of the resumable state."""
        return os.path.join(self.run_dir, "checkpoint")

    def derive(self, **changes: Any) -> "RunContext":
        """Copy the context with some attributes changed; a loaded backbone is shared."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def extractor(self, backbone: Backbone) -> FeatureExtractor:
        """Create the feature extractor of a backbone, as prediction on this device uses it."""
        return make_extractor(backbone, self.backbone.preprocessing, self.config, self.device)

    def elapsed_s(self) -> float:
        """Return the seconds of the time budget that have passed."""
        return time.monotonic() - self.started

    @property
    def budget_s(self) -> float:
        """The time budget in seconds."""
        return parse_duration(self.config.time_budget)


def _set_cublas_workspace(config: TrainConfig, device: Device) -> None:
    """Allow reproducible matrix products before the first; see cuBLAS, "Results reproducibility"."""
    if config.finetuning.deterministic and device.name == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
