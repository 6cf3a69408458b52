"""``decomp-kernels bench``: its suites, each a file with ``add`` (its options) and ``run``."""

import argparse

from decomp_kernels.cli.bench import layer, model, quality, report, scale, table

SUITES = (layer, model, scale, quality, report, table)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    for suite in SUITES:
        suite.add(suites)
