"""What only a GPU can run is left to GPUs, and to the virtual one."""

import torch

if not torch.cuda.is_available():
    collect_ignore = ["test_on_a_gpu.py"]
