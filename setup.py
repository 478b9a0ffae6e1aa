"""Builds the native CPU kernels; all else about the package is in pyproject.toml.

Each file of kernels chooses its own instructions, and the library chooses among them where it runs, so that nothing
here depends on the machine that builds. Without a compiler the package is installed without the kernels.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("fastgpt_jax/kernels/cpu/native")
# Products and sums round one by one unless a kernel asks for them together: roundings are compared with XLA's.
FLAGS = (
    "-std=c++20 -O3 -g0 -fvisibility=hidden -fno-math-errno -ffp-contract=off -Wall -Wno-attributes -Wno-psabi".split()
)
WITHOUT = (
    "the native CPU kernels are NOT built: {reason}. The package works without them, but runs quantized and bfloat16 "
    "models on CPU through XLA, many times slower. Install a C++20 compiler (g++ 11 or newer) and install again."
)


class BuildNative(build_ext):
    """Compiles what changed, on all cores; says loudly what it means when that fails."""

    def run(self):
        try:
            super().run()
        except Exception as error:  # A toolchain fails in many ways; the package installs in all of them.
            self._warn(error)

    def build_extension(self, ext):
        try:
            self._build(ext)
        except Exception as error:
            self._warn(error)

    def _build(self, ext):
        import jaxlib  # noqa: PLC0415  Without it, too, the package installs.

        flags = ["-isystem", str(Path(jaxlib.__file__).parent / "include"), *ext.extra_compile_args]
        headers = [*NATIVE.glob("*.h"), Path(__file__), Path(jaxlib.__file__).parent / "version.py"]
        newest_header = max(path.stat().st_mtime for path in headers)

        def compile_one(source):
            made = Path(self.compiler.object_filenames([source], output_dir=self.build_temp)[0])
            newest = max(newest_header, Path(source).stat().st_mtime)
            if self.force or not made.exists() or made.stat().st_mtime < newest:
                self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags)
            return str(made)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            objects = list(threads.map(compile_one, ext.sources))
        path = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, path, extra_postargs=ext.extra_link_args, target_lang="c++")

    def _warn(self, error):
        text = WITHOUT.format(reason=" ".join(str(error).split()) or type(error).__name__)
        print(f"\n{'*' * 100}\nWARNING: {text}\n{'*' * 100}\n", file=sys.stderr)


def sources():
    return sorted(str(path) for path in NATIVE.glob("*.cc") if path.stem != "harness")


setup(
    ext_modules=[
        Extension(
            "fastgpt_jax.kernels.cpu._native",
            sources(),
            depends=sorted(map(str, NATIVE.glob("*.h"))),
            extra_compile_args=FLAGS,
            extra_link_args=["-Wl,-s"],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
