"""A damaged checkpoint is refused by one error, or loads as what was saved; never as something else."""

import os
import random

import fsspec
import pytest
import torch

from lora_plugins import AdapterFileError
from lora_plugins.integrations.lightning import load_from_checkpoint
from tests.integrations.lightning.checkpoint.checkpoint_cases import by_trainer
from tests.integrations.lightning.toys import Classifier, loader, lora, trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint, and the state dict that it gives."""
    path = by_trainer(tmp_path_factory.mktemp("saved"))
    return path, load_from_checkpoint(Classifier, path).state_dict()


def flipped(content, draw):
    damaged = bytearray(content)
    damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return damaged


def overwritten(content, draw):
    damaged, start = bytearray(content), draw.randrange(len(content))
    damaged[start : start + draw.randint(1, 16)] = draw.randbytes(draw.randint(0, 16))
    return damaged


def truncated(content, draw):
    return content[: draw.randrange(len(content))]


DAMAGES = [flipped, flipped, flipped, overwritten, truncated]


def check(saved, folder, draw):
    path, expected = saved
    damaged = folder / "damaged.ckpt"
    damaged.write_bytes(draw.choice(DAMAGES)(path.read_bytes(), draw))
    try:
        loaded = load_from_checkpoint(Classifier, damaged).state_dict()
    except AdapterFileError:
        return
    assert loaded.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(expected[key], loaded[key])] == []


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_file_is_refused_or_means_the_same(saved, tmp_path, seed):
    draw = random.Random(seed)
    for _ in range(25):
        check(saved, tmp_path, draw)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_thousand_damaged_files(saved, tmp_path):
    draw = random.Random(1000)
    for _ in range(2000):
        check(saved, tmp_path, draw)


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_a_bit_of_a_tensor_is_found_when_training_goes_on(saved, tmp_path, place):
    """Also in a file system that only fsspec reads."""
    content = bytearray(saved[0].read_bytes())
    with torch.serialization.safe_globals([]):
        tensor = saved[1]["net.0.lora_B.default"].numpy().tobytes()
    content[content.index(tensor) + 5] ^= 16
    damaged = {"folder": str(tmp_path / "damaged.ckpt"), "memory": "memory://damaged.ckpt"}[place]
    with fsspec.open(damaged, "wb") as file:
        file.write(content)
    with pytest.raises(AdapterFileError, match=r"is damaged: '.*/data/.*' in it are not what was written"):
        trainer(tmp_path, [lora()], max_epochs=4).fit(Classifier(), loader(), ckpt_path=damaged)


def test_a_file_without_sums_loads(saved, tmp_path):
    """As torch writes it when it is told to leave them out."""
    path = tmp_path / "without.ckpt"
    checkpoint = torch.load(saved[0], weights_only=True)
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(checkpoint, path)
    finally:
        torch.serialization.set_crc32_options(computed)
    load_from_checkpoint(Classifier, path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.ckpt")
    with pytest.raises(AdapterFileError, match="not a regular file"):
        load_from_checkpoint(Classifier, tmp_path / "pipe.ckpt")


READERS = {
    "load_from_checkpoint": lambda path, _: load_from_checkpoint(Classifier, path),
    "trainer": lambda path, folder: trainer(folder, [lora()]).fit(Classifier(), loader(), ckpt_path=path),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_folder_is_told_from_a_damaged_file(tmp_path, read):
    path = tmp_path / "it.ckpt"
    path.mkdir()
    with pytest.raises(AdapterFileError, match=r"it\.ckpt is a folder, and a checkpoint is a file here"):
        read(path, tmp_path)
