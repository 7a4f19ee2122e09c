"""Compiles kernels for sm_90 without a GPU and reports registers, shared memory and spills."""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from fd2fast.kernels._common import Compilation, with_ones
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers per thread, shared bytes per block, stack bytes per thread (spills).

    atomics: atomic operations in it, whose order a result would depend on.
    """

    title: str
    registers: int
    shared: int
    spills: int
    atomics: int


def compilations() -> list[Compilation]:
    """Every committed configuration of every kernel module, and each kernel once more with ones for sizes and strides."""
    found: list[Compilation] = []
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.name.startswith("_"):
            found += importlib.import_module(f".{module.name}", __package__).compilations()
    first = {compilation.kernel.__name__: compilation for compilation in reversed(found)}
    return found + [with_ones(compilation) for compilation in first.values()]


def compile_sm90(compilation: Compilation) -> Resources:
    """Compile for an H100 or H200. Needs TRITON_INTERPRET unset when the kernels were imported."""
    constexprs = compilation.constexprs
    signature = {
        name: "constexpr" if name in constexprs else compilation.signature[name]
        for name in compilation.kernel.arg_names
    }
    divisible = [
        (i,) for i, name in enumerate(signature) if name in compilation.divisible or signature[name].startswith("*")
    ]
    source = ASTSource(
        fn=compilation.kernel,
        signature=signature,
        constexprs=constexprs,
        attrs={index: [["tt.divisibility", 16]] for index in divisible},
    )
    options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages}
    options["enable_fp_fusion"] = compilation.fp_fusion
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    spills, atomics = used["STACK"] + used["LOCAL"], compiled.asm["ttir"].count("tt.atomic")
    return Resources(compilation.title, used["REG"], compiled.metadata.shared, spills, atomics)


def main() -> None:
    """Print one JSON object a line for every configuration; arguments keep kernels whose name contains one of them."""
    for compilation in compilations():
        if len(sys.argv) == 1 or any(word in compilation.kernel.__name__ for word in sys.argv[1:]):
            print(json.dumps(asdict(compile_sm90(compilation))), flush=True)


if __name__ == "__main__":
    main()
