"""Forms of a frozen weight that are made once and held until the weight changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

from torch import Tensor


class Held:
    """What was made of one weight, by key. A copy and an unpickled one are empty: oneDNN's tensors can be neither."""

    def __init__(self, most: int | None = None):
        """most: forms that are held at once, the oldest goes first; None: any number."""
        self._most = most
        # the weight is held, so that its address is not given away, with its version
        self._source: tuple[Tensor, int] | None = None
        self._forms: dict[Hashable, Tensor] = {}

    def get(self, weight: Tensor, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The form of this weight under `key`, made by `make` at first use; those of another weight are forgotten."""
        if self._source is None or not _same(*self._source, weight):
            self._forms.clear()
            self._source = weight, weight._version
        form = self._forms.get(key)
        if form is None:
            if self._most is not None and len(self._forms) >= self._most:
                del self._forms[next(iter(self._forms))]
            form = self._forms[key] = make()
        return form

    def values(self) -> Iterable[Tensor]:
        return self._forms.values()

    def clear(self) -> None:
        self._source = None
        self._forms.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"_most": self._most, "_source": None, "_forms": {}}


def _same(known: Tensor, version: int, weight: Tensor) -> bool:
    return known.data_ptr() == weight.data_ptr() and known.dtype == weight.dtype and weight._version == version
