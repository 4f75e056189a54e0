"""TODO."""

import os
from dataclasses import dataclass

from pixelplay.model.device import Device
from pixelplay.training.plan import FinetunePlan


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Where a training happens.

    Attributes:
        folder: of the run, while it is made.
        device: where the network runs.
        started: when the command began, on the monotonic clock.
        plan: to be repeated; None to make one.
    """

    folder: str
    device: Device
    started: float
    plan: FinetunePlan | None

    @property
    def checkpoints(self) -> str:
        """Folder of the resumable state."""
        return os.path.join(self.folder, "checkpoint")
