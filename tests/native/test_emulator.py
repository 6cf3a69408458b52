"""cuda_on_host.h runs kernels rightly, and finds each kind of bug that it is there for."""

import pytest
import torch
from emulator import HERE, EmulationError, build, call

N = 1000


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    return build(HERE / "emulator_check.cpp", folder / "check.so")


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The same with every load and store watched."""
    folder = tmp_path_factory.mktemp("watched")
    return build(HERE / "emulator_check.cpp", folder / "check.so", races=True)


def saxpy(library, bug=0):
    x, y = torch.randn(N), torch.randn(N)
    expected = 2.5 * x + y
    call(library, "saxpy", 2.5, x, y, N, bug)
    return y, expected


def reduced(library, bug=0, seed=0, blocks=3):
    x, sums = torch.randn(N), torch.empty(blocks)
    call(library, "reduce", x, sums, N, blocks, bug, seed)
    return x, sums


def product(library, dtype, bug=0):
    a, b, rows = (torch.randn(n, 16).to(dtype) for n in (16, 8, 8))
    rows = rows.view(16, 8)
    d, d_rows = torch.empty(16, 8), torch.empty(16, 8)
    call(library, "tile_product", int(dtype == torch.float16), a, b, rows, d, d_rows, bug)
    return (d, d_rows), (a.double() @ b.double().T, a.double() @ rows.double())


def test_contexts_of_the_system_do_as_well(tmp_path):
    """What other processors than x86-64 switch with."""
    portable = build(
        HERE / "emulator_check.cpp", tmp_path / "p.so", flags=["-DCUDA_ON_HOST_UCONTEXT"]
    )
    reduced(portable, seed=1)
    with pytest.raises(EmulationError, match="a store to an input"):
        saxpy(portable, 3)


def test_saxpy(library):
    y, expected = saxpy(library)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (1, "byte 4000 of an array of 4000 bytes"),
        (2, "byte 4000 of an array of 4000 bytes"),
        (3, "a store to an input, at byte 0"),
        (4, "a trap: .* undefined behaviour"),
        (5, "an integer division by zero"),
    ],
    ids=[
        "a store past the end",
        "a load past the end",
        "a store to an input",
        "misaligned",
        "n / 0",
    ],
)
def test_what_a_thread_must_not_do_is_found(library, bug, message):
    with pytest.raises(EmulationError, match=message):
        saxpy(library, bug)
    saxpy(library)  # and the next launch is not in its shadow


@pytest.mark.parametrize("seed", range(3))
def test_a_block_reduces_in_any_order(library, seed):
    x, sums = reduced(library, seed=seed)
    assert sums.sum().double() == pytest.approx(x.double().sum().item(), abs=1e-4)
    torch.manual_seed(0)
    again = reduced(library, seed=seed + 17)[1]
    torch.manual_seed(0)
    assert torch.equal(again, reduced(library, seed=seed)[1])


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (1, "thread (31, 0, 0).*returned while lanes of its warp wait"),
        (2, "__syncthreads.*after a thread of the block returned|returned while other"),
        (3, "a trap"),
        (5, "__syncthreads.*while other threads wait in __syncthreads"),
        (6, "waits for ever in __shfl_xor_sync"),
    ],
    ids=["a lane leaves", "a warp leaves", "past a static array", "two barriers", "half a warp"],
)
def test_divergence_is_an_error_and_not_a_hang(library, bug, message):
    with pytest.raises(EmulationError, match=message.replace("(", r"\(").replace(")", r"\)")):
        reduced(library, bug)


def test_a_missing_barrier_gives_nan(library):
    assert reduced(library, bug=4)[1].isnan().all()  # what no warp has yet stored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_one_tile_of_a_product(library, dtype):
    for found, exact in zip(*product(library, dtype), strict=True):
        torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)


def test_a_missing_wait_gives_nan(library):
    found, _ = product(library, torch.bfloat16, bug=1)
    assert all(t.isnan().all() for t in found)


def test_a_wrong_fragment_gives_wrong_numbers(library):
    found, exact = product(library, torch.bfloat16, bug=2)
    assert (found[0] - exact[0]).norm() > 0.1 * exact[0].norm()


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (3, "ldmatrix at an address that is no multiple of 16"),
        (4, "cp.async to at an address outside shared memory"),
        (5, "ldmatrix at an address outside shared memory"),
        (6, "returned while copies by cp.async are under way"),
    ],
    ids=["misaligned", "past shared memory", "global memory", "no wait"],
)
def test_what_an_instruction_forbids_is_found(library, bug, message):
    with pytest.raises(EmulationError, match=message):
        product(library, torch.bfloat16, bug)


def mirror(library, bug=0):
    x, y = torch.randn(2, 128), torch.empty(2, 128)
    call(library, "mirror", x, y, 2, bug)
    assert torch.equal(y, x.flip(1))


def mirror_warp(library, bug=0):
    x, y = torch.randn(32), torch.empty(32)
    call(library, "mirror_warp", x, y, bug)
    assert torch.equal(y, 2 * x)


def test_what_is_in_order_is_no_race(watched):
    saxpy(watched)
    reduced(watched, seed=5)
    product(watched, torch.bfloat16)
    mirror(watched)
    mirror_warp(watched)


@pytest.mark.parametrize(
    ("kernel", "bug", "where"),
    [
        (mirror, 1, "static shared memory"),
        (mirror, 2, "static shared memory"),
        (mirror, 3, "an array of 1024 bytes, .* of another block"),
        (mirror, 4, "an array of 1024 bytes"),
        (mirror_warp, 1, "dynamic shared memory"),
        (mirror_warp, 2, "dynamic shared memory"),
        (mirror_warp, 3, "dynamic shared memory"),
        (reduced, 4, "static shared memory"),
        (lambda library, bug: product(library, torch.bfloat16, bug), 1, "dynamic shared memory"),
    ],
    ids=[
        "no barrier", "stored before it is loaded", "two blocks", "global memory",
        "no __syncwarp", "no second __syncwarp", "a shuffle for a __syncwarp",
        "no barrier in a sum", "no wait",
    ],
)  # fmt: skip
def test_a_race_is_found_in_whatever_order_it_runs(watched, kernel, bug, where):
    with pytest.raises(
        EmulationError, match=f"a race: it .* byte .* of {where}.* no barrier since"
    ):
        kernel(watched, bug)
