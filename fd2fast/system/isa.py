"""Which instruction set the CPU kernels of torch, oneDNN and fd2fast run with here, and what caps it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fd2fast.errors import UserError

NAMES = {1: "no AVX2, fp32", 3: "AVX2 fp32", 4: "AVX-512 fp32", 5: "AVX-512 bf16"}
_TORCH = {"DEFAULT": 1, "NO AVX": 1, "AVX2": 3, "AVX512": 5}
# oneDNN's names below the two that matter here; others are beyond
_ONEDNN = {
    **dict.fromkeys(("SSE41", "AVX"), 1),
    **dict.fromkeys(("AVX2", "AVX2_VNNI", "AVX2_VNNI_2"), 3),
    **dict.fromkeys(("AVX512_CORE", "AVX512_CORE_VNNI"), 4),
}
_ONEDNN_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_OWN_VARIABLES = ("FD2FAST_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY")


@dataclass(frozen=True)
class Instructions:
    """Levels of the kernels: 1 any processor, 3 AVX2, 4 AVX-512, 5 AVX-512 with bf16; as the processor has it, and capped."""

    processor: int
    own: int
    onednn: int
    torch: int

    @property
    def level(self) -> int:
        """The lowest in force."""
        return min(self.own, self.onednn, self.torch)

    @property
    def name(self) -> str:
        """The instruction set and the arithmetic that is fast with it."""
        return NAMES[self.level]


def detect() -> Instructions:
    """What is in force in this process. Raises UserError for a cap of ours that is unknown."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    try:
        from fd2fast import _frozen
    except ImportError:
        bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        level = min(_TORCH.get(capability, 1), 5 if bf16 is not None and bf16() else 4)
        return Instructions(level, level, min(level, _onednn_cap()), level)
    processor = _frozen.processor_level()
    try:
        own = _frozen.level()
    except ValueError as error:
        raise UserError(str(error)) from error
    return Instructions(
        processor,
        own,
        min(processor, _onednn_cap()),
        min(processor, _TORCH.get(capability, 1)),
    )


def _onednn_cap() -> int:
    given = next((os.environ[name] for name in _ONEDNN_VARIABLES if os.environ.get(name)), "")
    return _ONEDNN.get(given.upper(), 5)


def describe() -> list[str]:
    """Lines for people: what the processor has and, where less is in force, for whom and by which variable."""
    found = detect()
    lines = [f"instruction set: {found.name} (the processor has {NAMES[found.processor]})"]
    for who, level, variables in (
        ("fd2fast's kernels", found.own, _OWN_VARIABLES),
        ("oneDNN", found.onednn, _ONEDNN_VARIABLES),
        ("torch", found.torch, _OWN_VARIABLES[1:]),
    ):
        if level < found.processor:
            by = next((f"{name}={os.environ[name]}" for name in variables if os.environ.get(name)), "its own choice")
            lines.append(f"  {who}: {NAMES[level]}, capped by {by}")
    return lines
