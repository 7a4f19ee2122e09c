"""The parameters of the coming iterations: rows on the host, or device buffers that an iteration reads and advances itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# int values of one crop, flip and roll
COLUMNS = 7
_LEAST_ROWS = 64


class Row(NamedTuple):
    """What one iteration is given: draws int [segments, 7], learning rate, Adam's step number (from 1 in each phase)."""

    draws: Tensor
    rate: float | Tensor
    number: int | Tensor


class HostTable:
    """Rows on the host: an iteration works with their values."""

    def __init__(self) -> None:
        self._first = 0
        self._draws = torch.zeros(0, 0, COLUMNS, dtype=torch.int32)
        self._rates: list[float] = []
        self._numbers: list[int] = []
        self._at = 0

    def __len__(self) -> int:
        return len(self._rates)

    def load(self, draws: Tensor, rates: Tensor, numbers: Tensor, first: int) -> bool:
        """Take draws int [T, segments, 7], rates float64 [T], numbers int64 [T] of the iterations from `first` on; copied.

        Returns whether buffers that a captured graph may know have moved.
        """
        self._first, self._draws = first, draws.clone()
        self._rates, self._numbers = rates.tolist(), numbers.tolist()
        return False

    def covers(self, iteration: int) -> bool:
        """Whether the table has this iteration's row."""
        return self._first <= iteration < self._first + len(self)

    def seek(self, iteration: int) -> None:
        """Make this iteration's row the current one."""
        self._at = iteration - self._first

    def row(self) -> Row:
        """The current row."""
        return Row(self._draws[self._at], self._rates[self._at], self._numbers[self._at])

    def advance(self) -> None:
        """Part of an iteration: on to the next row. Here `seek` does it."""

    def settle(self, advanced: bool) -> None:
        """Told by the host after an iteration: whether it ran to its end."""


class DeviceTable:
    """Rows in static buffers on the device, read at a position there, so that a captured graph needs no value from the host.

    A row is one line of int64: draws, the bits of the float64 rate, the step number.
    """

    def __init__(self, segments: int, device: torch.device):
        self._segments, self._device = segments, device
        self._first, self._count = 0, 0
        # the position on the device as the host knows it; None: unknown
        self._known: int | None = None
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self._rows = self._empty(_LEAST_ROWS)
        self._staging: list[tuple[Tensor, torch.cuda.Event]] = []
        self._turn = 0

    def __len__(self) -> int:
        return self._count

    def _empty(self, rows: int) -> Tensor:
        return torch.zeros(rows, self._segments * COLUMNS + 2, dtype=torch.int64, device=self._device)

    def load(self, draws: Tensor, rates: Tensor, numbers: Tensor, first: int) -> bool:
        """As HostTable.load; does not wait for the device but for the copy before the last."""
        count = len(rates)
        moved = count > len(self._rows)
        if moved:
            self._rows, self._staging = self._empty(count), []
        lines = torch.empty(count, self._rows.shape[1], dtype=torch.int64)
        lines[:, :-2] = draws.reshape(count, -1)
        lines[:, -2] = rates.view(torch.int64)
        lines[:, -1] = numbers
        self._upload(lines)
        self._first, self._count, self._known = first, count, None
        return moved

    def _upload(self, lines: Tensor) -> None:
        if self._device.type != "cuda":
            self._rows[: len(lines)].copy_(lines)
            return
        if not self._staging:
            shape = tuple(self._rows.shape)
            for _ in range(2):
                self._staging.append((torch.empty(shape, dtype=torch.int64, pin_memory=True), torch.cuda.Event()))
        buffer, copied = self._staging[self._turn]
        self._turn = 1 - self._turn
        copied.synchronize()
        buffer[: len(lines)].copy_(lines)
        self._rows[: len(lines)].copy_(buffer[: len(lines)], non_blocking=True)
        copied.record()

    def covers(self, iteration: int) -> bool:
        """Whether the table has this iteration's row."""
        return self._first <= iteration < self._first + self._count

    def seek(self, iteration: int) -> None:
        """Make this iteration's row the current one; does nothing where the device has come there by itself."""
        if self._known != iteration:
            self.position.fill_(iteration - self._first)
            self._known = iteration

    def row(self) -> Row:
        """The current row, read on the device."""
        line = self._rows.index_select(0, self.position)[0]
        return Row(line[:-2].view(self._segments, COLUMNS), line[-2:-1].view(torch.float64)[0], line[-1])

    def advance(self) -> None:
        """Part of an iteration: on to the next row, on the device."""
        self.position.add_(1)

    def settle(self, advanced: bool) -> None:
        """Told by the host after an iteration: whether it ran to its end."""
        self._known = self._known + 1 if advanced and self._known is not None else None


Table = HostTable | DeviceTable
