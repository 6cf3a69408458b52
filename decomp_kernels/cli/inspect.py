"""``decomp-kernels inspect``: every Triton kernel, compiled for every architecture, without a GPU.

What compiling shows: shared memory against the architecture's limit, registers, spills, the matrix
instruction, and that offsets of two-dimensional tiles are 64-bit.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decomp_kernels import dispatch
from decomp_kernels.cli.errors import BadInput, CheckFailed, one_line

KERNELS = (
    "down_projection",
    "up_expansion",
    "column_walk",
    "row_norm",
    "merged_weight",
    "hadamard",
    "double_hadamard",
    "block_rotate",
    "singular_diagonal",
    "scatter",
)
# Shared memory that one program may have, bytes: CUDA programming guide, compute capabilities;
# for gfx942 the local data share of a compute unit.
LIMITS = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
WARPGROUP = {"sm_90": "wgmma", "sm_100": "tcgen05"}
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma.sync": r"\bmma\.sync",
    "mfma": r"\bv_mfma",
}


def run(args: argparse.Namespace) -> int:
    if os.environ.get(dispatch.INTERPRET) == "1":
        raise BadInput(f"inspect compiles, and {dispatch.INTERPRET}=1 interprets: unset it")
    if dispatch.why_not_installed():
        raise BadInput("inspect needs triton: pip install triton")
    rows = []
    if not args.json:
        print(HEADER)
    for row in inspect(everything=args.all, kernels=args.kernel, architectures=args.arch):
        rows.append(row)
        if not args.json:
            print(line(row), flush=True)
    if args.json:
        print(json.dumps(rows, indent=1))
    failed = [row for row in rows if row["problems"]]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(rows)} compiled kernels have problems")
    return 0


def inspect(
    *,
    everything: bool = False,
    kernels: list[str] | None = None,
    architectures: list[str] | None = None,
    last_entry: bool = False,
) -> Iterator[dict[str, Any]]:
    """One row for each kernel, shipped configuration and architecture.

    On a bf16 base with every option of the kernel, the adapter as the configuration is for;
    ``everything`` takes each dtype and option.  last_entry: one configuration a kernel.  A file
    may have several kernels of one configuration.
    """
    from decomp_kernels.kernels.triton.configurations import entries, suits

    for kernel in kernels or KERNELS:
        module = importlib.import_module(f"decomp_kernels.kernels.triton.{kernel}")
        for number, entry in list(enumerate(entries(kernel)))[-1 if last_entry else 0 :]:
            found = list(module.specimens(entry["config"]))
            specimens = [s for s in found if suits(entry, s.name.split()[0].endswith("fp32"))]
            if not everything:
                specimens = [s for s in specimens if s.name.startswith("bf16")]
                first = specimens[0].name.split()[0]  # bf16, or bf16-fp32 where it is for float32
                specimens = [s for s in specimens if s.name.split()[0] == first]
                specimens = list({s.kernel: s for s in specimens}.values())  # the last of each
            for specimen in specimens:
                for arch in architectures or LIMITS:
                    if entry["arch"] in ("any", arch):
                        row = {"kernel": kernel, "entry": number, "specimen": specimen.name}
                        yield row | _examined(specimen, entry, arch)


def _examined(specimen: Any, entry: dict[str, Any], arch: str) -> dict[str, Any]:
    start = time.perf_counter()
    row: dict[str, Any] = {"arch": arch, "config": entry["config"], "limit": LIMITS[arch]}
    try:
        compiled = _compile(specimen, arch)
    except Exception as error:  # whatever a compiler raises is the finding
        text = f"does not compile: {type(error).__name__}: {one_line(error)[:300]}"
        return row | {"problems": [text], "seconds": round(time.perf_counter() - start, 2)}
    assembly = compiled.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
    found = [name for name, text in INSTRUCTIONS.items() if re.search(text, assembly)]
    registers, spilled = _resources(compiled, arch)
    narrow = narrow_offsets(compiled.asm["ttir"])
    shared, problems = compiled.metadata.shared, []
    if shared > LIMITS[arch]:
        problems.append(f"{shared} bytes of shared memory, {LIMITS[arch]} are there")
    if spilled:
        problems.append(f"{spilled} bytes spilled")
    if narrow:
        problems.append(f"32-bit offsets: {narrow[0]}")
    wanted = _declared(specimen, entry, arch)
    if wanted and wanted not in found and not (found and wanted == "mma.sync"):
        problems.append(f"no {wanted}")
    return row | {
        "shared": shared,
        "registers": registers,
        "spilled": spilled,
        "matrix": found,
        "size": len(compiled.asm["hsaco" if arch.startswith("gfx") else "cubin"]),
        "seconds": round(time.perf_counter() - start, 2),
        "problems": problems,
    }


def _declared(specimen: Any, entry: dict[str, Any], arch: str) -> str | None:
    """The matrix instruction that bf16 products must run on."""
    if not specimen.matrix or not specimen.name.startswith("bf16"):
        return None
    if arch.startswith("gfx"):
        return "mfma"
    return WARPGROUP.get(arch, "mma.sync") if entry.get("warpgroup") else "mma.sync"


def _compile(specimen: Any, arch: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[3:]), 32)
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(specimen.kernel.arg_names):
        if name in specimen.constants or name in specimen.unit:
            signature[name] = "constexpr"
            constants[(place,)] = 1 if name in specimen.unit else specimen.constants[name]
            continue
        signature[name] = specimen.types[name]
        if specimen.aligned and (signature[name][0] == "*" or name in specimen.sizes):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=specimen.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    return triton.compile(source, target=target, options=specimen.options)


def _resources(compiled: Any, arch: str) -> tuple[int, int]:
    """Registers of a thread, and bytes that it keeps in memory for want of registers."""
    if arch.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        # Scalar registers spill into lanes of vector registers, which is no memory.
        count = {
            name: int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1])
            for name in ("vgpr_count", "private_segment_fixed_size")
        }
        return count["vgpr_count"], count["private_segment_fixed_size"]
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(re.findall(rf"\b{name}:(\d+)", printed)[-1]) for name in ("REG", "STACK")}
    local = int(re.findall(r"\bLOCAL:(\d+)", printed)[-1])
    return used["REG"], max(used["STACK"], local)


def narrow_offsets(ttir: str) -> list[str]:
    """Loads and stores of two-dimensional tiles whose offsets are 32-bit all the way.

    A tile's address is a chain of additions to a pointer.  Rows, whose offset may pass 2^31, add in
    64 bits; a column inside a row may add in 32.
    """
    made: dict[str, str] = {}

    def widths(value: str) -> set[str]:
        text = made.get(value, "")
        operands = re.findall(r"%[\w#-]+", text)
        if text.startswith("tt.addptr"):
            wide = re.search(r"(i32|i64)>?(?: loc.*)?$", text.strip())
            return widths(operands[0]) | ({wide[1]} if wide else set())
        if text.startswith(("tt.splat", "tt.broadcast", "tt.expand_dims")):
            return widths(operands[0])
        return set()

    found = []
    for text in ttir.splitlines():  # in order: loops side by side use the same names
        if access := re.search(r"tt\.(?:load|store) .*", text):
            address = re.findall(r"%[\w#-]+", access[0])[0]
            if re.search(r"tensor<\d+x\d+x!tt\.ptr", text) and "i64" not in widths(address):
                found.append(access[0].split(" loc")[0])
        if value := re.search(r"(%[\w#-]+)(?::\d+)? = (.*)", text):
            made[value[1]] = value[2]
    return found


HEADER = (
    f"{'kernel':<16} {'specimen':<28} {'entry':>5} {'arch':<7} {'shared':>7} {'of':>7} "
    f"{'registers':>9} {'spilled':>7} {'size':>7}  matrix"
)


def line(row: dict[str, Any]) -> str:
    start = f"{row['kernel']:<16} {row['specimen']:<28} {row['entry']:>5} {row['arch']:<7}"
    if "shared" not in row:
        return f"{start} {row['problems'][0]}"
    text = (
        f"{start} {row['shared']:>7} {row['limit']:>7} {row['registers']:>9} {row['spilled']:>7} "
        f"{row['size']:>7}  {' '.join(row['matrix'])}"
    )
    return f"{text}  PROBLEM: {'; '.join(row['problems'])}" if row["problems"] else text
