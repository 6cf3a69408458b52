"""Quantised weights to dense ones: every implementation against a table written out by hand."""

import pytest
import torch

from decomp_kernels import native_library
from decomp_kernels.kernels import gemm
from decomp_kernels.kernels.native import dequantize as native
from decomp_kernels.ops.dequantize import dequantize, op
from decomp_kernels.reference.dequantize import LEVELS, block_size
from decomp_kernels.testing import assert_as_good_as

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
SHAPES = [(37, 53), (1, 1), (1, 2), (3, 64), (16, 256), (7, 31), (0, 5), (5, 0), (130, 67)]

dtypes = pytest.mark.parametrize("dtype", DTYPES)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def packed(shape, block):
    """Codes as integers [N * K], the bytes they are packed in, and an absmax for each block."""
    count = shape[0] * shape[1]
    gen = torch.Generator().manual_seed(7)
    codes = torch.randint(0, 16, (count + count % 2,), generator=gen)
    absmax = torch.rand(-(-count // block), generator=gen) + 0.01
    bytes_ = (codes[::2] * 16 + codes[1::2]).to(torch.uint8)
    return codes[:count], bytes_, absmax


def exact_nf4(codes, absmax, block, shape):
    """In float64, one element after another."""
    values = [LEVELS[code] * absmax[i // block].item() for i, code in enumerate(codes.tolist())]
    return torch.tensor(values, dtype=torch.float64).view(shape)


def rows(shape):
    gen = torch.Generator().manual_seed(8)
    codes = torch.randint(-128, 128, shape, generator=gen, dtype=torch.int8)
    return codes, torch.rand(shape[0], generator=gen) + 0.01


def both_formats(shape, block=64):
    codes, bytes_, absmax = packed(shape, block)
    int8, of_rows = rows(shape)
    yield "nf4", bytes_, absmax, exact_nf4(codes, absmax, block, shape)
    yield "int8", int8, of_rows, int8.double() * of_rows.double()[:, None] / 127


@pytest.mark.parametrize("impl", ["reference", "aten"])
@dtypes
@shapes
def test_matches_the_table(shape, dtype, impl):
    for kind, weight, absmax, exact in both_formats(shape):
        ours = dequantize(weight, absmax, kind, shape=shape, dtype=DTYPES[dtype], impl=impl)
        assert ours.dtype == DTYPES[dtype] and ours.is_contiguous()
        assert_as_good_as(ours, exact.to(DTYPES[dtype]), exact, kind)


@pytest.mark.parametrize("block", [32, 64, 256, 4096])
def test_the_count_of_scales_says_the_block_size(block):
    shape = (45, 203)
    codes, bytes_, absmax = packed(shape, block)
    exact = exact_nf4(codes, absmax, block, shape)
    assert block_size(45 * 203, len(absmax)) == block
    for impl in ("reference", "aten"):
        ours = dequantize(bytes_, absmax, "nf4", shape=shape, dtype=torch.float64, impl=impl)
        assert torch.equal(ours, exact)


def test_no_two_block_sizes_fit_one_count():
    for elements in range(600):
        counts = [-(-elements // size) for size in (32, 64, 128, 256, 512, 1024)]
        several = [count for count in counts if count > 1]
        assert len(set(several)) == len(several)
        for size, count in zip((32, 64, 128), counts):
            found = block_size(elements, count)
            assert (
                found == size
                or (count <= 1 and found == 32 * -(-elements // 32))
                or (count <= 1 and found >= min(elements, 32))
            )
    assert block_size(100, 3) is None and block_size(100, 0) is None and block_size(0, 1) is None


@dtypes
@shapes
def test_implementations_agree_to_the_bit(shape, dtype):
    """The products are the same single ones, in the same order of roundings."""
    for kind, weight, absmax, _ in both_formats(shape, 32):
        first, other = (
            dequantize(weight, absmax, kind, shape=shape, dtype=DTYPES[dtype], impl=impl)
            for impl in ("reference", "aten")
        )
        assert torch.equal(first, other)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@shapes
def test_the_native_kernel_agrees_to_the_bit(shape, dtype, level):
    for block in (32, 128, 4096):
        for kind, weight, absmax, _ in both_formats(shape, block):
            plain = dequantize(
                weight, absmax, kind, shape=shape, dtype=DTYPES[dtype], impl="reference"
            )
            assert torch.equal(native.forward(weight, absmax, kind, *shape, DTYPES[dtype]), plain)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_scales_that_are_not_finite_or_tiny_stay_what_they_are(dtype, level):
    """NaN stays NaN, an infinite absmax gives infinities, and a product may be subnormal."""
    absmax = torch.tensor([float("nan"), float("inf"), 1e-39, 3e38, -0.0, 2e-38, 1.0, 1e-45])
    gen = torch.Generator().manual_seed(9)
    nf4 = torch.randint(0, 256, (8 * 64 // 2,), generator=gen, dtype=torch.uint8)
    int8 = torch.randint(-128, 128, (8, 64), generator=gen, dtype=torch.int8)
    for kind, weight in (("nf4", nf4), ("int8", int8)):
        plain = dequantize(
            weight, absmax, kind, shape=(8, 64), dtype=DTYPES[dtype], impl="reference"
        )
        ours = native.forward(weight, absmax, kind, 8, 64, DTYPES[dtype])
        assert torch.equal(ours.isnan(), plain.isnan())
        assert torch.equal(ours.nan_to_num(0.0), plain.nan_to_num(0.0))


def test_native_results_do_not_depend_on_the_number_of_threads(level):
    threads = torch.get_num_threads()
    try:
        for kind, weight, absmax, _ in both_formats((203, 517), 64):
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(native.forward(weight, absmax, kind, 203, 517, torch.float32))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(threads)


def test_wrong_calls_of_the_native_operator_say_what_is_wrong(level):
    call = native_library.ops().dequantize
    good = torch.zeros(32, dtype=torch.uint8), torch.ones(1)
    for weight, absmax, kind, size, dtype, says in (
        (*good, "nf4", (8, 9), torch.float32, "dequantize: weight must have 36 bytes"),
        (good[0].char(), good[1], "nf4", (8, 8), torch.float32, "dequantize: weight must be Byte"),
        (good[0], torch.ones(3), "nf4", (8, 8), torch.float32, "dequantize: weight_scale"),
        (good[0], good[1].double(), "nf4", (8, 8), torch.float32, "weight_scale must be Float"),
        (*good, "fp4", (8, 8), torch.float32, "dequantize: weight_format must be nf4 or int8"),
        (*good, "nf4", (8, 8), torch.float64, "dequantize: dtype must be float32 or bfloat16"),
        (*good, "nf4", (-8, -8), torch.float32, "dequantize: rows and cols"),
        (good[0], good[1].expand(2)[::2].expand(2), "nf4", (8, 8), torch.float32, "weight_scale"),
        (torch.zeros(4, 8, dtype=torch.int8), torch.ones(3), "int8", (4, 8), torch.float32,
         r"weight_scale must have shape \(4\)"),
        (torch.zeros(8, 4, dtype=torch.int8).T, torch.ones(4), "int8", (4, 8), torch.float32,
         "weight must be contiguous"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=says):
            call(weight, absmax, kind, *size, dtype)


def test_the_native_operators_schema(level):
    for kind, weight, absmax, _ in both_formats((5, 13)):
        torch.library.opcheck(
            native_library.ops().dequantize.default,
            (weight, absmax, kind, 5, 13, torch.bfloat16),
            test_utils=("test_schema",),
        )


def test_several_blocks_give_the_same(monkeypatch):
    whole = gemm.row_blocks
    for kind, weight, absmax, _ in both_formats((45, 203)):
        once = dequantize(weight, absmax, kind, shape=(45, 203), impl="aten")
        with monkeypatch.context() as patch:
            patch.setattr(gemm, "row_blocks", lambda of, **cols: whole(of, 500, **cols))
            again = dequantize(weight, absmax, kind, shape=(45, 203), impl="aten")
        assert torch.equal(once, again)


def test_registration():
    for kind, weight, absmax, _ in both_formats((5, 13)):
        for impl in ("reference", "aten"):
            for dtype in (torch.float32, torch.bfloat16):
                torch.library.opcheck(op, (weight, absmax, kind, 5, 13, dtype, impl))


def test_it_compiles_whole():
    for kind, weight, absmax, _ in both_formats((5, 13)):
        plain = dequantize(weight, absmax, kind, shape=(5, 13))
        compiled = torch.compile(dequantize, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(weight, absmax, kind, shape=(5, 13)), plain)


def test_any_layout_of_bytes_and_scales():
    shape = (6, 64)
    codes, bytes_, absmax = packed(shape, 64)
    exact = exact_nf4(codes, absmax, 64, shape)
    for weight in (bytes_.view(-1, 1), bytes_.view(6, 32), bytes_.view(32, 6).T.contiguous().T):
        for scales in (absmax, absmax.view(6, 1), absmax.repeat_interleave(2)[::2]):
            ours = dequantize(weight, scales, "nf4", shape=shape, dtype=torch.float64)
            assert torch.equal(ours, exact)
    int8, of_rows = rows(shape)
    plain = dequantize(int8, of_rows, "int8", shape=shape)
    turned = dequantize(int8.T.contiguous().T, of_rows[:, None], "int8", shape=shape)
    assert torch.equal(turned, plain)


def test_wrong_arguments_say_what_is_wrong():
    bytes_, absmax = torch.zeros(32, dtype=torch.uint8), torch.ones(1)
    with pytest.raises(ValueError, match="weight_format must be one of nf4, int8, got 'fp4'"):
        dequantize(bytes_, absmax, "fp4", shape=(8, 8))
    with pytest.raises(TypeError, match="weight must be torch.uint8 for nf4, got torch.int8"):
        dequantize(bytes_.char(), absmax, "nf4", shape=(8, 8))
    with pytest.raises(TypeError, match="weight_scale must be float32, got torch.uint8"):
        dequantize(bytes_, bytes_, "nf4", shape=(8, 8))
    with pytest.raises(ValueError, match="on weight's device cpu, got meta"):
        dequantize(bytes_, absmax.to("meta"), "nf4", shape=(8, 8))
    with pytest.raises(ValueError, match="nf4 of 72 elements has 36 bytes, got 32"):
        dequantize(bytes_, absmax, "nf4", shape=(8, 9))
    with pytest.raises(ValueError, match="one absmax for each block of 32, 64, 128, .* got 3"):
        dequantize(bytes_, torch.ones(3), "nf4", shape=(8, 8))
    with pytest.raises(ValueError, match="int8 of shape .* got .* and"):
        dequantize(bytes_.char(), absmax, "int8", shape=(4, 8))
    with pytest.raises(TypeError, match="dtype must be floating point, got torch.int32"):
        dequantize(bytes_, absmax, "nf4", shape=(8, 8), dtype=torch.int32)
    with pytest.raises(ValueError, match=r"shape must be \(N, K\), got \(64,\)"):
        dequantize(bytes_, absmax, "nf4", shape=(64,))
