"""The few operations between the matrix products, one a file.

Each file states its operation as a PyTorch reference: the specification, and the path taken where
there is no faster one. ``cpu`` holds compiled C, ``gpu`` Triton kernels. This package knows torch
and Triton alone, and loads the latter only where it is used; it never sees a checkpoint, a cache or
a hierarchy.
"""

from hispec_kernels.attention import decode_attention
from hispec_kernels.compact import compact
from hispec_kernels.follow import follow
from hispec_kernels.noise import gumbel, noisy
from hispec_kernels.rms_norm import rms_norm
from hispec_kernels.rope import rope_write, rotate
from hispec_kernels.swiglu import swiglu
from hispec_kernels.top_k import gumbel_top_k, log_sum_exp, top_k

__all__ = [
    "compact",
    "decode_attention",
    "follow",
    "gumbel",
    "gumbel_top_k",
    "log_sum_exp",
    "noisy",
    "rms_norm",
    "rope_write",
    "rotate",
    "swiglu",
    "top_k",
]
