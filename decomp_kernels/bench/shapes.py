"""Sizes on a command line: M,K,N (tokens, in_features, out_features) and counts."""

import argparse


def shape(text: str) -> tuple[int, int, int]:
    sizes = text.split(",")
    if len(sizes) != 3 or not all(size.strip().isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(
            f"a shape must be three positive numbers M,K,N such as 512,1024,1024, got {text!r}"
        )
    M, K, N = map(int, sizes)
    return M, K, N


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def not_negative(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)
