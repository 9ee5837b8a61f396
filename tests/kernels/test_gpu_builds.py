"""The kernels build for real GPUs: Triton's compiler and its assembler need none to be there."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = """
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hispec_kernels.gpu import (
    attention, compact, exit_head, follow, noise, products, rms_norm, rope, rows as copies, top_k,
    turns,
)

B, F, I, L, i = "*bf16", "*fp32", "*i32", "*i64", "i32"

def build(kernel, types, warps=4, stages=1, capability=90, **constants):
    names = kernel.arg_names
    in_turn = constants["TURNS"] = divmod(capability, 10) >= turns.CAPABILITY
    runtime = [name for name in names if name not in constants]
    assert len(runtime) == len(types), (runtime, types)
    signature = dict.fromkeys(names, "constexpr") | dict(zip(runtime, types))
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or name in ("size", "rows", "kv_stride")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages, "launch_pdl": in_turn}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = built.asm["ptx"]
    if in_turn:
        waits = ptx.index("griddepcontrol.wait")
        assert ptx.index("griddepcontrol.launch_dependents") < waits
        touched = re.search(r"(ld|st)\\.global|cp\\.async|prefetch|\\batom|\\bred\\.", ptx)
        assert waits < touched.start(), f"{kernel.__name__} does not wait for its turn"
    return built.metadata.shared, ptx

def spilled(ptx):
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [assembler, "-v", "--gpu-name=sm_90a", "-o", os.devnull, "-"]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return sum(map(int, re.findall(r"(\\d+) bytes spill stores", done.stderr)))

# Plain decoding of SmolLM2: one tile of rows, a K that no block divides.
plain = dict(TILES=1, EVEN=False, BLOCK_N=16, BLOCK_K=256, stages=4)
for half in (B, "*fp16"):
    _, ptx = build(
        products._product, (half, half, half, F, F, I, i, i), BIAS=False, RESIDUAL=True, **plain
    )
    assert "mma.sync" in ptx and spilled(ptx) == 0
cut = dict(TILES=2, BLOCK_N=32, EVEN=True, stages=4)
shared, ptx = build(
    products._product, (B, B, B, F, F, I, i, i), BIAS=True, RESIDUAL=True, BLOCK_K=256, **cut
)
assert "mma.sync" in ptx and "cp.async" in ptx, "no tensor cores, or no pipeline"
assert shared <= 113 << 10, shared  # two programs a processor
# H100, A100, and the many cards with 99 KiB: the cut of a large matrix must leave room
for capability, room in ((90, 227 << 10), (80, 163 << 10), (89, 99 << 10)):
    products._shared_memory = lambda device: room
    for kind, dtype, rows in ((B, torch.bfloat16, 8192), (F, torch.float32, 8192)):
        device = SimpleNamespace(type="cuda")
        weight = SimpleNamespace(shape=(2 * rows, 4096), device=device, dtype=dtype)
        sizes = products.blocks_for(weight, rows)
        cut_here = dict(TILES=2, EVEN=True, BLOCK_N=sizes["BLOCK_N"], BLOCK_K=sizes["BLOCK_K"])
        options = dict(warps=sizes["num_warps"], stages=sizes["num_stages"], capability=capability)
        types = (kind, kind, B, kind, I, i, i)
        shared, ptx = build(products._gated_product, types, BIAS=True, **cut_here, **options)
        assert shared <= room, (capability, rows, shared)
build(rms_norm._add_rms_norm, (F, F, B, B, I, i, "fp32"), ADD=True, BLOCK=4096, warps=16)
build(rope._rope_write, (F, F, F, B, B, B, I, i, i, i), SIZE=128, HALF=64, HEADS=8)
for load in (True, False):
    build(copies._copy_rows, (F, F, I, i), LOAD=load, BLOCK=1024)
    build(copies._embed_rows, (B, F, I, i), BLOCK=1024)
build(copies._copy_rows, (F, B, I, i), LOAD=True, BLOCK=1024)
build(copies._add_features, (F, F, I, i, i), BLOCK=1024)
for kind, size, group in ((B, 128, 4), ("*fp16", 64, 3), (F, 128, 8), (B, 256, 1)):
    types = (kind, kind, kind, I, F, F, F, "fp32", i, i, i)
    sizes = dict(ROWS=16, SIZE=size, BLOCK=size)
    shared, ptx = build(attention._attend_split, types, GROUP=group, **sizes)
    assert shared <= 227 << 10, shared
    assert kind == F or "mma.sync" in ptx, "no tensor cores"
build(attention._merge, (F, F, F, B, I, i), warps=1, HEADS=1, STEPS=4, **sizes)
build(noise._noisy, (F, F, L, L, L, "fp32", i, i), IDS=True, BLOCK=1024)
types = (B, B, F, F, I, F, F, I, F, L, I, i, i, i)
build(exit_head._head, types, NOISE=True, IDS=True, K=3, BLOCK_K=256, **cut)
types = (F, F, I, F, F, L, L, F, I, i)
_, ptx = build(exit_head._rank, types, IDS=True, K=8, PIECES=4096, warps=8)  # 128,256 tokens
assert spilled(ptx) == 0, "candidates do not fit the registers"
build(follow._follow, (L, L, L, L, L, i), BLOCK=32, warps=1)
build(compact._compact, (B, L, L, I, i, i), BLOCK=128, warps=1)
build(top_k._best, (F, I, F, L, i, i), COLUMNS=True, K=8, BLOCK=4096, warps=8)
build(turns._double, (F, F, i), BLOCK=1024)
print("built")
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs Triton's own assembler")
def test_kernels_build_for_hopper(tmp_path: Path) -> None:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    paths = [str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "built"
