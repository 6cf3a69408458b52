"""Whole grids, for `make check-all`: Inductor's code, and every dtype with every kind of shape."""

import copy

import pytest
import torch
from test_contract import K, dense, every_method, gradients, make_layer, perturb

from decomp_kernels.testing import assert_as_good_as

pytestmark = pytest.mark.full

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32": (torch.float16, torch.float32),
}


@pytest.fixture(autouse=True)
def _no_code_of_another_day(monkeypatch, tmp_path):
    """Inductor's cache does not know when an operator's shape function changes."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


every_dtype = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)


def check(layer, run, plain, x):
    """The outcome of ``run`` is as good as that of ``plain``, against the layer in float64."""
    exact = copy.deepcopy(layer).double()
    x_exact = x.detach().double().requires_grad_()
    truth, y, eager = exact(x_exact), run(x), plain(x)
    dy = torch.randn_like(y)
    ours = {"y": y, **gradients(y, layer, x, dy)}
    theirs = {"y": eager, **gradients(eager, layer, x, dy)}
    right = {"y": truth, **gradients(truth, exact, x_exact, dy.double())}
    for leaf in ours:
        assert_as_good_as(ours[leaf], theirs[leaf], right[leaf], leaf, x.dtype)


@every_method
@every_dtype
def test_inductors_code(name, dtypes):
    dtype, adapter_dtype = dtypes
    layer = perturb(make_layer(name, dtype, adapter_dtype=adapter_dtype))
    x = torch.randn(64, K).to(dtype).requires_grad_()
    check(layer, torch.compile(layer, fullgraph=True), layer, x)


@every_method
@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(48, 48), (48, 12), (12, 48), (36, 60)], ids=str)
def test_every_shape(name, dtypes, bias, shape):
    dtype, adapter_dtype = dtypes
    layer = perturb(make_layer(name, dtype, bias, shape, adapter_dtype))
    if layer.adapters["default"].method.why_not_mergeable is not None:
        assert name in ("parallel_adapter", "series_adapter"), "others have a dense weight"
        return
    x = torch.randn(64, shape[0]).to(dtype).requires_grad_()
    check(layer, layer, lambda x: dense(layer, x), x)
