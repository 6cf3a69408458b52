"""Everything about the package is declared in pyproject.toml; this lets older tools find it."""

from setuptools import setup

setup()
