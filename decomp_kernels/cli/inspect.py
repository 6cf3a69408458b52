"""``decomp-kernels inspect``: every Triton kernel, compiled for every architecture, without a GPU.

What compiling shows: shared memory against the architecture's limit, registers, spills, the matrix
instruction, and that offsets of two-dimensional tiles are 64-bit.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from decomp_kernels import dispatch, tables
from decomp_kernels.bench.marked import check_marked, put_into
from decomp_kernels.cli.errors import BadInput, CheckFailed, one_line

KERNELS = (
    "down_projection",
    "up_expansion",
    "column_walk",
    "row_norm",
    "fused_forward",
    "fused_input_gradient",
    "decode",
    "gram",
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
# A copy of a whole tile from memory, which tensor descriptors are for.
TMA = r"cp\.async\.bulk\.tensor\.\d+d\.shared::"
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
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # or 3.9 warns in every process
    if args.into is not None:
        try:
            check_marked(args.into, "inspect")
        except (OSError, ValueError) as error:
            raise BadInput(str(error)) from None
    rows = []
    if not args.json:
        print(HEADER)
    for row in inspect(
        everything=args.all, kernels=args.kernel, architectures=args.arch, jobs=args.jobs,
        spills=args.spills,
    ):  # fmt: skip
        rows.append(row)
        if not args.json:
            print(line(row), flush=True)
    if args.json:
        print(json.dumps(rows, indent=1))
    failed = [row for row in rows if row["problems"]]
    if args.into is not None:
        put_into(args.into, "inspect", summary(rows))
        print(f"written: {args.into}")
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(rows)} compiled kernels have problems")
    return 0


def inspect(
    *,
    everything: bool = False,
    kernels: list[str] | None = None,
    architectures: list[str] | None = None,
    last_entry: bool = False,
    jobs: int = 1,
    spills: int = 0,
) -> Iterator[dict[str, Any]]:
    """One row for each kernel, shipped configuration and architecture.

    On a bf16 base with every option of the kernel, where the configuration is not for float32;
    ``everything`` takes each dtype and option.  last_entry: one configuration a kernel.  jobs:
    processes that compile.  spills: bytes that a thread may spill.  A file may have several kernels
    of one configuration.
    """
    tasks = list(_tasks(everything, kernels, architectures, last_entry))
    row = partial(_row, spills=spills)
    if jobs == 1:
        yield from map(row, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(row, tasks)


Task = tuple[str, int, str, str]  # kernel, entry, specimen, architecture


def _tasks(
    everything: bool, kernels: list[str] | None, architectures: list[str] | None, last_entry: bool
) -> Iterator[Task]:
    for kernel in kernels or KERNELS:
        module = importlib.import_module(f"decomp_kernels.kernels.triton.{kernel}")
        shipped = tables.shipped(kernel)
        taken = {
            arch: [
                number
                for number, entry in enumerate(shipped)
                if entry["arch"] in ("any", arch)
                and not tables.hidden(entry, shipped[:number], arch)
            ][-1 if last_entry else 0 :]
            for arch in architectures or LIMITS
        }
        for number, entry in enumerate(shipped):
            found = list(module.specimens(entry["config"]))
            specimens = [
                specimen
                for specimen in found
                for dtypes in specimen.name.split()[:1]
                if tables.fits(
                    entry,
                    adapter=tables.width(dtypes.endswith("fp32")),
                    base=tables.width(dtypes.startswith("fp32")),
                )
                and tables.holds(entry, specimen.uses)
            ]
            if not everything:
                kinds = [specimen.name.split()[0] for specimen in specimens]
                first = next((kind for kind in kinds if kind.startswith("bf16")), kinds[0])
                specimens = [s for s in specimens if s.name.split()[0] == first]
                specimens = list({s.kernel: s for s in specimens}.values())  # the last of each
            for specimen in specimens:
                for arch, numbers in taken.items():
                    if number in numbers:
                        yield kernel, number, specimen.name, arch


def _row(task: Task, spills: int) -> dict[str, Any]:
    kernel, number, name, arch = task
    entry = tables.shipped(kernel)[number]
    module = importlib.import_module(f"decomp_kernels.kernels.triton.{kernel}")
    (specimen,) = (s for s in module.specimens(entry["config"]) if s.name == name)
    row = {"kernel": kernel, "entry": number, "specimen": name}
    return row | _examined(specimen, entry, arch, spills)


def _examined(specimen: Any, entry: dict[str, Any], arch: str, spills: int = 0) -> dict[str, Any]:
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
    described = any(str(kind).startswith("tensordesc") for kind in specimen.types.values())
    copies = len(re.findall(TMA, assembly))
    shared, problems = compiled.metadata.shared, []
    if shared > LIMITS[arch]:
        problems.append(f"{shared} bytes of shared memory, {LIMITS[arch]} are there")
    if spilled > spills:
        problems.append(f"{spilled} bytes spilled")
    if narrow:
        problems.append(f"32-bit offsets: {narrow[0]}")
    wanted = _declared(specimen, entry, arch)
    if wanted and wanted not in found and not (found and wanted == "mma.sync"):
        problems.append(f"no {wanted}")
    if described and not copies:
        problems.append("no TMA copies, though its operands are tensor descriptors")
    return row | {
        "shared": shared,
        "registers": registers,
        "spilled": spilled,
        "matrix": found,
        "tma": copies,
        "size": len(compiled.asm["hsaco" if arch.startswith("gfx") else "cubin"]),
        "seconds": round(time.perf_counter() - start, 2),
        "problems": problems,
    }


def _declared(specimen: Any, entry: dict[str, Any], arch: str) -> str | None:
    """The matrix instruction that bf16 products must run on."""
    if not specimen.name.startswith("bf16") or not specimen.multiplies:
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
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, name in enumerate(specimen.kernel.arg_names):
        if name in specimen.constants:
            signature[name], constants[(place,)] = "constexpr", specimen.constants[name]
        else:
            value = specimen.types[name]
            signature[name] = _typed(specimen, name, value, (place,), constants, attributes)
    source = ASTSource(
        fn=specimen.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    return triton.compile(source, target=target, options=specimen.options)


def _typed(
    specimen: Any,
    name: str,
    value: Any,
    path: tuple[int, ...],
    constants: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], Any],
) -> Any:
    """The type of one argument, or of one part of a tuple; what the launcher knows of it is added
    to ``constants`` and ``attributes``.
    """
    from decomp_kernels.kernels.triton.specimens import is_size

    if isinstance(value, tuple):
        names = getattr(value, "_fields", (name,) * len(value))
        parts = [
            _typed(specimen, part, kind, (*path, place), constants, attributes)
            for place, (part, kind) in enumerate(zip(names, value, strict=True))
        ]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if value is None or name in specimen.unit:
        constants[path] = None if value is None else 1
        return "constexpr"
    if specimen.aligned and (value[0] == "*" or is_size(name)):
        attributes[path] = [["tt.divisibility", 16]]
    return value


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
    made: dict[str, str] = {}  # a name may come again in another region: the latest is meant

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
    for text in ttir.splitlines():
        touched = re.search(r"tt\.(?:load|store) .*", text)
        if touched and re.search(r"tensor<\d+x\d+x!tt\.ptr", touched[0]):
            address = re.findall(r"%[\w#-]+", touched[0])[0]
            if "i64" not in widths(address):
                found.append(touched[0].split(" loc")[0])
        if defined := re.search(r"(%[\w#-]+)(?::\d+)? = (.*)", text):
            made[defined[1]] = defined[2]
    return found


HEADER = (
    f"{'kernel':<16} {'specimen':<28} {'entry':>5} {'arch':<7} {'shared':>7} {'of':>7} "
    f"{'registers':>9} {'spilled':>7} {'size':>7} {'tma':>3}  matrix"
)


def line(row: dict[str, Any]) -> str:
    start = f"{row['kernel']:<16} {row['specimen']:<28} {row['entry']:>5} {row['arch']:<7}"
    if "shared" not in row:
        return f"{start} {row['problems'][0]}"
    text = (
        f"{start} {row['shared']:>7} {row['limit']:>7} {row['registers']:>9} {row['spilled']:>7} "
        f"{row['size']:>7} {row['tma']:>3}  {' '.join(row['matrix'])}"
    )
    return f"{text}  PROBLEM: {'; '.join(row['problems'])}" if row["problems"] else text


def summary(rows: list[dict[str, Any]]) -> str:
    """A line for each kernel and architecture, the worst of its compilations, as Markdown."""
    import triton

    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["arch"]), []).append(row)
    problems = sum(bool(row["problems"]) for row in rows)
    columns = (
        "kernel", "architecture", "compiled", "shared memory", "of", "registers", "spilled",
        "matrix instructions", "TMA copies",
    )  # fmt: skip
    head = f"{len(rows)} compilations by Triton {triton.__version__}, {problems} with problems."
    lines = [
        f"{head} Bytes of shared memory and registers of a thread: the most of any.",
        "",
        f"| {' | '.join(columns)} |",
        "|---|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for (kernel, arch), group in groups.items():
        done = [row for row in group if "shared" in row]

        def most(what: str, done: list[dict[str, Any]] = done) -> str:
            return f"{max((row[what] for row in done), default=0):,}"

        matrix = sorted({name for row in done for name in row["matrix"]})
        lines.append(
            f"| {kernel} | {arch} | {len(done)} of {len(group)} | {most('shared')} | "
            f"{LIMITS[arch]:,} | {most('registers')} | {most('spilled')} | {', '.join(matrix)} | "
            f"{most('tma')} |"
        )
    return "\n".join(lines)
