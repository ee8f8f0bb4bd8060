"""Build entry: the native library of csrc/. Everything declarative is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import Extension, setup

build_hash = runpy.run_path(str(Path(__file__).parent / "vllm_adrenaline" / "native" / "build_hash.py"))["build_hash"]

setup(
    ext_modules=[
        Extension(
            "vllm_adrenaline.native._native",
            sources=sorted(str(path) for path in Path("csrc/bindings").glob("*.cpp")),
            depends=[str(path) for path in Path("csrc").rglob("*.h")],
            language="c++",
            define_macros=[("ADRENALINE_SOURCES", f'"{build_hash(Path("csrc"))}"'), ("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=["-std=c++17", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden"],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
