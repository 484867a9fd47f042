"""Images, lists of samples and splits on disk, read without the imports of training, so that mistakes show at once.

Data modules are in `data`; `autoconfig` looks at files through this room before anything heavy is imported.
"""

from lora_plugins.tasks.files.image_folders import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    NO_IMAGE,
    check_folder,
    image_files,
    images_below,
    is_hidden,
    left_out,
    named_by_text,
    one_left_out,
    paired,
    subfolders,
    without_images,
)
from lora_plugins.tasks.files.image_io import (
    as_png,
    as_rgb,
    decode_image,
    open_image,
    read_all,
    read_image,
    shown_size,
)
from lora_plugins.tasks.files.image_paths import absolute, named_images
from lora_plugins.tasks.files.sample_lists import (
    ANNOTATIONS,
    DRAWN_FIRST,
    READERS,
    SPLIT_COLUMN,
    path_key,
    read_list,
    read_text,
    row_split,
)
from lora_plugins.tasks.files.splits import TEST, TRAIN, VAL, check_shares, hold_out, leaves_one

__all__ = [
    "ANNOTATIONS",
    "DRAWN_FIRST",
    "IMAGE_SUFFIXES",
    "MASK_SUFFIXES",
    "NO_IMAGE",
    "READERS",
    "SPLIT_COLUMN",
    "TEST",
    "TRAIN",
    "VAL",
    "absolute",
    "as_png",
    "as_rgb",
    "check_folder",
    "check_shares",
    "decode_image",
    "hold_out",
    "image_files",
    "images_below",
    "is_hidden",
    "leaves_one",
    "left_out",
    "named_by_text",
    "named_images",
    "one_left_out",
    "open_image",
    "paired",
    "path_key",
    "read_all",
    "read_image",
    "read_list",
    "read_text",
    "row_split",
    "shown_size",
    "subfolders",
    "without_images",
]
