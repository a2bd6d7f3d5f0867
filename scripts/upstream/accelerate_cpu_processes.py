"""accelerate: `accelerate launch --cpu --num_processes 2` starts one process

Two are asked for, one runs, and nothing is said. The run has half of the batch that was meant. Asked in
[accelerate#2741](https://github.com/huggingface/accelerate/issues/2741).

dydit: starts processes with torchrun's launcher, and a world of another size than the recipe's `processes` is an error
([scale.md](scale.md)).
"""

import subprocess
import sys
import tempfile
from pathlib import Path

script = Path(tempfile.mkdtemp()) / "world.py"
script.write_text("from accelerate import PartialState\nprint('of', PartialState(cpu=True).num_processes)\n")
launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
print(subprocess.run([*launch, script], capture_output=True, text=True, check=True).stdout.strip())
