"""The two gates that a kernel's outputs and gradients pass against the float64 reference and plain torch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# relative RMS error against the float64 reference (gate 1) and 1 - cosine of gradients, by input type
RELATIVE_RMS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
COSINE_LOSS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-5, torch.bfloat16: 1e-4}
# gate 2 allows twice the error of plain torch in the same type plus this share of the largest value
TINY = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS(actual - expected) / RMS(expected); 0 where both are exactly 0, NaN where actual is not finite."""
    error = (_double(actual) - _double(expected)).square().mean().sqrt().item()
    size = _double(expected).square().mean().sqrt().item()
    if error == 0:
        return 0.0
    return error / size if size > 0 else float("inf")


def check_output(actual: Tensor, expected: Tensor, plain: Tensor, dtype: torch.dtype, *, name: str = "output") -> None:
    """Assert both gates: `actual` (kernel), `expected` (float64 reference), `plain` (plain torch in `dtype`).

    dtype: the type of the inputs, which sets the tolerances. Raises AssertionError naming the gate and the numbers.
    """
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)}, wanted {list(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    rms = relative_rms(actual, expected)
    assert rms <= RELATIVE_RMS[dtype], f"{name}: relative RMS {rms:.2e} > {RELATIVE_RMS[dtype]:.0e} ({dtype})"
    if actual.numel() == 0:
        return
    worst = (_double(actual) - _double(expected)).abs().max().item()
    allowed = 2 * (_double(plain) - _double(expected)).abs().max().item()
    allowed += TINY[dtype] * _double(expected).abs().max().item()
    assert worst <= allowed, f"{name}: largest error {worst:.2e} > {allowed:.2e}, twice plain torch's ({dtype})"


def check_gradient(
    actual: Tensor | None, expected: Tensor, plain: Tensor, dtype: torch.dtype, *, name: str = "gradient"
) -> None:
    """check_output, and the direction: 1 - cosine(actual, expected) within its table."""
    assert actual is not None, f"{name}: no gradient"
    check_output(actual, expected, plain, dtype, name=name)
    a, e = _double(actual).flatten(), _double(expected).flatten()
    sizes = (a.norm() * e.norm()).item()
    if sizes == 0:
        return
    cosine = (a @ e).item() / sizes
    assert 1 - cosine <= COSINE_LOSS[dtype], f"{name}: 1 - cosine = {1 - cosine:.2e} > {COSINE_LOSS[dtype]:.0e}"


def check_kernel(
    operation: Callable[..., Any], inputs: Sequence[Tensor], dtype: torch.dtype, *, grads: Sequence[int] = (0,)
) -> tuple[Any, list[Tensor]]:
    """Assert both gates for the Triton backend's output and its gradients to inputs[i], i in grads.

    operation(*inputs, backend=...): the operation with everything else bound, giving a tensor or a tuple of them; dtype:
    the type that sets the tolerances. The gradients of the outputs are random. Returns the kernel's output and gradients.
    """
    grad_outputs: list[Tensor] = []
    results = []
    for backend, double in (("reference", True), ("reference", False), ("triton", False)):
        # copies: an operation in place must find the same start each time
        given = [(t.double() if double and t.is_floating_point() else t).detach().clone() for t in inputs]
        given = [t.requires_grad_() if i in grads else t for i, t in enumerate(given)]
        output = operation(*given, backend=backend)
        outputs = output if isinstance(output, tuple) else (output,)
        grad_outputs = grad_outputs or [torch.randn_like(o) for o in outputs]
        matching = [g.to(o.dtype) for g, o in zip(grad_outputs, outputs, strict=True)]
        found = torch.autograd.grad(outputs, [given[i] for i in grads], matching) if grads else ()
        results.append((output, [o.detach() for o in outputs], found))
    (_, expected, expected_grads), (_, plain, plain_grads), (output, actual, actual_grads) = results
    for a, e, p in zip(actual, expected, plain, strict=True):
        assert a.dtype == p.dtype, f"output is {a.dtype}, wanted {p.dtype}"
        check_output(a, e, p, dtype)
    for i, a, e, p in zip(grads, actual_grads, expected_grads, plain_grads, strict=True):
        assert a.dtype == inputs[i].dtype, f"gradient {i} is {a.dtype}, wanted {inputs[i].dtype}"
        check_gradient(a, e, p, dtype, name=f"gradient to input {i}")
    return (tuple(actual) if isinstance(output, tuple) else actual[0]), list(actual_grads)
