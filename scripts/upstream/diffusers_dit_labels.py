"""diffusers: a `DiTPipeline` forgets the names of its classes when it is saved

`id2label` is an argument of the pipeline and a component of its `model_index.json`; the constructor does not register it.

dydit: writes it into the exported `model_index.json`; a pipeline that diffusers saves again loses it ([export.md](export.md)).
"""

import json
import tempfile
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

transformer = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=16, num_layers=1, sample_size=4)
names = {0: "tench", 1: "goldfish"}
pipeline = DiTPipeline(transformer, AutoencoderKL(block_out_channels=(32,)), DDIMScheduler(), id2label=names)
folder = tempfile.mkdtemp()
pipeline.save_pretrained(folder)
print("before:", pipeline.labels)
print("model_index.json:", sorted(json.loads((Path(folder) / "model_index.json").read_text())))
print("after:", DiTPipeline.from_pretrained(folder).labels)
