"""One iteration: view, losses and gradients of each teacher, adjoint of the view, update; asks nothing of the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fd2fast import ops
from fd2fast.step.losses import Losses
from fd2fast.step.schedule import Task
from fd2fast.step.state import State
from fd2fast.step.tables import Table
from fd2fast.step.update import Update


class Iteration:
    """Reads the table's current row and changes the state in place, so that it can be recorded and replayed."""

    def __init__(self, losses: Losses, update: Update, offsets: Sequence[int]):
        self._losses, self._update, self._offsets = losses, update, tuple(offsets)
        # of the images, at the last iteration
        self.gradient: Tensor | None = None

    def run(self, state: State, tasks: Sequence[Task], table: Table) -> Tensor:
        """The losses [segments, columns] before the update, on the device, without a graph."""
        self.gradient = None  # not beside the activations
        row = table.row()
        images = state.images.detach().requires_grad_(True)
        # as the one teacher reads it; several teachers' gradients are summed in the images' own type
        dtype = self._losses.teachers[tasks[0].teacher].dtype if len(tasks) == 1 else images.dtype
        view = ops.crop_flip_roll(
            images, row.draws, self._offsets, images.shape[-1], dtype=dtype, memory_format=torch.channels_last
        )
        seen = view.detach().requires_grad_(True)  # teachers run back one by one, the adjoint of the view runs once
        shape = (len(self._offsets) - 1, len(self._losses.columns))
        losses = torch.zeros(shape, dtype=self._losses.dtype, device=images.device)
        for task in tasks:
            part = task.part
            own = self._losses.of(task, seen if part.rows is None else seen.index_select(0, part.rows))
            if task.weights is not None:
                own = own * task.weights[:, None]
            self._update.scaled(own[:, 0], state, part.index).sum().backward()
            losses.index_add_(0, part.index, own.detach())
        (gradient,) = torch.autograd.grad(view, images, seen.grad)
        del view, seen
        self.gradient = self._update(state, gradient, row.rate, row.number)
        table.advance()
        return losses
