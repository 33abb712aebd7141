"""The kernels as machine code, for GPUs that are not there: registers, spills, shared memory.

    python -m shardlens.bench.compiled [--capability 80 86 89 90 100 120] [--save compiled]

Runs every operation on meta tensors of true model shapes, compiles each kernel that would be
launched, in each configuration, and reads the machine code. Needs Triton and no GPU; not to be
run with TRITON_INTERPRET set.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import Chip, implementation, pretending
from .kernels import OPS
from .report import argument_parser, emit, environment

LAUNCHES = {name: launch for op in OPS.values() for name, launch in op.launches.items()}

# A100; A10, RTX 30; L4, L40S, RTX 40; H100, H200; B200; RTX 50.
CHIPS = {
    80: Chip(80, 108),
    86: Chip(86, 84),
    89: Chip(89, 142),
    90: Chip(90, 132),
    100: Chip(100, 148),
    120: Chip(120, 170),
}
# Square roots and divisions that are not correctly rounded.
APPROXIMATE = re.compile(r"\b(?:sqrt|rsqrt|rcp|div)\.(?:approx|full)")
INSTRUCTIONS = ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "LDGSTS", "FFMA")
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Compiled:
    """A kernel in one configuration. Spills are instructions that touch local memory;
    approximations are square roots and divisions that may miss the last bit.
    """

    case: str
    kernel: str
    capability: int
    options: str
    registers: int
    spills: int
    shared_bytes: int
    shared_limit_bytes: int  # of the chip, for one program
    approximations: int
    instructions: dict[str, int]


def compile_cases(capability: int, cases: Iterable[str] = tuple(LAUNCHES)) -> list[Compiled]:
    """Compile what the named cases launch; every distinct kernel once."""
    found: dict[Any, Compiled] = {}
    for name in cases:

        def on_launch(
            kernel: Any, arguments: Any, options: dict[str, Any], name: str = name
        ) -> None:
            key = _source(kernel, arguments, options)
            if repr(key) not in found:
                found[repr(key)] = _compile(name, kernel, capability, *key)

        with implementation("triton"), pretending(CHIPS[capability], on_launch):
            LAUNCHES[name](torch.device("meta"))
    return list(found.values())


def _source(
    kernel: Any, arguments: Any, options: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], list[str], dict[str, Any]]:
    """(types, constants, names divisible by 16, compiler options), as Triton's launcher would."""
    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False))
    given |= {name: value for name, value in options.items() if name in names}
    types, constants, divisible = {}, {}, []
    for name, parameter in zip(names, kernel.params, strict=True):
        value = given[name]
        is_one = isinstance(value, int) and not isinstance(value, bool) and value == 1
        if parameter.is_constexpr or value is None or is_one:
            types[name], constants[name] = "constexpr", value
            continue
        types[name] = _type_of(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            divisible.append(name)
    return types, constants, divisible, {n: v for n, v in options.items() if n not in names}


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"


def _compile(
    case: str,
    kernel: Any,
    capability: int,
    types: dict[str, str],
    constants: dict[str, Any],
    divisible: list[str],
    options: dict[str, Any],
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    index = {name: number for number, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        types,
        {(index[name],): value for name, value in constants.items()},
        {(index[name],): [["tt.divisibility", 16]] for name in divisible},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (_dump(flag, file.name) for flag in ("--dump-resource-usage", "--dump-sass"))
    counts = {op: len(re.findall(rf"\b{op}\b", code)) for op in (*INSTRUCTIONS, "LDL", "STL")}
    shown = {n: v for n, v in constants.items() if isinstance(v, int) and n.isupper()} | options
    register_count = re.search(r"REG:(\d+)", usage)
    assert register_count is not None, usage
    return Compiled(
        case=case,
        kernel=kernel.fn.__name__,
        capability=capability,
        options=" ".join(f"{n}={int(v)}" for n, v in shown.items()),
        registers=int(register_count[1]),
        spills=counts.pop("LDL") + counts.pop("STL"),
        shared_bytes=built.metadata.shared,
        shared_limit_bytes=CHIPS[capability].shared_bytes,
        approximations=len(APPROXIMATE.findall(built.asm["ptx"])),
        instructions={op: count for op, count in counts.items() if count},
    )


def triton_version() -> str:
    import triton

    version: str = triton.__version__
    return version


def _dump(flag: str, file: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    run = subprocess.run([tool, flag, file], capture_output=True, text=True, check=True)
    return run.stdout


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--capability", type=int, nargs="+", default=sorted(CHIPS))
    parser.add_argument("--cases", nargs="+", choices=tuple(LAUNCHES), default=tuple(LAUNCHES))
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    results = []
    for capability in arguments.capability:
        for built in compile_cases(capability, arguments.cases):
            results.append(built)
            print(
                f"sm_{capability:<4} {built.case:24} {built.kernel:32} "
                f"{built.registers:4} registers {built.spills:4} spills "
                f"{built.shared_bytes / 1024:6.1f} of {built.shared_limit_bytes / 1024:.0f} KiB "
                f"{built.instructions}  {built.options}",
                flush=True,
            )
    result = {
        "benchmark": "compiled",
        "environment": environment() | {"triton": triton_version()},
        "kernels": [asdict(built) for built in results],
    }
    emit(result, arguments.save)


if __name__ == "__main__":
    main()
