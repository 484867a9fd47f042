"""Pictures of the class: drawn once, kept, and never too few."""

import multiprocessing
import resource
import signal

import pytest

from lora_plugins import ConfigError
from lora_plugins.integrations.diffusers import Sampling
from lora_plugins.tasks import ClassPictures, DataError, PicturesDataModule
from tests.integrations.diffusers.pipelines import build

SAMPLING = Sampling(steps=1, guidance=1.0, batch_size=2)


def test_they_are_drawn_once_and_kept(tmp_path):
    pipe = build("Stable Diffusion")
    asked = ClassPictures(str(tmp_path / "class"), ["a dog", "a cat"], count=3, sampling=SAMPLING)
    assert asked.draw_missing(pipe) == 3
    pictures = asked.read()
    assert [picture.prompt for picture in pictures] == ["a dog", "a cat", "a dog"]
    written = {path: path.read_bytes() for path in asked.present()}
    assert len({*written.values()}) == 3
    assert asked.draw_missing(pipe) == 0
    pictures[1].path.unlink()
    assert asked.draw_missing(pipe) == 1
    assert {path: path.read_bytes() for path in asked.present()} == written
    assert (
        ClassPictures(str(tmp_path / "class"), ["a dog", "a cat"], count=5, sampling=SAMPLING).draw_missing(pipe) == 2
    )


def _draw_and_be_killed(asked):
    pipe = build("Stable Diffusion")
    pipe.set_progress_bar_config(disable=True)  # which may be written into a file
    ClassPictures(f"{asked.folder}-first", asked.prompts, count=1, sampling=SAMPLING).draw_missing(pipe)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the first picture ends the process where it is half written
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    asked.draw_missing(pipe)


@pytest.mark.slow
def test_a_killed_run_leaves_no_half_picture(tmp_path):
    asked = ClassPictures(str(tmp_path / "class"), ["a dog", "a cat"], count=3, sampling=SAMPLING)
    process = multiprocessing.get_context("spawn").Process(target=_draw_and_be_killed, args=(asked,))
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGXFSZ
    assert not asked.present()
    assert asked.draw_missing(build("Stable Diffusion")) == len(asked.read()) == 3


def test_own_pictures_count(tmp_path, picture_folder):
    folder = picture_folder((16, 16), (16, 16), name="class")
    for number in range(2):
        (folder / f"{number}.txt").write_text("a dog of mine")
    asked = ClassPictures(str(folder), ["a dog"], count=3, sampling=SAMPLING)
    asked.check()
    assert asked.draw_missing(build("Stable Diffusion")) == 1
    assert [picture.prompt for picture in asked.read()] == ["a dog of mine", "a dog of mine", "a dog"]


def test_too_few_are_named_before_anything_is_trained(tmp_path, picture_folder):
    asked = ClassPictures(str(tmp_path / "class"), ["a dog"], count=3, generate=False)
    data = PicturesDataModule(str(picture_folder((8, 8))), prompt="a sks dog", class_pictures=asked)
    with pytest.raises(DataError, match="has 0 pictures of the class, and 3 are asked for"):
        data.setup("fit")


def test_pictures_of_other_prompts_are_not_taken_for_these(tmp_path):
    folder = str(tmp_path / "class")
    ClassPictures(folder, ["a dog"], count=1, sampling=SAMPLING).draw_missing(build("Stable Diffusion"))
    with pytest.raises(DataError, match=r"drawn for other prompts \(a dog\)"):
        ClassPictures(folder, ["a cat"], count=1).check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"prompts": []}, "at least one"), ({"prompts": [""]}, "no empty one"), ({"prompts": ["a"], "count": 0}, "count")],
    ids=["no prompt", "an empty prompt", "none"],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ClassPictures("folder", **arguments)
