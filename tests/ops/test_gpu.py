"""What only a GPU shows: CUDA graphs of the operations, and tensors beyond 2^31 elements."""

import pytest
import torch

from fd2fast import ops

LAST = torch.channels_last


class _Step:
    """One step of the method's shape on static buffers: crop, BN with loss, gradient to the images, Adam and clamp."""

    def __init__(self, device):
        torch.manual_seed(3)
        self.images = torch.randn(3, 3, 5, 5, device=device).to(memory_format=LAST)
        self.moments = [torch.zeros_like(self.images) for _ in range(2)]
        self.channels = [torch.rand(3, device=device) + 0.5 for _ in range(4)]
        self.draw = torch.tensor([[0, 1, 4, 3, 1, 2, 3], [2, 0, 3, 5, 0, 4, 1]], device=device)
        self.rate = torch.tensor(0.1, dtype=torch.float64, device=device)
        self.step = torch.ones((), dtype=torch.int64, device=device)

    def __call__(self, backend):
        images = self.images.detach().requires_grad_()
        view = ops.crop_flip_roll(images, self.draw, [0, 1, 3], 5, backend=backend)
        y, loss = ops.bn_act_matching(view, *self.channels, [0, 1, 3], residual=view, backend=backend)
        (grad,) = torch.autograd.grad(y.square().mean() + loss.sum(), images)
        bounds = {"low": [-2.0] * 3, "high": [2.0] * 3}
        ops.adam_clamp_(
            self.images,
            grad,
            *self.moments,
            self.step,
            lr=self.rate,
            betas=(0.5, 0.9),
            eps=1e-8,
            **bounds,
            backend=backend,
        )

    def advance(self):
        self.step += 1
        self.rate *= 0.5
        self.draw[:, 6] += 1


def test_step_on_the_kernels_is_the_step_on_the_reference(device):
    steps = {backend: _Step(device) for backend in ("triton", "reference")}
    for _ in range(2):
        for backend, step in steps.items():
            step(backend)
            step.advance()
    torch.testing.assert_close(steps["triton"].images, steps["reference"].images, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_captured_step_follows_its_table():
    eager, captured = _Step("cuda"), _Step("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    start = [t.clone() for t in (captured.images, *captured.moments)]
    with torch.cuda.stream(stream):
        captured("triton")  # compiles the kernels and copies the constants
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured("triton")
    torch.cuda.current_stream().wait_stream(stream)
    for tensor, value in zip((captured.images, *captured.moments), start, strict=True):
        tensor.copy_(value)
    for _ in range(3):
        eager("triton")
        eager.advance()
        graph.replay()
        captured.advance()
    torch.cuda.synchronize()
    assert torch.equal(eager.images, captured.images)


def _needs(gigabytes):
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free:.0f} are free")


# 2^31 elements are passed in the last images, which are compared with the same images alone
LARGE = [pytest.param(5, 8, 6, marks=[], id="small"), pytest.param(700, 64, 224, marks=pytest.mark.gpu, id="large")]


@pytest.mark.parametrize(("n", "c", "size"), LARGE)
def test_bn_beyond_32_bits(n, c, size, device):
    if n > 5:
        _needs(32)
    x = torch.empty(n, c, size, size, dtype=torch.bfloat16, device=device, memory_format=LAST)
    for part in x.split(50):
        part.copy_(torch.randn(part.shape, device=device))
    channels = [torch.rand(c, device=device) + 0.5 for _ in range(4)]
    x.requires_grad_()
    y, loss = ops.bn_act_matching(x, *channels, [0, n - 2, n], backend="triton")
    g = torch.ones_like(y)
    (gradient,) = torch.autograd.grad([y, loss], x, [g, torch.ones_like(loss)])
    tail = x[-2:].detach().clone().requires_grad_()
    y2, loss2 = ops.bn_act_matching(tail, *channels, [0, 2], backend="reference")
    (gradient2,) = torch.autograd.grad([y2, loss2], tail, [torch.ones_like(y2), torch.ones_like(loss2)])
    torch.testing.assert_close(y[-2:], y2, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(loss[1:], loss2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient[-2:], gradient2, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("n", "c", "size"), [LARGE[0], pytest.param(14300, 3, 224, marks=pytest.mark.gpu, id="large")])
def test_images_beyond_32_bits(n, c, size, device):
    c = 3
    if n > 5:
        _needs(60)
    images = torch.empty(n, c, size, size, device=device)
    for part in images.split(500):
        part.normal_()
    rows = [[0, 1, size - 2, size - 3, 1, 2, 3]]
    out = ops.crop_flip_roll(images, rows, [0, n], size, backend="triton")
    tail = ops.crop_flip_roll(images[-2:], rows, [0, 2], size, backend="reference")
    torch.testing.assert_close(out[-2:], tail, rtol=0, atol=1e-5)
    grad = out
    settings = {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-8, "low": [-2.0] * 3, "high": [2.0] * 3}
    expected = images[-2:].clone()
    state = [torch.zeros_like(expected) for _ in range(2)]
    ops.adam_clamp_(expected, grad[-2:], *state, 1, **settings, backend="reference")
    moments = [torch.zeros_like(images) for _ in range(2)]
    ops.adam_clamp_(images, grad, *moments, 1, **settings, backend="triton")
    torch.testing.assert_close(images[-2:], expected, rtol=1e-5, atol=1e-5)
