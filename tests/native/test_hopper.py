"""The Hopper product's tiles, boxes, iterations, mask and epilogue, walked on the host.

tests/native/hopper_emulation.cpp is made of the headers that the kernel is made of, and is compared
bit for bit with decomp_kernels.reference.  Planted defects in those headers must be seen.
"""

import ctypes
import shutil

import hopper_host as host
import pytest
import torch
from hopper_host import Case

pytestmark = pytest.mark.skipif(host.compiler() is None, reason="no g++ to build the emulation by")
RANKS = (1, 8, 16, 40, 64, 130)
ENDS = ((), ("addend",), ("out_scale", "bias"), ("addend", "out_scale", "bias", "z"))


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return host.build(tmp_path_factory.mktemp("hopper"), host.COMMON, "-Werror")


@pytest.mark.parametrize("shape", host.SHAPES.values(), ids=host.SHAPES)
@pytest.mark.parametrize("r", (0, *RANKS))
def test_forward(library, shape, r):
    sizes = (77, 134, 83) if r % 3 else (200, 322, 40)
    for dtype, options in zip((torch.bfloat16, torch.float16) * 2, ENDS, strict=True):
        host.check_forward(library, Case(shape, *sizes, r, dtype, options))


@pytest.mark.parametrize("shape", host.SHAPES.values(), ids=host.SHAPES)
@pytest.mark.parametrize("r", (0, *RANKS))
def test_input_gradient(library, shape, r):
    M, N, K = (77, 83, 136) if r % 3 else (200, 40, 324)
    every = ("in_scale", "d_in_scale")
    for dtype, options, p in (
        (torch.bfloat16, (), 0.0),
        (torch.float16, ("in_scale",), 0.1),
        (torch.float16, every, 0.0),
        (torch.bfloat16, every, 0.3),
        (torch.bfloat16, ("d_in_scale", "no d_x"), 0.3),
    ):
        host.check_input_gradient(library, Case(shape, M, N, K, r, dtype, options, p))


@pytest.mark.parametrize("shape", host.SHAPES.values(), ids=host.SHAPES)
def test_input_gradient_of_the_reference(library, shape):
    host.check_backward(library, Case(shape, 130, 72, 264, 16, dropout=0.5))


@pytest.mark.parametrize("shape", host.SHAPES.values(), ids=host.SHAPES)
@pytest.mark.parametrize("sms", (1, 2, 3, 132))
def test_every_tile_once_on_any_number_of_processors(library, shape, sms):
    """More rows of tiles than a group has, and walks that end at different turns."""
    host.check_forward(library, Case(shape, 1100, 300, 8, 8, options=("z",), sms=sms))
    host.check_input_gradient(
        library, Case(shape, 1100, 8, 300, 8, options=("d_in_scale",), dropout=0.2, sms=sms)
    )


def test_one_row_and_one_inner_element(library):
    for shape in host.SHAPES.values():
        host.check_forward(library, Case(shape, 1, 2, 1, 1, options=ENDS[-1]))
        host.check_input_gradient(
            library, Case(shape, 1, 1, 4, 1, options=("d_in_scale",), dropout=0.5)
        )


def test_rows_beyond_the_last_add_nothing_to_sums(library):
    """A zero row times an infinite weight is NaN, and must not reach d_in_scale."""
    case = Case(0, 3, 8, 8, 0)
    g, weight, x = (host.whole(*size, case.dtype) for size in ((3, 8), (8, 8), (3, 8)))
    g.fill_(1)
    x.fill_(1)
    weight.fill_(float("inf"))
    d_in_scale = torch.zeros(8)
    tensors = {"g": g, "weight": weight, "x": x, "d_in_scale": d_in_scale}
    args = host.arguments(host.InputGradientArgs, case, tensors)
    assert library.hopper_input_gradient(ctypes.byref(args), host.SMS) == 0
    assert torch.equal(d_in_scale, torch.full((8,), float("inf")))


def test_shared_memory_fits_and_hides_latency(library):
    facts = (ctypes.c_int * 7)()
    seen = set()
    for instance in range(16):
        library.hopper_describe(instance, facts)
        op, rows, cols, cluster, stages, size, dtype = facts
        seen.add((op, rows, cols, cluster, dtype))
        assert size <= 232_448
        assert stages >= 4  # loads are under way while others are multiplied
    assert len(seen) == 16


REFUSALS = {
    "sm_90": {"arch": 100},
    "bfloat16 or float16": {"dtype": 0},
    "tile shape": {"shape": 4},
    "inner dimension": {"K": 0},
    "both rank-r operands": {"r": 0},
    "32-bit coordinates": {"M": 2**31},
    "odd number of columns": {"N": 71},
    "multiple of 16 bytes": {"x": 8},
    "rows are not apart": {"v_stride": 12},
    "multiple of 8 bytes": {"bias": 4},
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_forward_refuses(library, reason):
    given = dict.fromkeys(("x", "weight", "v", "up", "y", "out_scale", "bias"), 4096)
    given |= {"M": 64, "N": 72, "K": 80, "r": 8, "dtype": 1, "shape": -1}
    given |= {f"{name}_stride": 80 for name in ("x", "weight", "v", "up", "y")}
    assert library.hopper_forward_why_not(ctypes.byref(host.ForwardArgs(**given)), 90) is None
    change = dict(REFUSALS[reason])
    arch = change.pop("arch", 90)
    args = host.ForwardArgs(**(given | change))
    assert reason in library.hopper_forward_why_not(ctypes.byref(args), arch).decode()


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("multiple of 4", {"K": 78}),
        ("threshold", {"threshold": 65537}),
        ("d_in_scale needs x", {"x": 0}),
        ("multiple of 16 bytes", {"d_x_stride": 84}),
    ],
)
def test_input_gradient_refuses(library, reason, change):
    names = ("g", "weight", "dt", "down", "seed", "x", "d_x", "d_in_scale")
    given = dict.fromkeys(names, 4096) | {"M": 64, "N": 72, "K": 80, "r": 8, "dtype": 2}
    given |= {f"{name}_stride": 80 for name in ("g", "weight", "dt", "down", "x", "d_x")}
    given |= {"shape": -1, "threshold": 6554}
    why_not = library.hopper_input_gradient_why_not
    assert why_not(ctypes.byref(host.InputGradientArgs(**given)), 90) is None
    args = host.InputGradientArgs(**(given | change))
    assert reason in why_not(ctypes.byref(args), 90).decode()


def test_choice_of_shape(library):
    def chosen(rows, cols, linked=0b1111):
        return library.hopper_choose_shape(host.FORWARD, rows, cols, 4096, 132, linked)

    small, large = host.SHAPES["ping-pong 64x128"], host.SHAPES["cooperative 128x256"]
    assert chosen(16, 4096) == chosen(512, 1024) == small  # fewer tiles than processors
    assert chosen(8192, 4096) == chosen(8192, 14336) == large  # the fewest bytes for each product
    assert chosen(16, 4096, linked=0b1000) == large  # of what the library holds
    assert chosen(16, 4096, linked=0) == -1


MUTANTS = {
    "rank steps: one too few": ("rank_loop.h", "return steps_of(rank);",
                                "return rank / kDepth;"),
    "small pair from the base's coordinate": (
        "rank_loop.h", "(step < before ? step : step - before)", "step"),
    "the order of the pairs": ("rank_loop.h", "step < small_steps() : step >= base",
                               "step >= base_steps() : step >= base"),
    "a block of the rank left out": ("rank_loop.h", "first + kBlockDepth - 1)", "first)"),
    "extent of the left operand": ("hopper_boxes.h", "{base, {inner, rows}, stride",
                                   "{base, {inner + 1, rows}, stride"),
    "extent of the right operand": ("hopper_boxes.h", "{base, {cols, inner}, stride, {kRow",
                                    "{base, {cols, inner + 1}, stride, {kRow"),
    "extent of the output": ("hopper_boxes.h", "{base, {cols, rows}, stride, {kChunk",
                             "{base, {cols, rows - 1}, stride, {kChunk"),
    "a coordinate of the right operand": (
        "hopper_boxes.h", "{first_inner, first_col + share,", "{first_inner, first_col,"),
    "a strip of the right operand": (
        "hopper_boxes.h", "first_col + strip * kRowElements,", "first_col,"),
    "the swizzle": ("hopper_boxes.h", "^ row % 8;", "^ row % 4;"),
    "the group of tiles": ("hopper_tiles.h", "left < group ? left : group", "group"),
    "the second consumer's turn": (
        "hopper_tiles.h", "cluster_index + consumer * clusters", "cluster_index + consumer"),
    "the second consumer's rows": ("hopper_tiles.h", "0 : consumer * kGroupRows", "0 : 0"),
    "the rank in the cluster": ("hopper_tiles.h", "* tile.cluster + rank_in_cluster)",
                                "* tile.cluster)"),
    "the accumulator's rows": ("hopper_epilogue.h", "8 * (i / 2 % 2)", "8 * (i % 2)"),
    "the matrix stores' columns": ("hopper_epilogue.h", "matrix / 2 * 8);", "matrix % 2 * 8);"),
    "the row of partial sums": ("hopper_epilogue.h", "return first_row / kGroupRows",
                                "return first_row / kGroupRows / 2"),
    "the mask's row": ("hopper_mask.h", "uint64_t(first_row + mine.row) ", "uint64_t(mine.row) "),
    "the mask's column": ("hopper_mask.h", "first_col + mine.col / 4 * 4", "mine.col / 4 * 4"),
    "the mask's exchange": ("hopper_mask.h", "lower == odd ? mine", "lower ? mine"),
    "the mask's order": ("hopper_mask.h", "above << 28", "above << 24"),
    "a word of the mask too few": ("hopper_mask.h", "left = kParts * kMaskBlocks",
                                       "left = kParts * kMaskBlocks - 1"),
    "the addend's row stride": ("hopper_epilogue.h", "row * addend_stride", "row * cols"),
    "bias before out_scale": ("hopper_epilogue.h", "z = {z.a * s.a, z.b * s.b};",
                              "z = {z.a * s.a, z.b * s.a};"),
    "rows beyond the last in sums": ("hopper_epilogue.h", "if (row >= rows) return {0.0f, 0.0f};",
                                     "if (row > rows) return {0.0f, 0.0f};"),
    "a stage given back too early": ("hopper_roles.h", "    m.await_products_but_last();", ""),
    "a ring place without its turn": ("hopper_roles.h", "phase ^= to / stages & 1;", ""),
    "a producer that waits for full stages": ("hopper_roles.h", "place{0, 1};", "place{0, 0};"),
    "the other warpgroup's stages": ("hopper_roles.h", "if (tile.ping_pong()) ring.place.skip",
                                     "if (0) ring.place.skip"),
    "the first tile's stages": ("hopper_roles.h", "consumer == 1) ring.place.skip",
                                "consumer == 2) ring.place.skip"),
    "the mask on products in flight": ("hopper_roles.h", "      ring.drain();\n      if (masked) {",
                                       "      if (masked) {"),
    "results stored in flight": ("hopper_roles.h", "    ring.drain();\n    if (tile",
                                 "    if (tile"),
    "a turn not passed on": ("hopper_roles.h", "m.pass_turn()", "(void)0"),
    "bytes that never come": ("hopper_roles.h", "tile.stage_bytes());  //",
                              "tile.stage_bytes() + 2);  //"),
    "the mask of this tile again": ("hopper_roles.h", "m.begin_mask(first_of(unit + walk.step))",
                                    "m.begin_mask(first_of(unit))"),
}  # fmt: skip


@pytest.mark.parametrize("defect", MUTANTS)
def test_planted_defects_are_seen(tmp_path, defect):
    header, old, new = MUTANTS[defect]
    shutil.copytree(host.COMMON, tmp_path / "common")
    text = (tmp_path / "common" / header).read_text()
    assert text.count(old) == 1
    (tmp_path / "common" / header).write_text(text.replace(old, new))
    library = host.build(tmp_path, tmp_path / "common", "-w", "-DHOPPER_FP16=bf16")
    with pytest.raises(AssertionError):
        for shape in host.SHAPES.values():
            ends = ("addend", "out_scale", "bias", "z")
            host.check_forward(library, Case(shape, 200, 322, 83, 70, options=ends))
            sums = ("in_scale", "d_in_scale")
            host.check_input_gradient(
                library, Case(shape, 200, 83, 324, 70, options=sums, dropout=0.3, sms=2)
            )
            host.check_forward(library, Case(shape, 1100, 300, 8, 8))
