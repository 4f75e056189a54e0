"""RunContext: reproducible algorithms on a GPU."""

import os

import pytest

from pixelplay.config import FinetuneConfig, TrainConfig
from pixelplay.model.device import Device
from pixelplay.training.run_context import _set_cublas_workspace


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_fixes_cublas_workspaces_on_a_gpu(
    deterministic: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    config = TrainConfig(finetuning=FinetuneConfig(deterministic=deterministic))
    _set_cublas_workspace(config, Device(name=device, precision="fp32"))
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == (deterministic and device == "cuda")


def test_deterministic_keeps_cublas_workspaces_set_by_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"CUBLAS_WORKSPACE_CONFIG": ":16:8"})
    config = TrainConfig(finetuning=FinetuneConfig(deterministic=True))
    _set_cublas_workspace(config, Device(name="cuda", precision="fp32"))
    assert os.environ == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
