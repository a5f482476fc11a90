"""What two processes do together, one program after the other, so that they start once: run by
test_together.py.

Argument: a folder with a folder for each program.
"""

import sys
from pathlib import Path

import run_ddp
import run_quantized
import run_regularized
import run_sharded
import run_unused
import torch
import torch.distributed as dist

PROGRAMS = ("ddp", "quantized", "regularized", "sharded", "unused")

if __name__ == "__main__":
    ddp, quantized, regularized, sharded, unused = (Path(sys.argv[1]) / name for name in PROGRAMS)
    torch.set_num_threads(1)
    run_ddp.train(2, 4, 2, 1, ddp)  # Lightning starts the second process, and joins both in a group
    run_quantized.train(2, 2, quantized)
    run_regularized.train(2, regularized)
    run_sharded.check(dist.get_rank(), "fsdp2", sharded)
    (sharded / f"rank{dist.get_rank()}.txt").touch()
    run_unused.train(unused)
