"""The few operations between the matrix products, one a file.

Each file states its operation as a PyTorch reference: the specification, and the path taken on a
CPU. This package knows torch alone; it never sees a checkpoint, a cache or a hierarchy.
"""

from hispec_kernels.attention import decode_attention
from hispec_kernels.follow import follow
from hispec_kernels.noise import gumbel
from hispec_kernels.rms_norm import rms_norm
from hispec_kernels.rope import rope_write, rotate
from hispec_kernels.swiglu import swiglu

__all__ = ["decode_attention", "follow", "gumbel", "rms_norm", "rope_write", "rotate", "swiglu"]
