"""Make the small text-to-image pipeline that the package ships for FLUX on Fashion-MNIST: text encoders and an autoencoder.

    python scripts/make_small_pipeline.py

The text encoders are a CLIP and a T5 of a few thousand weights, drawn at random once and never trained: what a prompt means is
learned by the transformer, for which it is enough that different words look different. Their tokenizers know some seventy words and
take every other for <unk>. The autoencoder turns 2 x 2 blocks of pixels into four channels. Running it again gives the same files.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from dydit_cli.pipelines.patch_autoencoder import PatchAutoencoder

SEED = 0
VOCABULARY = """
a an the of in on and with one no picture photo image drawing small grey black white dark light t-shirt
tshirt shirt top tee trouser trousers pants jeans pullover sweater jumper dress gown coat jacket sandal
sandals sneaker sneakers shoe shoes trainer bag handbag purse ankle boot boots short long sleeve sleeves
fashion clothing garment wear product piece side front view
"""
WORDS = VOCABULARY.split()
CLIP_TOKENS, T5_TOKENS = 16, 7
WIDTH = 32
TARGET = Path(__file__).parent.parent / "dydit_cli" / "assets" / "pipelines" / "flux_fmnist"


def tokenizer(kind: str, length: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: CLIP's surrounds a text with two marks and pads with the second, T5's ends it with one."""
    marks = ["<pad>", "</s>", "<unk>"] if kind == "t5" else ["<start>", "<unk>", "<end>"]
    made = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate([*marks, *WORDS])}, unk_token="<unk>")
    )
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(",", "isolated")]
    )
    template = "$A </s>" if kind == "t5" else "<start> $A <end>"
    special = ["</s>"] if kind == "t5" else ["<start>", "<end>"]
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, made.token_to_id(word)) for word in special]
    )
    ends = (
        {"eos_token": "</s>", "pad_token": "<pad>"}
        if kind == "t5"
        else {
            "bos_token": "<start>",
            "eos_token": "<end>",
            "pad_token": "<end>",
        }
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=length,
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        **ends,
    )


def clip(words: PreTrainedTokenizerFast) -> CLIPTextModel:
    """One layer; weights large enough for the pooled state to tell words apart."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=CLIP_TOKENS,
            projection_dim=WIDTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            initializer_factor=20.0,
        )
    )


def t5(words: PreTrainedTokenizerFast) -> T5EncoderModel:
    """One layer: mostly the words' own embeddings."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(words),
            d_model=WIDTH,
            d_kv=16,
            d_ff=2 * WIDTH,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
        )
    )


def main() -> None:
    """Parse the arguments and write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target", type=Path, default=TARGET, help="folder to write (default: the package's)"
    )
    folder: Path = parser.parse_args().target
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(SEED)
    parts = {"tokenizer": tokenizer("clip", CLIP_TOKENS), "tokenizer_2": tokenizer("t5", T5_TOKENS)}
    parts |= {"text_encoder": clip(parts["tokenizer"]), "text_encoder_2": t5(parts["tokenizer_2"])}
    parts["vae"] = PatchAutoencoder(image_channels=1, patch_size=2)
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    for name, part in parts.items():
        part.save_pretrained(str(folder / name))
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes its files private
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
        "vae": ["dydit_cli.pipelines.patch_autoencoder", "PatchAutoencoder"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
