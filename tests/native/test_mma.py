"""csrc/cuda/mma_gemm: the kernels' own source, on the host, against the definition in float64."""

import ctypes
import random
import re
import shutil
import subprocess

import mma_checks as checks
import mma_mutants as mutants
import pytest
import torch
from emulator import HERE, ROOT, build
from mma_checks import TILES, Forward, InputGradient, arguments, forward, input_gradient

FORWARD_TERMS = ("addend", "out_scale", "bias", "z")
GRADIENT_TERMS = ("d_x", "d_in_scale")
SIZES = (
    (1, 1, 1), (3, 200, 5), (65, 8, 129), (64, 32, 128), (129, 33, 7), (5, 0, 9), (0, 6, 9),
    (9, 6, 0),
)  # fmt: skip
RANKS = (0, 1, 7, 16, 40, 64, 130)
tiles = pytest.mark.parametrize("tile", list(TILES))
dtypes = pytest.mark.parametrize("dtype", list(checks.DTYPES))


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mma")
    return build(HERE / "mma_emulation.cpp", folder / "mma.so")


@pytest.fixture(scope="session")
def watched(tmp_path_factory):
    """The same with every load and store watched for races."""
    folder = tmp_path_factory.mktemp("mma_watched")
    return build(HERE / "mma_emulation.cpp", folder / "mma.so", races=True)


@dtypes
@tiles
def test_forward_with_every_term(library, dtype, tile):
    forward(library, dtype, (140, 107, 270), 40, FORWARD_TERMS, tile, order=3)


@dtypes
@tiles
@pytest.mark.parametrize("dropping", [False, True], ids=["plain", "dropout"])
def test_input_gradient_with_every_term(library, dtype, tile, dropping):
    input_gradient(
        library, dtype, (140, 270, 107), 40, GRADIENT_TERMS, tile, order=3, dropping=dropping
    )


@pytest.mark.parametrize("r", RANKS)
def test_any_rank(library, r):
    forward(library, r=r)
    input_gradient(library, r=r, dropping=True)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_size(library, sizes):
    M, K, N = sizes
    forward(library, sizes=sizes, r=4, terms=FORWARD_TERMS)
    input_gradient(library, sizes=(M, N, K), r=4, terms=GRADIENT_TERMS, dropping=True)


@pytest.mark.parametrize("term", FORWARD_TERMS)
def test_each_term_of_the_forward(library, term):
    forward(library, terms=(term,))


@pytest.mark.parametrize("terms", [("d_x",), ("d_in_scale",), ("d_x", "in_scale")], ids=str)
def test_each_term_of_the_gradient(library, terms):
    input_gradient(library, terms=terms, dropping=True)


@pytest.mark.parametrize("padding", [lambda cols: 0, lambda cols: 3], ids=["beside", "odd"])
@pytest.mark.parametrize("shift", [0, 1])
def test_rows_that_are_not_aligned(library, padding, shift):
    """Element by element where 16 bytes at a time would be a fault."""
    for r in (7, 16):
        forward(
            library, sizes=(67, 41, 131), r=r, terms=FORWARD_TERMS, padding=padding, shift=shift
        )
        input_gradient(
            library, sizes=(67, 131, 41), r=r, terms=GRADIENT_TERMS, padding=padding, shift=shift,
            dropping=True,
        )  # fmt: skip


def test_narrow_vectors(library):
    forward(library, terms=FORWARD_TERMS, vectors=torch.bfloat16)
    input_gradient(library, terms=GRADIENT_TERMS, vectors=torch.bfloat16)


@tiles
def test_the_backward_of_whole_numbers_is_exact(library, tile):
    checks.whole_backward(library, tile)


@tiles
@pytest.mark.parametrize("r", [7, 16])
def test_the_order_of_blocks_and_warps_changes_no_bit(library, tile, r):
    def outcome(order):
        sizes = {"r": r, "tile": tile, "order": order}
        return [
            *forward(library, sizes=(140, 70, 270), terms=FORWARD_TERMS, **sizes),
            *input_gradient(
                library, sizes=(140, 270, 70), terms=GRADIENT_TERMS, dropping=True, **sizes
            ),
        ]

    first, second = outcome(0), outcome(99)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@tiles
def test_no_race_in_shared_or_global_memory(watched, tile):
    forward(watched, sizes=(140, 170, 270), r=7, terms=FORWARD_TERMS, tile=tile)
    forward(watched, sizes=(67, 41, 131), terms=FORWARD_TERMS, tile=tile, padding=lambda cols: 0)
    options = {"terms": GRADIENT_TERMS, "tile": tile, "dropping": True}
    input_gradient(watched, sizes=(140, 270, 170), r=40, **options)


@tiles
def test_fragments_are_read_without_bank_conflicts(library, tile):
    library.mma_bank_conflicts.restype = ctypes.c_int64
    forward(library, tile=tile)
    assert library.mma_bank_conflicts() == 0
    input_gradient(library, tile=tile)
    assert library.mma_bank_conflicts() == 0


@pytest.mark.parametrize("row_tiles", [1, 7, 8, 9, 20])
@pytest.mark.parametrize("col_tiles", [1, 3, 16])
def test_the_order_of_tiles_meets_each_once(library, row_tiles, col_tiles):
    place = (ctypes.c_int * 2)()
    met = set()
    for tile in range(row_tiles * col_tiles):
        library.mma_place(*map(ctypes.c_int64, (tile, row_tiles, col_tiles)), place)
        met.add(tuple(place))
    assert met == {(row, col) for row in range(row_tiles) for col in range(col_tiles)}


def test_the_tile_fits_the_work(library):
    def tile(rows, cols, processors):
        return library.mma_tile(ctypes.c_int64(rows), ctypes.c_int64(cols), processors)

    assert tile(8192, 4096, 132) == TILES["wide"][0]
    assert tile(1024, 4096, 132) == TILES["square"][0]
    assert tile(512, 1024, 132) == tile(64, 1 << 20, 132) == TILES["small"][0]


def refusal(library, made, arch=80):
    name = "forward" if isinstance(made, Forward) else "input_gradient"
    function = getattr(library, f"mma_{name}_refusal")
    function.restype = ctypes.c_char_p
    message = function(ctypes.byref(made), arch)
    return message and message.decode()


def test_what_is_refused_says_why(library):
    t = torch.zeros(64, 64, dtype=torch.bfloat16)
    names = ("x", "weight", "v", "up", "y", "g", "dt", "down", "d_x")

    def made(kind, dtype=torch.bfloat16, without=(), sizes=(), **more):
        own = {name: t for name in names if name in dict(kind._fields_) and name not in without}
        return arguments(
            kind, dtype, {"M": 8, "N": 8, "K": 8, "r": 8, **dict(sizes)}, {**own, **more}
        )

    for kind, pair, output in ((Forward, "up", "y"), (InputGradient, "down", "d_x")):
        assert refusal(library, made(kind)) is None
        assert refusal(library, made(kind, sizes={"M": 0})) is None
        assert "sm_80" in refusal(library, made(kind), arch=75)
        assert "bf16 or fp16" in refusal(library, made(kind, torch.float32))
        assert "needs both" in refusal(library, made(kind, without=(pair,)))
        assert "weight must be there" in refusal(library, made(kind, without=("weight",)))
        assert f"{output} " in refusal(library, made(kind, without=(output,)))
        assert "2147483135" in refusal(library, made(kind, sizes={"K": 1 << 31}))
        assert "2147483135" in refusal(library, made(kind, sizes={"r": -1}))
        many = {"M": 1 << 30, "N": 1 << 30, "K": 1 << 30}
        assert "blocks" in refusal(library, made(kind, sizes=many))
        assert "row stride" in refusal(library, made(kind, sizes={"K": 65}))
        assert "row stride" in refusal(library, made(kind, weight=t.view(torch.uint8)[:, 1:]))
    assert "float32 or" in refusal(library, made(Forward, bias=t.half()[0]))
    assert "float32 or" in refusal(library, made(InputGradient, in_scale=t.half()[0]))
    lacking = made(InputGradient, without=("x",), d_in_scale=torch.zeros(8))
    assert "needs x" in refusal(library, lacking)
    too_high = made(InputGradient, sizes={"dropout_threshold": 65536})
    assert "threshold" in refusal(library, too_high)


@pytest.mark.full
@pytest.mark.parametrize("case", range(60))
def test_random_sizes_and_options(watched, case):
    draw = random.Random(case)
    sizes = tuple(draw.choice([draw.randint(1, 40), draw.randint(1, 300)]) for _ in range(3))
    pad = draw.choice([checks.even_rows, lambda cols: 0, lambda cols: 3, lambda cols: 8 - cols % 8])
    options = {
        "dtype": draw.choice(list(checks.DTYPES)), "sizes": sizes, "r": draw.randint(0, 100),
        "tile": draw.choice(list(TILES)), "order": draw.randint(0, 9), "padding": pad,
        "shift": draw.choice([0, 0, 1, 3]), "vectors": draw.choice([torch.float32, None]),
    }  # fmt: skip
    options["vectors"] = options["vectors"] or checks.DTYPES[options["dtype"]][0]
    terms = draw.sample(FORWARD_TERMS, draw.randint(0, 4))
    forward(watched, terms=tuple(terms), **options)
    gradients = draw.choice([("d_x",), ("d_in_scale",), GRADIENT_TERMS])
    input_gradient(watched, terms=gradients, dropping=draw.random() < 0.5, **options)


def test_the_copy_without_a_bug_passes(tmp_path):
    mutants.run(mutants.library(tmp_path, None))


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(m, id=m.what, marks=() if m.what in mutants.FIRST else pytest.mark.full)
        for m in mutants.MUTANTS
    ],
)
def test_a_planted_bug_is_found(mutant):
    assert not mutants.survives(mutant)


@pytest.mark.full
@pytest.mark.parametrize("arch", ["80", "90a", "100a", "120a"])
def test_every_instance_compiles_without_spills(arch, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    csrc = ROOT / "csrc"
    command = [
        nvcc, "-std=c++20", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v",
        "--keep", "--keep-dir", str(tmp_path), f"-I{csrc / 'common'}", f"-I{csrc / 'cuda'}",
        "-c", str(csrc / "cuda" / "mma_gemm.cu"), "-o", str(tmp_path / "mma.o"),
    ]  # fmt: skip
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[:4000]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", made.stderr)
    assert spills == [("0", "0")] * 19  # 2 dtypes x 3 tiles x 3 forms, and the sum of parts
    (ptx,) = (file.read_text() for file in tmp_path.glob("*.ptx"))
    for instruction in (
        "cp.async.cg.shared.global", "ldmatrix.sync.aligned.m8n8.x4.shared",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared", "m16n8k16.row.col.f32.bf16",
        "m16n8k16.row.col.f32.f16",
    ):  # fmt: skip
        assert instruction in ptx
    assert not re.search(r"^\s*(@\S+\s+)?(atom|red)\.", ptx, re.MULTILINE)
