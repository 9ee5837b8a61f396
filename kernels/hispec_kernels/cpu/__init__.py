"""The compiled passes of ``passes.c``: built once with the system's C compiler, called by address.

No Python headers and no torch headers: a plain shared library that takes pointers, so building
takes seconds and depends on nothing but a compiler. The library uses the OpenMP runtime torch has
already loaded; a second one in the process would bring a second set of threads that spin against
the first.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

_SOURCES = [
    Path(__file__).parent / name
    for name in (
        *("passes.c", "picks.c", "growth.c"),
        *("lanes.h", "dots.h", "passes.inc.h", "cells.inc.h", "draft.inc.h"),
        *("vectors.inc.h", "pairs.inc.h", "tiles.inc.h"),
    )
]
#: What ``bf16_layout`` returns, by name.
LAYOUTS: tuple[Literal["tiles", "pairs"], ...] = ("tiles", "pairs")
# What counts is written in vectors and unrolled by pragmas. On AVX2 -O3 made passes at most 2 %
# faster, and took 22 s to build instead of 5: users wait for that before their first text.
_FLAGS = ["-std=gnu11", "-O2", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared"]


class BuildError(Exception):
    """The compiled passes are not to be had here; the message says why."""


class Layer(ctypes.Structure):
    """``layer_t``: addresses of one block's weights, keys and values."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "qkv",
            "output",
            "gate_up",
            "down",
            "attention_norm",
            "mlp_norm",
            "qkv_bias",
            "output_bias",
            "gate_up_bias",
            "down_bias",
            "qkv_scale",
            "output_scale",
            "gate_up_scale",
            "down_scale",
            "keys",
            "values",
        )
    ]


class Shape(ctypes.Structure):
    """``shape_t``."""

    _fields_ = [
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("kv_stride", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


class Head(ctypes.Structure):
    """``head_t``: addresses of a trained head's weights, and its block."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("proj", "shallow_kv", "deep_kv", "feature", "vocabulary"),
                *("proj_scale", "shallow_scale", "deep_scale", "feature_scale", "vocabulary_scale"),
                *("proj_bias", "deep_norm", "feature_norm", "norm", "ids"),
            )
        ),
        ("maps", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("block", Layer),
    ]


class Place(ctypes.Structure):
    """``place_t``: what a call of a head works on."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("states", "finals", "feature")),
        *(
            (name, ctypes.c_int64)
            for name in ("root", "final", "start", "first", "end", "new_root")
        ),
    ]


class Counts(ctypes.Structure):
    """``counts_t``: counts of n-grams, by the addresses of their columns."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("keys", "starts", "totals", "tokens", "counts", "buckets")
        ),
        *((name, ctypes.c_uint64) for name in ("rows", "size", "shift")),
    ]


class Grown(ctypes.Structure):
    """``source_t``: tables of counts that a tree grows from."""

    _fields_ = [
        ("tables", ctypes.POINTER(Counts)),
        ("count", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("shares", ctypes.c_void_p),
        ("num_shares", ctypes.c_int64),
    ]


class Recycled(ctypes.Structure):
    """``recycled_t``: the tables of recycled logits."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("singles", "pairs", "owners", "turns")),
        ("vocab_size", ctypes.c_int64),
        ("sets", ctypes.c_int64),
    ]


class Nodes(ctypes.Structure):
    """``nodes_t``: a draft tree."""

    _fields_ = [
        ("root", ctypes.c_int64),
        ("depths", ctypes.c_void_p),
        ("paths", ctypes.c_void_p),
    ]


def covers(hidden: int, intermediate: int, head_dim: int, group: int) -> bool:
    """Returns whether the compiled passes can run a model of these sizes.

    Args:
        hidden: D.
        intermediate: I.
        head_dim: D_h.
        group: query heads a KV head, H / H_kv.
    """
    return all(size % 32 == 0 for size in (hidden, intermediate, head_dim)) and (
        head_dim <= 256 and group <= 16
    )


def load_library(folder: Path) -> ctypes.CDLL:
    """Returns the library, compiled into ``folder`` if this machine has not done so yet.

    Raises:
        BuildError: no compiler, it failed, or the folder cannot be written.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise BuildError("no C compiler (cc or gcc) is installed")
    runtime = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if not runtime.exists():
        raise BuildError("this torch does not use GNU OpenMP")
    digest = hashlib.sha256(" ".join([compiler, *_FLAGS, _processor()]).encode())
    for source in _SOURCES:
        digest.update(source.read_bytes())
    path = folder / f"passes-{digest.hexdigest()[:16]}.so"
    # Promotes torch's runtime to the global scope, where the library finds its symbols.
    ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    with _loading:
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # not there yet, or damaged
            _compile(compiler, path)
            try:
                library = ctypes.CDLL(str(path))
            except OSError as error:
                raise BuildError(f"{path} cannot be loaded: {error}") from None
    if not library.amx_allowed():
        raise BuildError("the kernel does not grant AMX registers")
    pointer, size, real, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    shape, nodes = ctypes.POINTER(Shape), ctypes.POINTER(Nodes)
    for kind in kinds(library):
        # layers, count, shape, x, taps, width, slot, rows, nodes, cos, sin, scratch, threads
        run = getattr(library, f"run_layers_{kind}")
        run.argtypes = [
            *(pointer, size, shape, pointer, pointer, size, size),
            *(pointer, nodes, pointer, pointer, pointer, threads),
        ]
        # w, scale, bias, rows, n, norm, eps, x, width, y, scratch, threads
        project = getattr(library, f"project_{kind}")
        project.argtypes = [
            *(pointer, pointer, pointer, size, size, pointer, real),
            *(pointer, size, pointer, pointer, threads),
        ]
        # w, scale, rows, n, norm, eps, x, width, k, temperature,
        # ids, found, odds, logits, scratch, threads
        best = getattr(library, f"project_best_{kind}")
        best.argtypes = [
            *(pointer, pointer, size, size, pointer, real, pointer, size, size, real),
            *(pointer, pointer, pointer, pointer, pointer, threads),
        ]
        # head, shape, place, nodes, tree, cos, sin, k, temperature,
        # found, odds, logits, room, scratch, threads
        draft = getattr(library, f"draft_{kind}")
        draft.argtypes = [
            *(ctypes.POINTER(Head), shape, ctypes.POINTER(Place), nodes, nodes),
            *(pointer, pointer, size, real, pointer, pointer, pointer, pointer, pointer, threads),
        ]
        run.restype = project.restype = best.restype = draft.restype = None
        if kind == "bytes":
            continue
        # w, n, step, tokens, count, out
        embed = getattr(library, f"embed_{kind}")
        embed.argtypes = [pointer, size, size, pointer, size, pointer]
        # keys, values, shape, projected, count, position, cos, sin
        store = getattr(library, f"store_rows_{kind}")
        store.argtypes = [pointer, pointer, shape, pointer, size, size, pointer, pointer]
        # cache, layers, shape, sources, targets, count, threads
        move = getattr(library, f"move_slots_{kind}")
        move.argtypes = [pointer, size, shape, pointer, pointer, size, threads]
        embed.restype = store.restype = move.restype = None
    # x, rows, n, k, values, columns, scratch, threads
    library.top_k.argtypes = [pointer, size, size, size, pointer, pointer, pointer, threads]
    # x, rows, n, temperature, out, threads
    library.log_sum_exp.argtypes = [pointer, size, size, real, pointer, threads]
    # logits, temperature, seed, positions, tokens, stride, rows, n, out, threads
    library.gumbel.argtypes = [
        *(pointer, real, ctypes.c_uint64, pointer, pointer, size, size, size, pointer, threads),
    ]
    # source, ids, length, budget, priors, highest, depth, out
    for grow in (library.grow_counts, library.grow_recycled):
        grow.argtypes = [
            *(pointer, pointer, size, size, pointer, ctypes.c_double, size, pointer),
        ]
        grow.restype = size
    # tables, shown, count, width, paired
    library.keep_recycled.argtypes = [pointer, pointer, size, size, ctypes.c_int]
    library.keep_recycled.restype = None
    library.top_k.restype = library.log_sum_exp.restype = library.gumbel.restype = None
    return library


def kinds(library: ctypes.CDLL) -> tuple[str, ...]:
    """Returns what weights may be: bf16, fp32 and, where bf16 lies in pairs, bytes."""
    pairs = LAYOUTS[library.bf16_layout()] == "pairs"
    return ("bf16", "fp32", "bytes") if pairs else ("bf16", "fp32")


_in_use: ctypes.CDLL | None = None
#: Whoever needs the library while another thread builds it waits for that.
_loading = threading.Lock()


def use(library: ctypes.CDLL | None) -> None:
    """After the call this process's operations on CPU logits are ``library``'s, or torch's again.

    Noise then rounds otherwise by an ulp, so this belongs before the first text.
    """
    global _in_use
    _in_use = library


def in_use(*tensors: Tensor) -> ctypes.CDLL | None:
    """Returns the library given to :func:`use` if these tensors lie in memory that it can read."""
    return _in_use if all(tensor.device.type == "cpu" for tensor in tensors) else None


def _compile(compiler: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            built = Path(work) / path.name
            units = [str(source) for source in _SOURCES if source.suffix == ".c"]
            command = [compiler, *_FLAGS, *units, "-o", str(built), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode:
                first = (done.stderr.strip().splitlines() or ["no message"])[0]
                raise BuildError(f"{compiler} failed: {first}")
            with open(built, "rb") as file:
                os.fsync(file.fileno())  # a torn library would end the process that loads it
            os.replace(built, path)  # two processes may build at once: both end with a whole file
    except OSError as error:
        raise BuildError(f"cannot build in {path.parent}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise BuildError(f"{compiler} took more than two minutes") from None


def _processor() -> str:
    # -march=native: a library built for one processor may not run on another.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def address(array: ctypes.Array[Layer], index: int) -> int:
    """Returns the address of one record of an array."""
    return ctypes.addressof(array) + index * ctypes.sizeof(array._type_)
