"""Matrix pattern constraints over a whole model (Si, Yang, Shen 2024, arXiv:2407.05417).

    MPC_o  ||A A^T - I||_F^2 + ||B^T B - I||_F^2               A = down [r, K]    B = up [N, r]
    MPC_d  ||A A^T - I||_F^2 + ||B^T B - diag(B^T B)||_F^2
    MPC_n  a nonlinearity between A and B, no loss: LoRA(activation="relu")

(The paper has x on the left and A [K, r], B [r, N]; these are its equations in torch's layout.)
"""

import math

from torch import Tensor, nn

from decomp_kernels.methods.base import Holder
from decomp_kernels.ops.gram import gram_penalty
from decomp_kernels.reference.gram import KINDS

REDUCTIONS = ("sum", "mean", "mean_over_matrices")


def mpc_loss(
    model: nn.Module,
    kind: str = "o",
    coef: float = 0.1,
    *,
    squared: bool = True,
    reduction: str = "sum",
) -> Tensor:
    """A scalar to add to the task's loss: how far every A and B is from the pattern, times coef.

    kind "o": A A^T and B^T B near the identity, for methods whose core is a diagonal (TriLoRA,
    AdaLoRA) and, more strictly than it needs, LoRA.  kind "d": A A^T near the identity and B^T B
    near a diagonal, for methods without a core (LoRA, DoRA).

    It takes the active adapter of every adapted layer that trains both a ``down`` [r, K] and an
    ``up`` [N, r]; frozen parts do not count.  All are one grouped call with a hand-written
    gradient, in float32 (float64 for float64 adapters), under autocast too.

    coef: the paper states none.  Its authors' code has 0.1 on most GLUE tasks and 0.3 on RTE and
    STS-B, for AdaLoRA alone, and with other norms than the paper's: squared=False and
    reduction="mean_over_matrices".  With these two and coef = orth_reg_weight it is AdaLoRA's own
    regulariser, PEFT's included.

    squared=False takes ||E||_F for ||E||_F^2; its gradient is 0 where E is.  reduction: "sum" over
    the layers as in the paper, "mean" over the layers, "mean_over_matrices" over every A and B.

    Raises ValueError where no layer has such an adapter.
    """
    if kind == "n":
        raise ValueError(
            'kind must be "o" or "d", got "n": MPC_n is a nonlinearity between A and B and no '
            'loss; use LoRA(activation="relu") or ParallelAdapter()'
        )
    if kind not in KINDS:
        raise ValueError(f'kind must be "o" or "d", got {kind!r}')
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not (math.isfinite(coef) and coef >= 0):
        raise ValueError(f"coef must be finite and at least 0, got {coef}")
    downs, ups = [], []
    for module in model.modules():
        adapter = module.current() if isinstance(module, Holder) else None
        if adapter is None:
            continue
        tensors = dict(adapter.named_parameters(recurse=False))
        down, up = tensors.get("down"), tensors.get("up")
        if down is not None and up is not None and down.requires_grad and up.requires_grad:
            downs.append(down)
            ups.append(up)
    if not downs:
        raise ValueError(
            "model must have an active adapter that trains A = down and B = up, and has none; "
            "call decomp_kernels.adapt(model, LoRA()) first (SSL, SSB, IA3, BitFit and VeRA have "
            "no such pair)"
        )
    count = {"sum": 1, "mean": len(downs), "mean_over_matrices": len(downs) + len(ups)}[reduction]
    return gram_penalty(downs, ups, kind, squared=squared, scale=coef / count)
