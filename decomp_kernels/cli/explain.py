"""``decomp-kernels explain``: one layer's choice of implementation, with its roofline."""

import argparse
import json

import torch
from torch import nn

from decomp_kernels.cli.errors import BadInput
from decomp_kernels.explanation import explain
from decomp_kernels.linear import DecomposedLinear
from decomp_kernels.methods import methods

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(args: argparse.Namespace) -> int:
    from decomp_kernels.cli.options import parse_value

    M, K, N = args.shape
    registry = methods()
    if args.method not in registry:
        raise BadInput(f"--method must be one of {', '.join(registry)}, got {args.method!r}")
    options = {}
    for text in args.option:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise BadInput(f"-O must be KEY=VALUE such as r=16, got {text!r}")
        options[key.replace("-", "_")] = parse_value(value)
    dtype = DTYPES[args.dtype]
    try:
        linear = nn.Linear(K, N, bias=False, dtype=dtype)
        adapter = None if args.float32_adapter else dtype
        layer = DecomposedLinear(linear, registry[args.method](**options), dtype=adapter)
        found = explain(layer, M, args.device, training=not args.inference)
    except (ValueError, TypeError, RuntimeError) as error:
        raise BadInput(str(error)) from None
    print(json.dumps(found.as_dict(), indent=1) if args.json else found)
    return 0
