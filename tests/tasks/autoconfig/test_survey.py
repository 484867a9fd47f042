"""What is told from a folder or a list, and what is refused."""

import unicodedata
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_plugins.tasks.autoconfig.found import LABELS, MASKS, Flags
from lora_plugins.tasks.autoconfig.survey import survey
from lora_plugins.tasks.errors import DataError

from ..conftest import noise, write_image, written

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def masked(root, values, *, mode=None, colors=None, count=5, suffix=".png"):
    """Images of 40x60 with masks that hold the values, in stripes."""
    stripes = np.repeat(np.array(values, np.uint8), 60 // len(values))
    mask = np.tile(np.resize(stripes, 60), (40, 1))
    for number in range(count):
        write_image(root / "images" / f"{number}.jpg", noise(40, 60, seed=number))
        image = Image.fromarray(np.array(colors, np.uint8)[mask] if colors else mask)
        image = image.convert(mode) if mode else image
        (root / "masks").mkdir(exist_ok=True)
        image.save(root / "masks" / f"{number}{suffix}")
    return root


class TestLabels:
    def test_splits_in_folders(self, class_folders):
        found = survey(class_folders, Flags())
        assert (found.task, found.module, found.classes) == (LABELS, "ImageFolderDataModule", ("cat", "dog"))
        assert found.counts == {"train": 8, "val": 4}
        assert dict(found.arguments) == {"root": str(class_folders)}

    @pytest.mark.parametrize(("share", "held"), [(None, 2), (0.4, 4)])
    def test_splits_to_make(self, flat_folders, share, held):
        found = survey(flat_folders, Flags(val_share=share))
        assert found.counts == {"train": 10 - held, "val": held}
        assert found.arguments["val_share"] == (share or 0.2)

    @pytest.mark.parametrize("split", ["", "train"])
    @pytest.mark.parametrize(
        "names",
        [("Images", "Masks"), ("image", "image_label"), ("JPEGImages", "SegmentationClass"), ("imgs", "gt")],
        ids="-".join,
    )
    def test_images_and_masks_are_no_classes(self, tmp_path, split, names):
        for name in names:
            write_image(tmp_path / split / name / "1.png", noise())
        expected = tmp_path / "images" / split, tmp_path / "masks" / split
        with pytest.raises(DataError, match=rf"not like classes. They are expected in {expected[0]} and {expected[1]}"):
            survey(tmp_path, Flags())

    def test_images_whose_masks_are_told_by_their_names_are_no_class(self, tmp_path):
        for number in (1, 2, 10):  # of which 10 comes first with an ending, and second without one
            write_image(tmp_path / "Task1_Input" / f"{number}.jpg", noise())
            write_image(tmp_path / "Task1_GroundTruth" / f"{number}_mask.png", noise())
        with pytest.raises(DataError, match="'Task1_GroundTruth', 'Task1_Input', which look like images with masks"):
            survey(tmp_path, Flags())

    @pytest.mark.parametrize(
        ("faces", "masks"),
        [
            (["0.jpg", "1.jpg"], ["0.JPG", "1.JPG"]),
            (["0.jpg", "1.jpg"], ["0.jpeg", "1.jpeg"]),
            (["face_0.jpg", "face_1.jpg"], ["face_0.png", "face_1.png", "face_2.png"]),
        ],
        ids=["endings in capitals", "other endings of JPEG", "one more"],
    )
    def test_classes_of_masks_with_names_as_those_of_another_class(self, tmp_path, faces, masks):
        for folder, names in (("face", faces), ("mask", masks)):
            for name in names:
                write_image(tmp_path / folder / name, noise())
        assert survey(tmp_path, Flags(val_share=0.5)).classes == ("face", "mask")

    @pytest.mark.parametrize("inner", ["", "2024"], ids=["empty", "with folders in them"])
    def test_folders_without_images_are_not_taken_for_images_with_masks(self, tmp_path, inner):
        for name in ("face", "mask"):
            (tmp_path / name / inner).mkdir(parents=True)
        with pytest.raises(DataError) as error:
            survey(tmp_path, Flags())
        assert "masks" not in str(error.value)

    @pytest.mark.parametrize(
        "names", [("mask", "no mask"), ("face", "mask"), ("images with mask", "images without mask")], ids=", ".join
    )
    def test_classes_of_masks(self, tmp_path, names):
        for number in range(5):
            for name in names:
                write_image(tmp_path / name / f"{number}.png", noise())
        assert survey(tmp_path, Flags()).classes == names

    def test_a_list(self, tmp_path):
        rows = []
        for number in range(10):
            write_image(tmp_path / f"{number}.jpg", noise())
            rows.append({"image": f"{number}.jpg", "label": "ab"[number % 2]})
        found = survey(tmp_path.joinpath(written(tmp_path / "list.csv", rows)), Flags())
        assert (found.module, found.classes, found.counts) == (
            "ImageListDataModule",
            ("a", "b"),
            {"train": 8, "val": 2},
        )


class TestMasks:
    @pytest.mark.parametrize(
        ("values", "options", "kind", "classes", "ignored"),
        [
            ([0, 1, 2], {}, "indices", ("class_0", "class_1", "class_2"), 255),
            ([0, 1, 255], {}, "indices", ("class_0", "class_1"), 255),
            ([0, 255], {}, "black and white", ("background", "object"), 255),
            ([0, 255], {"mode": "1"}, "black and white", ("background", "object"), 255),
            ([0, 128, 255], {}, "gray levels", ("gray_0", "gray_128", "gray_255"), 255),
            ([0, 1], {"colors": [RED, GREEN]}, "in color", ("color_00ff00", "color_ff0000"), 255),
            ([0, 1], {"colors": [(0, 0, 0), RED], "mode": "RGBA"}, "in color", ("color_000000", "color_ff0000"), 255),
        ],
        ids=["indices", "with 255", "black and white", "bits", "gray levels", "colors", "colors with alpha"],
    )
    def test_their_coding(self, tmp_path, values, options, kind, classes, ignored):
        found = survey(masked(tmp_path / "data", values, **options), Flags())
        assert (found.task, found.module, found.size) == (MASKS, "MaskFolderDataModule", (32, 64))
        assert (found.coding.kind, found.classes, found.coding.ignore_index) == (kind, classes, ignored)

    @pytest.mark.parametrize(
        ("values", "options", "names", "shown"),
        [
            ([0, 1, 2], {}, ("sky", "road", "car"), ["sky", "road", "car"]),
            ([0, 1], {"colors": [RED, GREEN]}, ("red", "green"), ["red (#00ff00)", "green (#ff0000)"]),
            ([0, 1], {"colors": [RED, GREEN]}, None, ["color_00ff00", "color_ff0000"]),
            ([0, 128, 255], {}, ("sky", "road", "car"), ["sky (0)", "road (128)", "car (255)"]),
            ([0, 255], {}, None, ["background (0)", "object (255)"]),
        ],
        ids=["indices", "colors in another order", "colors", "gray levels", "black and white"],
    )
    def test_each_class_is_shown_with_its_color(self, tmp_path, values, options, names, shown):
        found = survey(masked(tmp_path / "data", values, **options), Flags(classes=names))
        assert [found.coding.shown(name) for name in found.classes] == shown

    @pytest.mark.parametrize(
        ("values", "flags", "expected"),
        [
            ([0, 1, 11], {"ignore_index": 11}, {"classes": ["class_0", "class_1"], "ignore_index": 11}),
            ([0, 1, 2], {"ignore_index": 0}, {"classes": ["class_0", "class_1"], "reduce_labels": True}),
            ([0, 1], {"classes": ("sky", "road", "car")}, {"classes": ["sky", "road", "car"]}),
            ([0, 255], {"classes": ("ground", "cat")}, {"colors": {"ground": [0] * 3, "cat": [255] * 3}}),
            ([0, 255], {"classes": ("ground", "cat"), "ignore_index": 128}, {"classes": ["ground", "cat"]}),
            ([0, 255], {"classes": ("white", "black")}, {"colors": {"white": [255] * 3, "black": [0] * 3}}),
            ([0, 128, 255], {"ignore_index": 255}, {"classes": ["gray_0", "gray_128"]}),
            (
                [0, 128, 255],
                {"ignore_index": 0},
                {"classes": ["gray_128", "gray_255"], "colors": {f"gray_{at}": [at] * 3 for at in (128, 255, 0)}},
            ),
            (
                [0, 128, 255],
                {"ignore_index": 128},
                {"classes": ["background", "object"], "ignore_index": 255},
            ),
            (
                [0, 9, 90],
                {"classes": ("sky", "car", "cat")},
                {"colors": {"sky": [0] * 3, "car": [9] * 3, "cat": [90] * 3}},
            ),
            (
                [0, 9, 90],
                {"classes": ("sky", "car"), "ignore_index": 90},
                {"classes": ["sky", "car"], "colors": {"sky": [0] * 3, "car": [9] * 3, "gray_90": [90] * 3}},
            ),
        ],
        ids=[
            "void above the classes",
            "void at 0",
            "names",
            "names of black and white",
            "black and white beside a void that no mask has",
            "black and white in another order",
            "a gray level that is void",
            "the darkest gray level of three that is void",
            "black and white beside a void that masks have",
            "names of gray levels",
            "names of all gray levels but the void",
        ],
    )
    def test_flags_overrule_it(self, tmp_path, values, flags, expected):
        arguments = dict(survey(masked(tmp_path / "data", values), Flags(**flags)).arguments)
        assert arguments | expected == arguments

    @pytest.mark.parametrize("value", [0, 255], ids=["background", "void"])
    def test_many_classes_beside_much_of_one_value_are_not_smoothed(self, tmp_path, value):
        found = survey(masked(tmp_path / "data", [value] * 50 + list(range(1, 11))), Flags())
        assert len(found.classes) == 11

    @pytest.mark.parametrize(
        ("first", "last"), [(BLACK, RED), (RED, GREEN), (WHITE, BLACK), ((128, 0, 0), (0, 64, 32))], ids=str
    )
    def test_smoothed_colors_are_no_classes(self, tmp_path, first, last):
        mixed = [[round(a + share / 9 * (b - a)) for a, b in zip(first, last, strict=True)] for share in range(1, 9)]
        values = [0] * 20 + list(range(2, 10)) + [1] * 20
        said = r"of two colors with 8 others, as smoothing leaves them between the two"
        with pytest.raises(DataError, match=said):
            survey(masked(tmp_path / "data", values, colors=[first, last, *mixed]), Flags())

    @pytest.mark.parametrize(
        "colors",
        [
            [(at, at, at) for at in range(12)],
            [((53 * at) % 256, (101 * at) % 256, (197 * at) % 256) for at in range(12)],
        ],
        ids=["indices as grays", "palette"],
    )
    def test_many_colors_beside_much_of_two_are_not_smoothed(self, tmp_path, colors):
        values = [0] * 25 + list(range(1, 11)) + [11] * 25
        assert len(survey(masked(tmp_path / "data", values, colors=colors), Flags()).classes) == 12

    def test_too_many_colors_in_all_masks(self, tmp_path):
        """Of instances, say, each of which has a color of its own."""
        root = masked(tmp_path / "data", [0])
        for number, path in enumerate(sorted((root / "masks").iterdir())):
            pixels = np.zeros((40, 60, 3), np.uint8)
            pixels[..., 0], pixels[..., 1] = np.arange(60), number + 1
            write_image(path, pixels)
        with pytest.raises(DataError, match="The masks hold 300 colors together, more than 256"):
            survey(root, Flags())

    def test_names_in_a_file(self, tmp_path):
        root = masked(tmp_path / "data", [0, 1])
        (root / "classes.txt").write_text("sky\nroad\n")
        assert survey(root, Flags()).classes == ("sky", "road")

    def test_names_in_a_file_of_windows(self, tmp_path):
        root = masked(tmp_path / "data", [0, 1])
        (root / "classes.txt").write_bytes(b"\xef\xbb\xbfsky\r\n\r\nroad\r\n")
        assert survey(root, Flags()).classes == ("sky", "road")

    @pytest.mark.parametrize(
        ("content", "message"),
        [("sky\nroad\nsky", "names 'sky' more than once"), ("sky\nallée", r"classes\.txt cannot be read.*UTF-8")],
        ids=["a name twice", "not UTF-8"],
    )
    def test_names_that_cannot_be(self, tmp_path, content, message):
        root = masked(tmp_path / "data", [0, 1])
        (root / "classes.txt").write_text(content, encoding="latin-1")
        with pytest.raises(DataError, match=message):
            survey(root, Flags())

    @pytest.mark.parametrize(
        ("palettes", "is_refused"),
        [
            ([[BLACK, RED, GREEN], [RED, GREEN, BLACK]], True),
            ([[BLACK, RED, GREEN], [GREEN, RED, BLUE]], True),
            ([[BLACK, RED, GREEN], [WHITE, BLUE, YELLOW]], False),
            ([[BLACK, RED, BLACK], [BLACK, RED, BLACK]], False),
            ([[BLACK, RED, GREEN], [BLACK, RED, BLACK]], False),
        ],
        ids=["of each file", "in part", "of another program", "with a color twice", "twice in one file"],
    )
    def test_the_colors_of_indices(self, tmp_path, palettes, is_refused):
        """Programs that make files smaller give each its own palette, and their indices say nothing."""
        for path in (masked(tmp_path, [0, 1, 2]) / "masks").iterdir():
            mask = Image.frombytes("P", (60, 40), Image.open(path).tobytes())
            mask.putpalette([each for color in palettes[int(path.stem) % 2] for each in color])
            mask.save(path)
        if is_refused:
            said = r"The value 0 is #000000 in .*png and #.*png, and one color has several values: these are no"
            with pytest.raises(DataError, match=said):
                survey(tmp_path, Flags())
        else:
            said = r"The value 0 is #000000 in .*png and #ffffff in .*png, and is taken for one class\. If it is not"
            with pytest.warns(UserWarning, match=said) if WHITE in palettes[1] else nullcontext():
                assert survey(tmp_path, Flags()).classes == ("class_0", "class_1", "class_2")

    def test_names_with_accents_that_one_system_writes_apart(self, tmp_path):
        root = masked(tmp_path / "data", [0, 1])
        for folder, form in (("images", "NFC"), ("masks", "NFD")):
            for path in (root / folder).iterdir():
                path.rename(path.with_stem(unicodedata.normalize(form, f"é{path.stem}")))
        assert survey(root, Flags()).counts == {"train": 4, "val": 1}

    def test_masks_elsewhere(self, tmp_path):
        root = masked(tmp_path / "data", [0, 1])
        (root / "masks").rename(tmp_path / "labels")
        found = survey(root / "images", Flags(masks=tmp_path / "labels"))
        assert found.arguments["images"] == "."
        assert found.arguments["masks"] == str(tmp_path / "labels")

    @pytest.mark.parametrize("options", [{}, {"colors": [RED, GREEN]}, {"mode": "1"}], ids=["gray", "color", "bits"])
    def test_the_data_module_takes_what_was_found(self, tmp_path, options):
        from lora_plugins.tasks import MaskFolderDataModule

        found = survey(masked(tmp_path / "data", [0, 255] if options == {"mode": "1"} else [0, 1], **options), Flags())
        data = MaskFolderDataModule(**found.arguments, image_size=found.size, augmentation="none")
        data.setup("fit")
        assert {split: len(samples) for split, samples in data.splits.items()} == found.counts
        assert set(data.splits["train"][0]["target"].unique().tolist()) == {0, 1}


def write_images(root, *names):
    for name in names:
        write_image(root / name, noise())


TREES = {
    "one class": (["cat/0.jpg"], "holds one class, 'cat', and there is nothing to tell apart"),
    "only images": (["0.jpg"], "nothing says what is on them"),
    "too few": (
        ["a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg"],
        r"of each class cannot be held out .* of 4 images of 2 classes\. Add images, or choose another --val-share\.",
    ),
    "one of each": (["a/0.jpg", "b/0.jpg"], r"of 2 images of 2 classes\. Add images, two or more of each class\."),
    "boxes beside classes": (
        ["cat/0.jpg", "dog/0.jpg", "labels/notes.txt"],
        r"labels holds no images: .* If the others are classes, move labels out of .*data\.",
    ),
    "an empty class": (["a/0.jpg", "b/1.jpg", "nothing/"], "nothing holds no image"),
    "other formats": (["a/0.jpg", "b/0.heic"], r"b holds no image \(.*\), but '0\.heic'"),
    "a folder within a class": (
        ["cat/2024/0.jpg", "dog/0.jpg"],
        r"cat holds no image .*; .*cat/2024 does: move them up",
    ),
    "one folder too many": (
        ["photos/a/0.jpg", "photos/b/0.jpg"],
        "data holds one folder, 'photos', with folders in it. Train on .*data/photos",
    ),
    "one in a split too many": (
        ["train/photos/a/0.jpg", "train/photos/b/0.jpg"],
        "train holds one folder, 'photos', with folders in it. Move these up",
    ),
    "a class called train": (
        ["car/0.jpg", "plane/0.jpg", "train/0.jpg"],
        "train is taken for the train split.*another name",
    ),
    "val alone": (["val/a/0.jpg", "test/b/0.jpg"], "none called 'train'"),
    "another name of val": (["train/a/0.jpg", "train/b/0.jpg", "valid/a/0.jpg"], "valid looks like the val split"),
    "splits in other letters": (
        ["Training/a/0.jpg", "Training/b/0.jpg", "Testing/a/0.jpg"],
        "Testing looks like the test split. Call it .*test",
    ),
    "splits of other names": (
        ["training_set/a/0.jpg", "training_set/b/0.jpg", "test_set/a/0.jpg", "test_set/b/0.jpg"],
        "'test_set', 'training_set', with folders in them.* call them train, val and test",
    ),
    "a split without labels": (
        ["train/a/0.jpg", "train/b/0.jpg", "test/0.jpg"],
        r"test is taken for the test split.* move them out of .*data, and ask .*predict",
    ),
    "images beside a list": (["0.jpg", "labels.csv"], r"nothing says what is on them.*train on that: .*labels\.csv"),
    "images of a split beside lists": (
        ["train/0.jpg", "sample.csv", "train.csv"],
        r"train on that: .*data/sample\.csv or .*data/train\.csv",
    ),
    "images and a list": (
        ["images/0.jpg", "labels.csv"],
        r"has no masks beside it.*train on that: .*labels\.csv",
    ),
    "classes within images": (["images/a/0.jpg", "images/b/0.jpg"], r"To classify, train on .*data/images\."),
    "no masks": (["images/0.jpg", "labels/0.png"], r"has no masks beside it.*--masks .*labels"),
    "boxes for masks": (["images/0.jpg", "labels/0.txt"], "labels holds no images: boxes and polygons"),
    "boxes of COCO": (
        ["train2017/0.jpg", "val2017/0.jpg", "annotations/instances.json"],
        "not all of which are folders of images of a class. .*annotations holds no images: boxes and polygons",
    ),
    "a file of COCO beside images": (
        ["images/0.jpg", "annotations.json"],
        r"has no masks beside it.*annotations\.json is no list: boxes and polygons .* have to be drawn as masks first",
    ),
    "a file of LabelMe for each image": (
        ["0.jpg", "0.json"],
        r"nothing says what is on them.*0\.json is no list: boxes and polygons",
    ),
    "boxes by split": (["images/train/0.jpg", "labels/train/0.txt"], "labels holds no images: boxes and polygons"),
    "boxes within a split": (
        ["train/images/0.jpg", "train/labels/"],
        r"not like classes.*train/labels holds no images: boxes and polygons",
    ),
    "many folders of one set": (
        ["JPEGImages/0.jpg", "SegmentationClass/0.png", "SegmentationObject/0.png", "ImageSets/"],
        "holds 'ImageSets', 'JPEGImages', .* look like images with masks, not like classes",
    ),
    "masks alone": (
        ["masks/0.png"],
        r"data holds no images for the masks in .*masks\. They are expected in .*images\. If the",
    ),
    "images called otherwise": (
        ["masks/0.png", "photos/0.jpg"],
        r"expected in .*data/images\. Those in .*data/photos: call it so",
    ),
    "masks called otherwise": (
        [f"images/{at}.jpg" for at in range(3)] + [f"masks/{at}_mask.png" for at in range(3)],
        r"(?s)1 problem.*0.jpg needs 0.png, and there is 0_mask.png. Rename",
    ),
}
"""Files by their names, of which a folder ends in a slash, and what is said of them."""


@pytest.mark.parametrize(("names", "message"), TREES.values(), ids=TREES)
def test_folders_that_cannot_be_trained_on(tmp_path, names, message):
    for path in (tmp_path / "data" / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".jpg", ".png"):
            write_image(path, noise())
        elif path.suffix:
            path.write_text("image,label\n" if path.suffix == ".csv" else "0 0.5 0.5 0.1 0.1")
        else:
            path.mkdir()
    with pytest.raises(DataError, match=message):
        survey(tmp_path / "data", Flags())


def unreadable(root):
    write_images(root, "a/0.jpg", "b/1.jpg")
    (root / "a" / "broken.jpg").write_bytes(b"no image")


def cut_off(root):
    write_images(root, "a/0.jpg", "b/1.jpg")
    (root / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\x04IHDR\0\0\0\0abcd")


def two_of_one_name(root):
    masked(root, [0, 1])
    write_image(root / "images" / "3.png", noise())


def without_partner(root):
    masked(root, [0, 1])
    (root / "masks" / "3.png").unlink()


def polygons(root):
    for mask in (masked(root, [0, 1]) / "masks").iterdir():
        mask.rename(mask.with_suffix(".json"))


def no_masks_but_a_note(root):
    masked(root, [0, 1])
    for mask in (root / "masks").iterdir():
        mask.unlink()
    (root / "masks" / "README.md").touch()


def a_photo_as_mask(root):
    masked(root, [0, 1])
    write_image(root / "masks" / "0.png", noise(40, 60))


def of_two_kinds(root):
    masked(root, [0, 1])
    write_image(root / "masks" / "0.png", np.full((40, 60, 3), 9, np.uint8))


def masks_of_another_size(root):
    masked(root, [0, 1])
    write_image(root / "masks" / "3.png", np.zeros((40, 30), np.uint8))


def turned(root, kind="jpg"):
    """A camera that was held upright: its pixels lie on their side."""
    masked(root, [0, 1])
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "images" / "3.jpg").unlink()
    Image.fromarray(noise(60, 40)).save(root / "images" / f"3.{kind}", exif=exif)


def a_mask_on_its_side(root):
    turned(root)
    write_image(root / "masks" / "3.png", np.zeros((60, 40), np.uint8))


SMOOTHED = [0] * 20 + list(range(0, 100, 10)) + [255] * 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda root: None, "There is no folder", id="nothing"),
        (unreadable, "(?s)1 problem.*broken.jpg cannot be read"),
        (cut_off, "(?s)1 problem.*broken.png cannot be read"),
        (without_partner, "3.jpg has no mask"),
        (two_of_one_name, r"(?s)2 problems.*3\.jpg is one of several files of one name.*3\.png is one"),
        pytest.param(partial(masked, values=[0]), "All masks hold one value, 0, and", id="one_value"),
        pytest.param(
            partial(masked, values=[0, 1], suffix=".jpg"),
            "are no PNG files. Convert GIF, TIFF and BMP; JPEG has lost what a mask says",
            id="jpeg_masks",
        ),
        pytest.param(
            partial(masked, values=[0, 1], suffix=".gif"),
            "(?s)1 problem.*are no PNG files. Convert GIF",
            id="gif_masks",
        ),
        (polygons, "(?s)1 problem.*masks holds no images: boxes and polygons"),
        (no_masks_but_a_note, "(?s)5 problems.*0.jpg has no mask .*0.png"),
        (a_photo_as_mask, "more than 256 colors"),
        pytest.param(partial(masked, values=SMOOTHED), "black and white with 9 grays between", id="smoothed"),
        (masks_of_another_size, r"(?s)1 problem.*3.png is 30x40, and its image is 60x40 \(width x height\)"),
        (a_mask_on_its_side, "is 40x60, and its image is 60x40 .*: if its EXIF turns the image upright, turn the mask"),
        (of_two_kinds, "Some masks are gray and others in color"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_cannot_be_trained_on(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        survey(tmp_path / "data", Flags())


def test_a_class_may_be_called_train_in_other_letters(tmp_path):
    for at in range(10):
        for name in ("Car", "Train"):
            write_image(tmp_path / "data" / name / f"{at}.jpg", noise())
    assert survey(tmp_path / "data", Flags()).classes == ("Car", "Train")


def test_an_archive_is_unpacked_first(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"photos\.zip is an archive\. Unpack it"):
        survey(tmp_path / "photos.zip", Flags())


@pytest.mark.parametrize(("kind", "shown"), [(str, "https://"), (Path, "https:/")], ids=["text", "path"])
def test_an_address_is_downloaded_first(kind, shown):
    with pytest.raises(DataError, match=rf"^{shown}example\.com/photos is an address\. Download"):
        survey(kind("https://example.com/photos"), Flags())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"masks": Path("masks")}, "are in its column 'mask'"),
        ({"ignore_index": 0}, "has labels"),
        ({"classes": ("b", "c")}, "has the labels 'a', which --classes does not name"),
    ],
    ids=["masks", "ignore_index", "classes without a label"],
)
def test_flags_that_a_list_of_labels_does_not_take(tmp_path, flags, message):
    for number in range(10):
        write_image(tmp_path / f"{number}.jpg", noise())
    data = written(tmp_path / "list.csv", [{"image": f"{at}.jpg", "label": "ab"[at % 2]} for at in range(10)])
    with pytest.raises(DataError, match=message):
        survey(data, Flags(**flags))


def test_a_label_that_no_row_trains_is_told(tmp_path):
    """As a class of which there is no folder in `train`."""
    write_image(tmp_path / "0.jpg", noise())
    rows = [
        {"image": "0.jpg", "label": label, "split": split}
        for label, split in zip("abc", ("train",) * 2 + ("val",), strict=True)
    ]
    with pytest.raises(DataError, match=r"has the labels 'c', of which no row is of the split 'train'"):
        survey(written(tmp_path / "list.jsonl", rows), Flags())


def test_a_first_row_without_a_label_is_told_as_that(tmp_path):
    write_image(tmp_path / "0.jpg", noise())
    rows = [{"image": "0.jpg", "label": None}, {"image": "0.jpg", "label": "a"}]
    with pytest.raises(DataError, match=r"Row 1 of .* has no value in the column 'label'"):
        survey(written(tmp_path / "list.jsonl", rows), Flags())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("photos/{}", "photos/0.jpg"),
        ("{}.jpg", "photos/0.jpg"),
        ("photos\\{}.jpg", "photos/0.jpg"),
        ("new\\x{}.png", "new/x0.png"),
        ("y{}.jpg", None),
    ],
    ids=["no ending", "no folder", "of Windows", "of Windows, one of two", "nowhere"],
)
def test_where_the_images_of_a_list_are(tmp_path, name, hint):
    write_images(tmp_path, "photos/0.jpg", "old/new/x0.png", "new/x0.png")
    rows = [{"image": name.format(at), "label": "ab"[at]} for at in range(2)]
    said = f"For {tmp_path}/{hint}, it is {hint!r}" if hint else "has its ending"
    with pytest.raises(DataError, match=rf"None of the images in .*list\.csv exists.*{said}\.$"):
        survey(written(tmp_path / "list.csv", rows), Flags())


@pytest.mark.parametrize("kind", ["folders", "list"])
@pytest.mark.parametrize("is_split", [False, True], ids=["to be split", "with splits"])
def test_classes_that_are_not_validated_on_are_said(tmp_path, kind, is_split):
    """As of classes that are so small that their share of the val split is none."""
    named = [("train", "a", at) for at in range(10)] + [("train", "b", at) for at in range(2)]
    named += [("val", "a", 20)] if is_split else []
    places = [f"{split}/{label}/{at}.jpg" if is_split else f"{label}/{at}.jpg" for split, label, at in named]
    write_images(tmp_path, *places)
    splits = [{"split": split} if is_split else {} for split, _, _ in named]
    rows = [
        {"image": place, "label": label, **split}
        for place, (_, label, _), split in zip(places, named, splits, strict=True)
    ]
    data = tmp_path if kind == "folders" else written(tmp_path / "list.csv", rows)
    assert survey(data, Flags()).unmeasured == ("b",)
    assert survey(data, Flags(val_share=None if is_split else 0.5)).unmeasured == (("b",) if is_split else ())


@pytest.mark.parametrize("column", ["label", "mask"])
def test_columns_that_are_not_read_are_said(tmp_path, column):
    """As of a column of splits that has another name."""
    data = masked(tmp_path, [0, 1], count=10)
    value = {"label": lambda at: "ab"[at % 2], "mask": lambda at: f"masks/{at}.png"}[column]
    rows = [{"": at, "image": f"images/{at}.jpg", column: value(at), "set": "train"} for at in range(10)]
    assert survey(written(data / "list.csv", rows), Flags()).found == f"a list of {column}s, without its 'set'"


def test_a_list_that_is_not_there(tmp_path):
    (tmp_path / "labels.csv").write_text("image,label\n")
    with pytest.raises(DataError, match=r"There is no list .*lables.csv: .* Did you mean 'labels.csv'"):
        survey(tmp_path / "lables.csv", Flags())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"classes": ("a", "b")}, "holds the value 2, and 2 classes are named"),
        ({"ignore_index": 1}, "the values of the classes go on above it"),
    ],
    ids=["a value without a name", "void between classes"],
)
def test_flags_that_do_not_fit_the_masks(tmp_path, flags, message):
    with pytest.raises(DataError, match=message):
        survey(masked(tmp_path / "data", [0, 1, 2]), Flags(**flags))


@pytest.mark.parametrize(
    ("value", "flags"), [(1, {}), (255, {"classes": ("ground", "cat")})], ids=["an index", "white, with names"]
)
def test_one_value_beside_the_ignored_one(tmp_path, value, flags):
    with pytest.raises(DataError, match=f"All masks hold one value, {value} beside the ignored 0, and"):
        survey(masked(tmp_path / "data", [0, value]), Flags(ignore_index=0, **flags))


@pytest.mark.parametrize(
    "line",
    ["{} {}", "{}: {}", "{},{}", "{}\t{}", "{} ({})", "{}:{}::"],
    ids=["space", "colon", "comma", "tab", "brackets", "more fields"],
)
@pytest.mark.parametrize("color", ["#ff00{:02x}", "255,0,{}", "255 0 {}", "255, 0, {}"], ids=str)
@pytest.mark.parametrize("names_first", [True, False], ids=["names first", "colors first"])
def test_colors_beside_names_are_refused(tmp_path, line, color, names_first):
    """They would be parts of names, which are matched with the colors of masks by their order."""
    root = masked(tmp_path / "data", [0, 1])
    pairs = [(name, color.format(blue)) for blue, name in enumerate(("sky", "wide road"))]
    lines = [line.format(*(pair if names_first else reversed(pair))) for pair in pairs]
    (root / "classes.txt").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"classes\.txt has colors beside the names.* Write names alone"):
        survey(root, Flags())


@pytest.mark.parametrize(
    "header",
    ["# label:color_rgb:parts:actions", "# one\n# two", "name,r,g,b", "name;Red;Green;Blue", "class,rgb_values"],
    ids=["CVAT", "comments", "letters", "words", "rgb"],
)
def test_a_header_above_colors_is_no_class(tmp_path, header):
    root = masked(tmp_path / "data", [0, 1])
    (root / "classes.txt").write_text(f"{header}\nsky:255,0,0::\nroad:0,255,0::\n")
    with pytest.raises(DataError, match=r"has colors beside the names, as 'sky:255,0,0::'.* by --classes"):
        survey(root, Flags())


@pytest.mark.parametrize(
    "names",
    [("sky 1 2 3", "road 2024"), ("Boeing 737 800 200", "Airbus 320 200 100"), ("1 2 256 sky", "1 2 256 road")],
    ids=["numbers in one", "numbers above 255", "numbers first"],
)
def test_names_with_numbers_that_are_no_colors(tmp_path, names):
    root = masked(tmp_path / "data", [0, 1])
    (root / "classes.txt").write_text("\n".join(names))
    assert survey(root, Flags()).coding.classes == names


@pytest.mark.parametrize(
    ("names", "said"), [(None, "All masks hold one value"), (("a", "b"), "2 classes are named")], ids=["none", "two"]
)
def test_white_that_is_a_class_beside_a_gray_one(tmp_path, names, said):
    data = masked(tmp_path / "data", [128, 255])
    with pytest.raises(DataError, match=rf"{said}.* If 255 is a class as well, say --ignore-index 0\."):
        survey(data, Flags(classes=names))
    assert survey(data, Flags(classes=names, ignore_index=0)).coding.colors is not None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0, 255], "0 beside the ignored 255, and.* 0 and 255 are black and white: name 2 classes, in this order"),
        ([2, 255], "2 beside the ignored 255, and"),
        ([1], "1, and"),
    ],
    ids=["black and white", "an index and void", "one index"],
)
def test_one_value_with_names_of_more(tmp_path, values, said):
    """The names would be indices, and one of them would be all that is learned."""
    with pytest.raises(DataError, match=f"All masks hold one value, {said}"):
        survey(masked(tmp_path / "data", values), Flags(classes=("a", "b", "c")))


def test_one_value_beside_two_that_do_not_count(tmp_path):
    """Without a class for 0, 255 is what counts for nothing too."""
    with pytest.raises(DataError, match="All masks hold one value, 1 beside the ignored 0, 255, and"):
        survey(masked(tmp_path / "data", [0, 1, 255]), Flags(classes=("a", "b", "c"), ignore_index=0))


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_an_image_is_measured_as_its_file_says_that_it_is_turned(tmp_path, kind):
    """Pillow turns a TIFF by itself, and gives the size of what is shown."""
    turned(tmp_path / "data", kind)
    assert survey(tmp_path / "data", Flags()).counts["train"] == 4


@pytest.mark.parametrize("kind", ["folders", "list"])
def test_the_size_of_images_is_that_in_which_they_are_shown(tmp_path, kind):
    """Of photos of a camera that was held upright, as of all others."""
    root, exif = masked(tmp_path / "data", [0, 1]), Image.Exif()
    exif[0x0112] = 6
    for path in (root / "images").iterdir():
        Image.fromarray(noise(60, 40)).save(path, exif=exif)
    rows = [{"image": f"images/{at}.jpg", "mask": f"masks/{at}.png"} for at in range(5)]
    data = root if kind == "folders" else written(root / "list.csv", rows)
    assert survey(data, Flags()).size == (32, 64)


@pytest.mark.parametrize("kind", ["folders", "list"])
def test_each_image_with_a_mask_is_opened_once(tmp_path, monkeypatch, kind):
    root, opened, real = masked(tmp_path / "data", [0, 1]), Counter(), Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.update([Path(path).suffix]) or real(path))
    rows = [{"image": f"images/{at}.jpg", "mask": f"masks/{at}.png"} for at in range(5)]
    survey(root if kind == "folders" else written(root / "list.csv", rows), Flags())
    assert opened == {".jpg": 5, ".png": 10}  # the header of a mask, before the values of all


@pytest.mark.parametrize("kind", ["flat_folders", "class_folders", "masks"])
def test_what_is_not_read_is_said(kind, request, tmp_path):
    root = masked(tmp_path / "data", [0, 1]) if kind == "masks" else request.getfixturevalue(kind)
    folder = next(root.rglob("*.jpg")).parent
    (folder / "more").mkdir()
    for name in ("0.gif", ".DS_Store"):
        (folder / name).write_bytes(b"")
    assert survey(root, Flags()).left_out == [folder / "0.gif", folder / "more"]


def test_what_archives_of_macos_hold_beside_the_files_is_no_class(flat_folders):
    expected = survey(flat_folders, Flags())
    forks = flat_folders / "__MACOSX" / "cat"
    forks.mkdir(parents=True)
    (forks / "._0.jpg").write_bytes(b"")
    assert survey(flat_folders, Flags()) == expected


@pytest.mark.parametrize("hidden", [".thumbnails/0.jpg", "more/._0.jpg"])
def test_hidden_images_are_not_said_to_be_moved(flat_folders, hidden):
    write_images(flat_folders / "cow", hidden)
    with pytest.raises(DataError, match=r"cow holds no image \([^)]*\)(, but 'more')?$"):
        survey(flat_folders, Flags())


@pytest.mark.parametrize("split", ["", "train"], ids=["classes", "splits"])
def test_images_beside_the_classes_are_said_to_be_left_out(tmp_path, split):
    write_images(tmp_path / split, *(f"{name}/{at}.jpg" for name in "ab" for at in range(5)), "stray.jpg")
    found = survey(tmp_path, Flags())
    assert (sum(found.counts.values()), found.left_out) == (10, [tmp_path / split / "stray.jpg"])


@pytest.mark.parametrize("kind", ["class_folders", "masks"])
def test_folders_beside_the_splits_are_said_to_be_left_out(kind, request, tmp_path):
    """As a val split of a name that is not known, which the user thinks is validated on."""
    if kind == "masks":
        root = masked(tmp_path / "data", [0, 1])
        for folder in (root / "masks", root / "images"):
            folder.rename(tmp_path / "train")
            folder.mkdir()
            (tmp_path / "train").rename(folder / "train")
    else:
        root = folder = request.getfixturevalue(kind)
    write_images(folder, "dev/cat/0.jpg", "dev.jpg")
    write_images(folder, "__MACOSX/._0.jpg")
    (folder / "notes").mkdir()
    assert survey(root, Flags()).left_out == [folder / "dev.jpg", folder / "dev"]
