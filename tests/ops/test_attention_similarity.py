"""The attention_similarity_loss kernels against the reference: ragged and empty lists, equal and zero maps, layouts."""

import pytest
import torch

from bench.numerics import check_kernel
from fd2fast import ops
from fd2fast.ops import attention_similarity_loss

LAST = torch.channels_last
# M, H, W: one entry, prime sizes, above and below the blocks of 1024 and 2048
MAPS = [(1, 1, 1), (3, 5, 7), (8, 7, 7), (5, 21, 23)]
LISTS = {"one": [0, 1], "ragged": [0, 0, 2, 3, 6], "last empty": [0, 4, 4], "all": [0, 2, 4]}


def _inputs(offsets, m, h, w, dtype=torch.float32, device="cpu"):
    attention, prior = torch.rand(len(offsets) - 1, m, h, w), torch.rand(offsets[-1], m, h, w)
    return attention.to(device, dtype), prior.to(device, dtype), torch.tensor(offsets, device=device)


@pytest.mark.parametrize("lists", LISTS)
@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference(lists, maps, dtype, device):
    check_kernel(attention_similarity_loss, _inputs(LISTS[lists], *maps, dtype, device), dtype)


def test_other_types(device):
    attention, prior, offsets = _inputs(LISTS["ragged"], 2, 3, 3, device=device)
    check_kernel(attention_similarity_loss, [attention.half(), prior.half(), offsets.int()], torch.float16)
    check_kernel(attention_similarity_loss, [attention, prior.bfloat16(), offsets], torch.float32)


@pytest.mark.parametrize("of", [list, tuple])
def test_offsets_of_python(of, device):
    attention, prior, offsets = _inputs(LISTS["ragged"], 2, 3, 3, device=device)
    check_kernel(
        lambda a, p, backend: attention_similarity_loss(a, p, of(offsets.tolist()), backend=backend),
        [attention, prior],
        torch.float32,
    )


def test_empty_lists_give_zero_and_no_gradient(device):
    attention, prior, offsets = _inputs(LISTS["ragged"], 2, 3, 3, device=device)
    loss, (grad,) = check_kernel(attention_similarity_loss, [attention, prior, offsets], torch.float32)
    assert loss[0] == 0
    assert (grad[0] == 0).all()
    assert (loss[1:] > 0).all()
    none = torch.zeros(5, dtype=torch.int64, device=device)
    loss, (grad,) = check_kernel(attention_similarity_loss, [attention, prior[:0], none], torch.float32)
    assert (loss == 0).all()
    assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_maps_are_at_distance_zero_and_pull_nowhere(dtype, device):
    attention, prior, offsets = _inputs([0, 2, 3], 3, 4, 4, dtype, device)
    prior[:2] = attention[0]
    loss, (grad,) = check_kernel(attention_similarity_loss, [attention, prior, offsets], dtype)
    assert loss[0] == 1
    assert (grad[0] == 0).all()
    assert (grad[1] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_maps(dtype, device):
    attention, prior, offsets = _inputs([0, 2, 4, 6], 3, 4, 4, dtype, device)
    attention[0] = 0
    prior[0] = 0
    prior[2] = 0
    check_kernel(attention_similarity_loss, [attention, prior, offsets], dtype)


def test_layouts_differ_and_have_gaps(device):
    attention, prior, offsets = _inputs(LISTS["ragged"], 4, 6, 5, device=device)
    _, (grad,) = check_kernel(
        attention_similarity_loss, [attention.to(memory_format=LAST), prior, offsets], torch.float32
    )
    assert grad.is_contiguous(memory_format=LAST)
    check_kernel(attention_similarity_loss, [attention, prior.to(memory_format=LAST), offsets], torch.float32)
    check_kernel(attention_similarity_loss, [attention[:, ::2, 1:], prior[:, ::2, 1:], offsets], torch.float32)


def test_no_samples(device):
    attention, prior, offsets = _inputs([0], 2, 3, 3, device=device)
    attention.requires_grad_()
    loss = attention_similarity_loss(attention, prior, offsets, backend="triton")
    assert loss.shape == (0,)
    loss.sum().backward()
    assert attention.grad.shape == attention.shape


def test_gradcheck_of_the_kernel():
    attention, prior, offsets = _inputs([0, 2, 2, 3], 2, 1, 3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda a: attention_similarity_loss(a, prior, offsets, backend="triton"), attention.requires_grad_()
    )


# opcheck itself reads the gradient of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(device):
    attention, prior, offsets = _inputs(LISTS["ragged"], 2, 2, 3, device=device)
    given = (attention.to(memory_format=LAST).requires_grad_(), prior.to(memory_format=LAST), offsets, 1e-6)
    torch.library.opcheck(torch.ops.fd2fast.attention_similarity_loss, given)


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_whole_graph(backend, as_list, device):
    torch._dynamo.reset()
    attention, prior, offsets = _inputs(LISTS["ragged"], 2, 2, 3, device=device)
    attention.requires_grad_()
    given = LISTS["ragged"] if as_list else offsets

    def loss(a):
        return ops.attention_similarity_loss(2 * a, prior, given, backend=backend).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if device.type == "cpu" else "inductor")
    expected, actual = loss(attention), compiled(attention)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, attention), torch.autograd.grad(expected, attention))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maps", [(8, 7, 7), (32, 7, 7), (64, 28, 28), (13, 17, 13)])
def test_real_sizes_on_the_gpu(maps, dtype, device):
    lengths = torch.arange(100) % 4
    offsets = [0, *lengths.cumsum(0).tolist()]
    inputs = _inputs(offsets, *maps, dtype, device)
    first, _ = check_kernel(attention_similarity_loss, inputs, dtype)
    assert torch.equal(first, attention_similarity_loss(*inputs, backend="triton"))
