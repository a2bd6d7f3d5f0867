"""accelerate: the FSDP2 plug-in on CPUs gives DDP

A plug-in for `fsdp_version=2` is taken and the model comes back as `DistributedDataParallel`: nothing is sharded.

dydit: shards by torch's own `fully_shard`, and shows accelerate nothing of it (`dydit_cli/training/parts.py`).
"""

import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = """
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin

accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
model = accelerator.prepare(torch.nn.Linear(4, 4))
if accelerator.is_main_process:
    print(accelerator.distributed_type, accelerator.num_processes, "processes:", type(model).__name__)
"""
script = Path(tempfile.mkdtemp()) / "sharded.py"
script.write_text(SCRIPT)
launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script]
done = subprocess.run(launch, capture_output=True, text=True)
print(done.stdout.strip() or done.stderr.strip().splitlines()[-1])
