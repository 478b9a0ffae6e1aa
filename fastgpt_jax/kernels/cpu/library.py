"""The native library: whether it can be used here, and its targets registered with XLA.

Knows no operation. The one idea: the library lists its own targets, and whatever is wrong with it is a reason that can
be told, never a crash: without it everything runs through XLA.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import re
from pathlib import Path

import jax

NAME = "_native"
PLATFORM = "cpu"
INTERFACE = "1"
"""What the targets are called, take, give and mean; another one wherever machine code that calls them must not run."""
TARGET_PREFIX = "fastgpt_"


def unusable_reason() -> str | None:
    """Why the native kernels cannot be used here; None where they can. Registers them."""
    return _registered()[1]


def register() -> None:
    """Makes the targets known to XLA: before a program that calls them is compiled or loaded. Once is enough.

    Raises:
      NotImplementedError: They cannot be used here.
    """
    if reason := unusable_reason():
        raise NotImplementedError(reason)


def interface() -> str:
    """The interface of the kernels that can be used here; empty where none can."""
    return "" if unusable_reason() else INTERFACE


def isa() -> str:
    """The instructions that the kernels use here, as FASTGPT_CPU_ISA names them."""
    library = _registered()[0]
    if library is None:
        raise NotImplementedError(unusable_reason())
    return library.fastgpt_isa().decode()


@functools.cache
def _registered() -> tuple[ctypes.CDLL | None, str | None]:
    library, reason = _load(find())
    if library is None:
        return None, reason
    try:
        _register(library)
    except Exception as error:
        return None, f"XLA refuses the native CPU kernels: {str(error).splitlines()[0]}; {_REBUILD}"
    return library, None


_REBUILD = "reinstall the package with a C++ compiler and the installed jaxlib: pip install --no-build-isolation -e ."


def find() -> Path | None:
    """The file of the library, where one was built."""
    folder = Path(__file__).parent
    paths = (folder / f"{NAME}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def _load(path: Path | None) -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why not."""
    if path is None:
        return None, f"the native CPU kernels were not built with this installation; {_REBUILD}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the native CPU kernels cannot be loaded: {error}; {_REBUILD}"
    library.fastgpt_next_target.restype = library.fastgpt_target_handler.restype = ctypes.c_void_p
    library.fastgpt_target_name.restype = ctypes.c_char_p
    library.fastgpt_isa.restype = library.fastgpt_isa_problem.restype = ctypes.c_char_p
    for function in (library.fastgpt_next_target, library.fastgpt_target_name, library.fastgpt_target_handler):
        function.argtypes = [ctypes.c_void_p]
    if (problem := library.fastgpt_isa_problem()) is not None:
        return None, problem.decode()
    built_for, here = library.fastgpt_ffi_api_major(), _api_major()
    if here != built_for:
        return None, f"the native CPU kernels speak version {built_for} of XLA's interface, jaxlib {here}; {_REBUILD}"
    return library, None


def _api_major() -> int | None:
    """The major version of the interface, as the installed jaxlib's headers tell it.

    XLA refuses another one when it starts a device, not when a target is registered: then nothing would run any more.
    Minor versions are no matter (`native/target.h`).
    """
    try:
        header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    except OSError:
        return None
    found = re.search(r"#define XLA_FFI_API_MAJOR (\d+)", header)
    return int(found[1]) if found else None


def _register(library: ctypes.CDLL) -> None:
    target = library.fastgpt_next_target(None)
    while target is not None:
        handler = jax.ffi.pycapsule(ctypes.c_void_p(library.fastgpt_target_handler(target)))
        jax.ffi.register_ffi_target(library.fastgpt_target_name(target).decode(), handler, platform=PLATFORM)
        target = library.fastgpt_next_target(target)
