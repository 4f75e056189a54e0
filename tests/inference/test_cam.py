import pytest
import torch

from networks import shared_backbone
from pixelplay.config import CamName
from pixelplay.inference.cam import CAM_METHODS, sum_maps
from pixelplay.model.stage_hooks import StageHooks

METHOD_NAMES: tuple[CamName, ...] = ("gradcam", "gradcam++", "layercam")


def test_cam_methods_equal_their_formulas() -> None:
    maps = torch.tensor([[[[1.0, 2.0]], [[0.0, 3.0]]]])  # (1, 2, 1, 2)
    gradients = torch.tensor([[[[0.5, -1.0]], [[2.0, 1.0]]]])
    found = {name: CAM_METHODS[name](maps, gradients)[0, 0].tolist() for name in METHOD_NAMES}
    assert found["gradcam"] == [-0.5 * 1, -0.5 * 2 + 3 * 3]
    assert found["layercam"] == [2 * (0.5 * 1 + 0), 2 * (0 + 1 * 3)]
    first = 0.25 / (2 * 0.25 + 3 * 0.125) * 0.5  # alpha · relu(gradient), sum of the channel's map 3
    second = 4 / (2 * 4 + 3 * 8) * 2 + 1 / (2 * 1 + 3 * 1) * 1
    assert found["gradcam++"] == pytest.approx([first, 2 * first + 3 * second])


def test_gradcam_sums_to_the_logit_of_pooled_features() -> None:
    backbone = shared_backbone("test_convnext")
    hooks = StageHooks(backbone, 4, (64, 64))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (24, 32, 48, 64)]
    with hooks() as outputs:
        backbone(images)
        maps = hooks.as_maps(outputs.values())
        gradients = [
            torch.autograd.grad((a.mean(dim=(2, 3)) @ w[: a.shape[1]]).sum(), a, retain_graph=True)[0]
            for a, w in zip(maps, weights, strict=True)
        ]
        logits = sum(a.mean(dim=(2, 3)) @ w[: a.shape[1]] for a, w in zip(maps, weights, strict=True))
    densities = [CAM_METHODS["gradcam"](a.detach(), g) for a, g in zip(maps, gradients, strict=True)]
    total = sum_maps(densities, (64, 64)).mean(dim=(1, 2))
    torch.testing.assert_close(total, logits.detach(), rtol=1e-4, atol=1e-4)
