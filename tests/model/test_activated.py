"""What activated.py promises: the convolution and then the activation, whoever does it."""

import pytest
import torch
from torch import nn

from pixelplay.model import fusion as activated
from pixelplay.model.fusion import ActivatedConv2d, convolve, is_listed

ACTIVATIONS = [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish()]


@pytest.fixture(params=[True, False])
def is_there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both with oneDNN's one pass and where it is missing."""
    if not request.param:
        monkeypatch.setattr(activated, "_has_one_pass", lambda dtype: False)
    return bool(request.param)


def make_conv(kernel: int, stride: int, groups: int, *, bias: bool) -> nn.Conv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, kernel, stride, kernel // 2, groups=groups, bias=bias)
    nn.init.normal_(conv.weight, std=2.0)  # beyond 6 too
    return conv


def test_another_signature_is_no_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(activated._NAMES, nn.ReLU6, ("a name of tomorrow", []))
    activated._has_one_pass.cache_clear()
    assert not activated._has_one_pass(torch.float32)
    activated._has_one_pass.cache_clear()


def test_this_machine_has_the_one_pass() -> None:
    assert activated._has_one_pass(torch.float32) == torch.backends.mkldnn.is_available()


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kernel", "stride", "groups", "bias"), [(1, 1, 1, True), (3, 2, 8, False)])
def test_one_pass_makes_what_two_make(
    activation: nn.Module, kernel: int, stride: int, groups: int, bias: bool, is_there: bool
) -> None:
    conv = make_conv(kernel, stride, groups, bias=bias)
    images = torch.randn(2, 8, 11, 11)
    expected = activation(conv(images))
    assert is_listed(activation)
    found = convolve(
        images,
        conv.weight,
        conv.bias,
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
        groups=groups,
        activation=activation,
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ActivatedConv2d(conv, activation)(images), expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()])
def test_in_bf16_rectifiers_change_no_bit(activation: nn.Module, is_there: bool) -> None:
    conv = make_conv(3, 1, 1, bias=True)
    images = torch.randn(2, 8, 11, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = activation(conv(images)), ActivatedConv2d(conv, activation)(images)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_an_activation_without_a_name_follows_the_convolution() -> None:
    conv, images = make_conv(1, 1, 1, bias=False), torch.randn(2, 8, 5, 5)
    sides = {"stride": (1, 1), "padding": (0, 0), "groups": 1}
    assert not is_listed(nn.Tanh())
    assert not is_listed(None)
    for activation in (nn.Tanh(), None):
        found = convolve(images, conv.weight, None, **sides, activation=activation)  # type: ignore[arg-type]
        expected = conv(images) if activation is None else activation(conv(images))
        torch.testing.assert_close(found, expected)
