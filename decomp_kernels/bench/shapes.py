"""M,K,N on a command line: tokens, in_features, out_features."""

import argparse


def shape(text: str) -> tuple[int, int, int]:
    sizes = text.split(",")
    if len(sizes) != 3 or not all(size.strip().isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(
            f"a shape must be three positive numbers M,K,N such as 512,1024,1024, got {text!r}"
        )
    M, K, N = map(int, sizes)
    return M, K, N
