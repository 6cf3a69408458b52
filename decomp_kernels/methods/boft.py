"""BOFT (Liu et al. 2023, arXiv:2311.06243): rotate the input by a butterfly of small rotations.

    y = s_o * ((x R) W^T) + b        W' = diag(s_o) W R^T
    R = R_m ... R_1,  R_i = P_i blockdiag(q blocks of size b) P_i^T,  q b = K
    block = (I - Q) (I + Q)^-1,  Q = (D - D^T) / 2,  D = rotation[i, j] [b, b] zeros: exact start
    rotation [m, q, b, b]        out_scale = s_o [N] ones        the bias is not scaled

P_i joins half-blocks that lie 2^(i-1) half-blocks apart, so m factors mix b 2^(m-1) columns.  Any
number of factors runs here; PEFT without its CUDA extension uses one, whatever was asked for.
"""

import torch
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.factors import BlockRotate, Factors
from decomp_kernels.methods.base import Adapter, Base, Method, method
from decomp_kernels.methods.oft import cayley
from decomp_kernels.ops.autocast import no_autocast
from decomp_kernels.peft_form import PeftForm, PeftTensor

DEFAULT_SIZE = 4


@method("boft")
class BOFT(Method):
    """block_size, or block_num: size or number of the blocks; give one of them, 4 is the default
    size.  n_butterfly_factor: m; above 1 the size must be even and size * 2^(m-1) divide K.
    """

    formula = "diag(s_out) W R^T,  R = R_m ... R_1"
    citation = "arXiv:2311.06243"
    trains = "m K b + N"
    peft_form = PeftForm(
        "BOFTConfig",
        "BOFT",
        tensors={
            "rotation": PeftTensor("boft_R.*"),
            "out_scale": PeftTensor("boft_s.*", "column"),
        },
        options={
            "block_size": "boft_block_size",
            "block_num": "boft_block_num",
            "n_butterfly_factor": "boft_n_butterfly_factor",
        },
        fixed={"boft_dropout": 0.0},
        bias_only="boft_only",
        note="n_butterfly_factor above 1 needs its CUDA extension",
    )
    impls = dispatch.NOT_NATIVE
    aliases = {
        "boft_block_size": "block_size",
        "boft_block_num": "block_num",
        "boft_n_butterfly_factor": "n_butterfly_factor",
    }

    block_size: int | None = None
    block_num: int | None = None
    n_butterfly_factor: int = 1

    def check_options(self) -> None:
        super().check_options()
        if self.block_size is not None and self.block_num is not None:
            raise ValueError(
                "block_size * block_num = in_features: give block_size or block_num, not both"
            )
        for option, least in (("block_size", 2), ("block_num", 1), ("n_butterfly_factor", 1)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise ValueError(f"{option} must be at least {least}, got {value}")

    def check_shape(self, out_features: int, in_features: int, name: str) -> None:
        super().check_shape(out_features, in_features, name)
        q, b = self.sizes(in_features)
        if q * b != in_features or b < 2:
            raise ValueError(
                f"BOFT's blocks must divide in_features = {in_features} of {name or 'this layer'} "
                f"into blocks of at least 2, got block_size = {b}, block_num = {q}"
            )
        m = self.n_butterfly_factor
        if m > 1 and (b % 2 or q % 2 ** (m - 1)):
            raise ValueError(
                f"n_butterfly_factor = {m} needs an even block size, and block size times "
                f"2^{m - 1} dividing in_features = {in_features} of {name or 'this layer'}; "
                f"got {q} blocks of size {b}"
            )

    def sizes(self, in_features: int) -> tuple[int, int]:
        """(q, b): the number of blocks and their size."""
        if self.block_num is not None:
            return self.block_num, in_features // self.block_num
        b = self.block_size or DEFAULT_SIZE
        return in_features // b, b

    def create(self, adapter: Adapter, base: Base) -> None:
        q, b = self.sizes(base.in_features)
        m, device = self.n_butterfly_factor, base.weight.device
        adapter.rotation = base.matrix(m, q, b, b)
        adapter.out_scale = base.scales(base.out_features)
        permutations = None if m == 1 else butterfly(base.in_features, b, m, device)
        adapter.register_buffer("permutations", permutations, persistent=False)

    def refresh(self, adapter: Adapter, base: Base) -> None:
        if adapter.permutations is not None:
            _, b = self.sizes(base.in_features)
            m, device = self.n_butterfly_factor, base.weight.device
            adapter.permutations = butterfly(base.in_features, b, m, device)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        with no_autocast(base.weight.device):
            D = adapter.rotation.to(base.scale_dtype)
            blocks = cayley((D - D.mT) / 2).flip(0)  # x meets R_m first
        rotation = BlockRotate(blocks, adapter.permutations)
        return Factors(weight_map=rotation, out_scale=adapter.out_scale)


def butterfly(K: int, b: int, m: int, device: torch.device) -> Tensor:
    """int64 [m, K]: row j lists the columns as the blocks of R_(m-j) take them.

    In every run of b 2^(i-1) columns, R_i pairs half-block h with half-block h + 2^(i-1).
    """
    columns = torch.arange(K, device=device)
    orders = [
        columns.view(-1, 2, 2**i, b // 2).transpose(1, 2).flatten() for i in reversed(range(m))
    ]
    return torch.stack(orders)
