"""diffusers: importing any model imports torchao where that is installed, with its warnings

Nothing quantised is asked for; the loaders of models look at torchao's classes to know them.

dydit: nothing; the lines are harmless, and go to stderr.
"""

import subprocess
import sys

code = "import sys; from diffusers import AutoencoderKL; print('torchao imported:', 'torchao' in sys.modules)"
done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
print(done.stdout.strip())
print("last line on stderr:", (done.stderr.strip().splitlines() or ["none"])[-1])
