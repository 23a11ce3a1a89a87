"""Run a piece of code in several gloo processes, the module built before there is a process group."""

import os
import subprocess
import sys

import torch

HARNESS = """
import sys, torch, torch.distributed as dist
torch.set_num_threads(1)
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

{source}

built = build()
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{{folder}}/store{{world}}", rank=rank, world_size=world)
result = work(built, rank, world)
torch.save(result, f"{{folder}}/out{{world}}_{{rank}}.pt")
if world > 1:
    dist.barrier()
    dist.destroy_process_group()  # left to the end of the interpreter, gloo's threads may abort the process
"""


def run_ranks(tmp_path, source, world):
    """What ``work(build(), rank, world)``, both defined by ``source``, returns on every rank; one rank has no group."""
    script = tmp_path / f"script{world}.py"
    script.write_text(HARNESS.format(source=source))
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(tmp_path)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(error[-3000:] for error in errors)
    return [torch.load(tmp_path / f"out{world}_{rank}.pt") for rank in range(world)]
