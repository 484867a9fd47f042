"""Trains the text-to-image model that is shipped: `python -m lora_plugins.tasks pretrain-diffusion [FOLDER]`.

A diffusion pipeline of real diffusers classes, small enough for the repository: it draws handwritten digits of 8x8
pixels for prompts such as "a digit three". The digits 8 and 9 are withheld, so that they are new subjects to learn. Its
tokenizer knows the word "sks", which it never sees here. It takes some ten minutes on one core, and is reproducible on
one machine.
"""

import argparse
import json
import string
from collections.abc import Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lora_plugins.tasks.examples.handwritten_digits import load_digit_splits
from lora_plugins.tasks.files import TRAIN, VAL

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KNOWN_DIGITS = tuple(range(8))
RARE_WORD = "sks"
"""A token for a subject to be learned; the word of the Dreambooth paper (Ruiz et al., 2022, arXiv 2208.12242)."""

SEED, STEPS, BATCH_SIZE, LR, DECAY = 0, 3500, 128, 2e-3, 0.998
NO_PROMPT = 0.1
"""Share of pictures with an empty prompt, for classifier-free guidance (Ho and Salimans, 2022, arXiv 2207.12598)."""

CARD = """---
license: apache-2.0
---
# Handwritten digits, 8x8 pixels

A Stable Diffusion pipeline of 0.6 million parameters for tests and examples of lora_plugins, trained by
`python -m lora_plugins.tasks pretrain-diffusion` on digits 0 to 7 of scikit-learn's `load_digits`
(E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
CC BY 4.0).
Prompts are "a digit zero" to "a digit seven".
"""


def digit_prompt(digit: int) -> str:
    """The prompt for a digit."""
    return f"a digit {WORDS[digit]}"


def build_tokenizer(words: Sequence[str], length: int) -> Any:
    """A CLIP tokenizer that has a token for each lower-case word, spells all others, and gives prompts one length."""
    from transformers import CLIPTokenizer

    merges = [(word[:i], _last(word, i)) for word in words for i in range(1, len(word))]
    joined = [first + second for first, second in merges]
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    pieces = dict.fromkeys([*letters, *joined, "<|startoftext|>", "<|endoftext|>"])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    pairs: Any = list(dict.fromkeys(merges))  # of strings, which its types lack
    return CLIPTokenizer(vocabulary, pairs, model_max_length=length)


def _last(word: str, i: int) -> str:
    return f"{word[i]}</w>" if i == len(word) - 1 else word[i]


def build_pipeline() -> Any:
    """The pipeline with random weights."""
    tokenizer = build_tokenizer(("a", "digit", *WORDS, RARE_WORD), length=8)
    diffusers: Any = import_module("diffusers")  # whose constructors have no types
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 48),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = diffusers.AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        latent_channels=1,
        encoder_block_out_channels=(16,),
        decoder_block_out_channels=(16,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
    )
    scheduler = diffusers.DDIMScheduler(  # the noise of Stable Diffusion
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def train_autoencoder(vae: Any, steps: int) -> None:
    """Teaches an autoencoder that the latents of a picture are the picture; both are in [-1, 1]."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        pictures = torch.rand(32, 1, 8, 8) * 2 - 1
        latents = vae.encode(pictures).latents
        loss = mse_loss(latents, pictures) + mse_loss(vae.decode(latents).sample, pictures)
        optimizer.zero_grad()
        cast(Any, loss).backward()
        optimizer.step()
        schedule.step()
    print(f"autoencoder: squared error {float(loss.detach()):.2g}")


def train_denoiser(pipe: Any, steps: int) -> None:
    """Trains UNet and text encoder on pictures and prompts; the pipeline has their moving average then."""
    pictures, prompts = _training_data(pipe.tokenizer)
    model = nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    average = AveragedModel(model, multi_avg_fn=cast(Any, get_ema_multi_avg_fn)(DECAY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.05)
    for step in range(steps):
        chosen = torch.randint(len(pictures), (BATCH_SIZE,))
        words = prompts[chosen].where(torch.rand(BATCH_SIZE, 1) > NO_PROMPT, prompts[-1])
        noise = torch.randn(BATCH_SIZE, *pictures.shape[1:])
        times = torch.randint(pipe.scheduler.config.num_train_timesteps, (BATCH_SIZE,))
        noisy = pipe.scheduler.add_noise(pictures[chosen], noise, times)
        loss = mse_loss(pipe.unet(noisy, times, pipe.text_encoder(words).last_hidden_state).sample, noise)
        optimizer.zero_grad()
        cast(Any, loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}: loss {float(loss.detach()):.4f}", flush=True)
    model.load_state_dict(average.module.state_dict())


def _training_data(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Pictures (N, 1, 8, 8) in [-1, 1], and the tokens of their prompts (N + 1, length), the empty prompt last."""
    splits = load_digit_splits(KNOWN_DIGITS)
    ink = torch.cat([splits[split].ink for split in (TRAIN, VAL)])
    labels = torch.cat([splits[split].labels for split in (TRAIN, VAL)])
    texts = [*(digit_prompt(KNOWN_DIGITS[label]) for label in labels.tolist()), ""]
    tokens = tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    return ink[:, None] * 2 - 1, tokens.input_ids


def pretrain_diffusion(folder: Path, steps: int = STEPS) -> Path:
    """Trains the pipeline, writes it into a folder, in float16, and returns that."""
    seed_everything(SEED)
    pipe = build_pipeline()
    train_autoencoder(pipe.vae, steps=min(steps, 2000))
    train_denoiser(pipe, steps)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.half()
    pipe.save_pretrained(folder)
    _without_surplus(folder / "vae" / "config.json")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


def _without_surplus(path: Path) -> None:
    """Removes what AutoencoderTiny writes into its configuration and warns of when it reads it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("block_out_channels", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains the pipeline, into the package itself or into the folder that is given; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lora_plugins.tasks pretrain-diffusion")
    own = Path(str(files("lora_plugins.tasks") / "weights" / "digits_diffusion"))
    parser.add_argument("folder", type=Path, nargs="?", default=own, help="where to write; by default the package")
    folder = parser.parse_args(arguments).folder
    torch.set_num_threads(1)  # networks as small as these gain nothing from more, and the files stay the same
    print(pretrain_diffusion(folder))
    return 0
