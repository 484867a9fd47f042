"""The first bytes of files of weights, which are cheap to check."""

from pathlib import Path

SAFETENSORS = ".safetensors"
WEIGHTS_FILES = (SAFETENSORS, ".pth", ".pt", ".bin", ".ckpt")
"""Endings of files that hold weights."""

PICKLES = (b"PK", b"\x80")
"""With which files of torch.save begin: zip files, and those of old releases."""


def is_of_its_kind(path: Path) -> bool:
    """Whether a file begins as its ending says: as safetensors writes it, or else as torch.save does."""
    with path.open("rb") as file:
        head = file.read(8)
    if path.suffix == SAFETENSORS:  # the length of a header, which follows
        return len(head) == 8 and int.from_bytes(head, "little") + 8 <= path.stat().st_size
    return head.startswith(PICKLES)
