"""Images, lists of samples and splits on disk, read without what training needs, so that mistakes are told at once.

Data modules are in `data`; `autoconfig` looks at files through this room before anything heavy is imported.
"""

from lora_plugins.tasks.files.image_io import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    check_folder,
    decode_image,
    image_files,
    open_image,
    read_errors,
    read_image,
    subfolders,
)
from lora_plugins.tasks.files.sample_lists import read_list, row_split
from lora_plugins.tasks.files.splits import TEST, TRAIN, VAL, check_shares, hold_out

__all__ = [
    "IMAGE_SUFFIXES",
    "MASK_SUFFIXES",
    "TEST",
    "TRAIN",
    "VAL",
    "check_folder",
    "check_shares",
    "decode_image",
    "hold_out",
    "image_files",
    "open_image",
    "read_errors",
    "read_image",
    "read_list",
    "row_split",
    "subfolders",
]
