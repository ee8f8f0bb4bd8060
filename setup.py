"""Build entry; everything declarative is in pyproject.toml. Native code of csrc/ is added here when there is some."""

from setuptools import setup

setup()
