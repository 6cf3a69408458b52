"""Shared by the low-rank methods' tests: each formula written out, and layers to try it on."""

import torch
from torch.nn import functional as F

from decomp_kernels import methods
from decomp_kernels.methods.base import Adapter, Base
from decomp_kernels.reference.dropout import keep_mask, kept_fraction

M = methods()
P = 0.25  # dropout: a threshold of 16384, so the kept fraction is exactly 0.75


def rotation(D):
    """The Cayley rotation by an explicit inverse."""
    Q, eye = (D - D.T) / 2, torch.eye(len(D), dtype=D.dtype)
    return (eye - Q) @ torch.linalg.inv(eye + Q)


def low_rank(scale, phi=lambda t: t, core=lambda a: torch.ones_like(a.down[:, 0]).diag()):
    """scale * phi(x A^T) G^T B^T with G = core(a)."""
    return lambda a, x: scale * phi(x @ a.down.T) @ core(a).T @ a.up.T


def diagonal(a):
    return torch.diag(a.core)


def matrix(a):
    return a.core_matrix


def pissa(a, x):
    return x @ (1.5 * (a.up @ a.down - a.up0 @ a.down0)).T


def pissa_relu(a, x):
    return 1.5 * (F.relu(x @ a.down.T) @ a.up.T - F.relu(x @ a.down0.T) @ a.up0.T)


def dash(a, x):
    d = torch.diag(a.core)
    return x @ (1.5 * a.up @ a.down + a.direction_up @ d @ a.direction_down).T


def vera(a, x):
    N, K = len(a.up_scale), x.shape[-1]
    change = torch.diag(a.up_scale) @ a.shared_up[:N] @ torch.diag(a.core) @ a.shared_down[:, :K]
    return x @ change.T


def spectral_additive(a, x):
    U, S, Vt = a.singular_up, torch.diag(a.singular_values), a.singular_down
    return x @ (0.7 * ((U + a.up_offset) @ S @ (Vt + a.down_offset) - U @ S @ Vt)).T


def spectral_rotational(a, x):
    S = a.singular_values
    turned = rotation(a.rotation_up) @ torch.diag(S * a.core) @ rotation(a.rotation_down).T
    return x @ (a.singular_up @ (turned - torch.diag(S)) @ a.singular_down).T


LORA = {"r": 4, "alpha": 6.0, "dropout": P}  # scale 1.5
BRANCHES = {
    "lora": (M["lora"](**LORA), low_rank(1.5)),
    "lora, rslora": (M["lora"](**LORA, use_rslora=True), low_rank(3.0)),
    "lora, relu": (M["lora"](**LORA, activation="relu"), low_rank(1.5, F.relu)),
    "trilora": (M["trilora"](**LORA), low_rank(1.5, core=diagonal)),
    "trilora, rslora": (M["trilora"](**LORA, use_rslora=True), low_rank(3.0, core=diagonal)),
    "trilora, scale": (M["trilora"](**LORA, fixed_scale=0.7), low_rank(0.7, core=diagonal)),
    "trilora, silu": (
        M["trilora"](**LORA, activation="silu"),
        low_rank(1.5, F.silu, diagonal),
    ),
    "adalora": (M["adalora"](**LORA, target_r=2), low_rank(6 / 4.00001, core=diagonal)),
    "adalora, relu": (
        M["adalora"](**LORA, target_r=2, activation="relu"),
        low_rank(6 / 4.00001, F.relu, diagonal),
    ),
    "flora": (M["flora"](**LORA), low_rank(1.5, core=matrix)),
    "flora, relu": (M["flora"](**LORA, activation="relu"), low_rank(1.5, F.relu, matrix)),
    "moslora": (M["moslora"](**LORA), low_rank(1.5, core=matrix)),
    "moslora, gelu": (M["moslora"](**LORA, activation="gelu"), low_rank(1.5, F.gelu, matrix)),
    "pissa": (M["pissa"](**LORA), pissa),
    "pissa, niter": (M["pissa"](**LORA, niter=2), pissa),
    "pissa, relu": (M["pissa"](**LORA, activation="relu"), pissa_relu),
    "milora": (M["milora"](**LORA), pissa),
    "lora_dash": (M["lora_dash"](**LORA, n_directions=3), dash),
    "vera": (M["vera"](r=40, dropout=P), vera),
    "parallel_adapter": (
        M["parallel_adapter"](r=4, scale=0.7, dropout=P),
        low_rank(0.7, F.relu),
    ),
    "parallel_adapter, tanh": (
        M["parallel_adapter"](r=4, dropout=P, activation="tanh"),
        low_rank(1.0, torch.tanh),
    ),
    "spectral_additive": (M["spectral_additive"](r=4, scale=0.7, dropout=P), spectral_additive),
    "spectral_rotational": (M["spectral_rotational"](r=4, dropout=P), spectral_rotational),
}
SERIES = {
    name: M["series_adapter"](r=4, scale=0.7, activation=name)
    for name in ("relu", "silu", "gelu", "tanh")
}
PHI = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh}
ALL = [method for method, _ in BRANCHES.values()] + list(SERIES.values())
LINEAR = [name for name, (method, _) in BRANCHES.items() if not method.why_not_mergeable]
SHAPES = [(12, 20), (20, 12), (7, 33)]  # (N, K)


def made(method, N, K, dtype=torch.float64, adapter_dtype=None, bias=True):
    """An adapter at its start, on a random linear whose neighbour in the model is larger."""
    weight = torch.randn(N, K, dtype=dtype)
    base = Base(weight, torch.randn(N, dtype=dtype) if bias else None, adapter_dtype or dtype)
    shared = method.share([(N, K), (N + 5, K + 3)], base.dtype, weight.device)
    adapter = Adapter(method)
    method.create(adapter, base._replace(shared=shared or None))
    return adapter, base


@torch.no_grad()
def disturb(adapter, base):
    """Move every trained parameter by about a third; give LoRA-Dash its directions."""
    for p in adapter.parameters():
        if p.requires_grad:
            p.add_(0.3 * torch.randn_like(p))
    if adapter.method.name == "lora_dash":
        adapter.method.select_directions(adapter, base)


def trained(adapter):
    return {name: p for name, p in adapter.named_parameters() if p.requires_grad}


def double_copy(adapter):
    """The adapter's tensors as float64 leaves, by name."""
    copies = {}
    for name, tensor in [*adapter.named_parameters(), *adapter.named_buffers()]:
        copies[name] = tensor.detach().clone()
        if tensor.is_floating_point():
            copies[name] = copies[name].double().requires_grad_(tensor.requires_grad)
    return copies


def dropped(x, seed):
    """x under the mask that is drawn from ``seed``, by its definition."""
    rows = x.reshape(-1, x.shape[-1])
    kept = keep_mask(seed, tuple(rows.shape), P).to(x.dtype) / kept_fraction(P)
    return x * kept.view(x.shape)


def next_seed():
    """The dropout seed that the next call will draw, and torch's generator as it was."""
    state = torch.get_rng_state()
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    torch.set_rng_state(state)
    return seed


LOW = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16, fp32 adapter": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}
