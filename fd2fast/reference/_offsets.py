"""Row offsets of segments and ragged lists, host values kept on a device, and the type that sums are taken in."""

from collections.abc import Sequence

import torch
from torch import Tensor

Offsets = Tensor | Sequence[int]

_constants: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}
# what a CUDA graph was captured with must outlive the graph
_captured: list[Tensor] = []


def accumulation_dtype(*given: Tensor | torch.dtype) -> torch.dtype:
    """float64 if any tensor or type is float64, else float32: sums, norms and roots are never taken in half."""
    dtypes = (one if isinstance(one, torch.dtype) else one.dtype for one in given)
    return torch.float64 if any(dtype == torch.float64 for dtype in dtypes) else torch.float32


def host_offsets(offsets: Offsets) -> tuple[int, ...] | None:
    """The offsets as ints, or None where reading them would wait for a device or break a traced graph."""
    if isinstance(offsets, Tensor):
        if offsets.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        return tuple(offsets.tolist())
    return tuple(int(o) for o in offsets)


def constant_tensor(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host values as a tensor on `device`: copied there once and kept, because each copy waits for the device."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    key = (tuple(values), dtype, device)
    if key not in _constants:
        if len(_constants) >= 1024:
            _constants.clear()
        _constants[key] = torch.tensor(key[0], dtype=dtype, device=device)
    tensor = _constants[key]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(tensor)
    return tensor


def device_offsets(offsets: Offsets, device: torch.device) -> Tensor:
    """The offsets as an int64 tensor on `device`."""
    if isinstance(offsets, Tensor):
        return offsets.to(device=device, dtype=torch.int64)
    return constant_tensor([int(o) for o in offsets], torch.int64, device)


def equal_length(host: tuple[int, ...] | None) -> int | None:
    """The common length (at least 1) of all segments, or None if they differ or are not known on the host."""
    if host is None or len(host) < 2:
        return None
    length = host[1] - host[0]
    if length < 1 or any(b - a != length for a, b in zip(host[1:], host[2:], strict=False)):
        return None
    return length


def row_owner(offsets: Tensor, rows: int) -> Tensor:
    """int64 [rows]: which segment of int64 offsets [S+1] each row belongs to; no device synchronisation."""
    segments = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(segments, offsets.diff(), output_size=rows)
