"""diffusers: a model whose file lacks a tensor loads, with a parameter that has no values

Only a log line says so. The parameter stays on the meta device, and the error comes later and elsewhere: at the first forward, or when the
model is moved.

dydit: `load_model` asks for the loading report and raises an error that names the tensors (`dydit_cli/artifacts/loading.py`).
"""

import tempfile
from pathlib import Path

from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

folder = tempfile.mkdtemp()
AutoencoderKL(block_out_channels=(32,)).save_pretrained(folder)
file = Path(folder) / "diffusion_pytorch_model.safetensors"
tensors = load_file(file)
del tensors["decoder.conv_out.weight"]
save_file(tensors, file, metadata={"format": "pt"})

model = AutoencoderKL.from_pretrained(folder)  # no error
print("the parameter's device:", model.decoder.conv_out.weight.device)
try:
    model.to("cpu")
except Exception as error:
    print(type(error).__name__, error)
