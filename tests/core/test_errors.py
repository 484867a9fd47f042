"""Near matches, and the words around them."""

from pathlib import Path

import pytest

from lora_plugins.errors import counted, near, no_folder, nothing_there, quoted, sentence

MODELS = ["vit_tiny_patch16_224", "vit_small_patch16_224", "gcvit_tiny", "davit_tiny", "resnet18", "resnet61q"]


@pytest.mark.parametrize(
    ("words", "one", "several"),
    [
        (("image",), "1 image", "2 images"),
        (("class is", "classes are"), "1 class is", "2 classes are"),
    ],
    ids=["noun", "noun and verb"],
)
def test_numbers_of_things(words, one, several):
    assert (counted(1, *words), counted(2, *words)) == (one, several)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_tinyy", "Did you mean 'vit_tiny_patch16_224', 'davit_tiny', 'gcvit_tiny'?"),
        ("vit_tiny_patch16", "Did you mean 'vit_tiny_patch16_224'?"),
        ("resnet1", "Did you mean 'resnet18', 'resnet61q'?"),
        ("resnet8", "Did you mean 'resnet18', 'resnet61q'?"),
        ("fti", "Did you mean 'fit'?"),
        ("fiit", "Did you mean 'fit', 'fit_all'?"),
        ("qq", "There is 'davit_tiny', 'fit', "),
    ],
)
def test_what_is_near(name, said):
    assert near(name, [*MODELS, "fit", "fit_all"]).startswith(said)


@pytest.mark.parametrize("names", [[], [""]], ids=["nothing", "a model without children"])
def test_nothing_there(names):
    assert near("a", names) == "There are none."


@pytest.mark.parametrize("explain", [no_folder, nothing_there])
def test_a_link_that_leads_nowhere(tmp_path, explain):
    link = tmp_path / "photos"
    link.symlink_to("gone")
    assert explain(link / "cat").endswith(f"{link} is a link to gone, where nothing is.")
    assert explain(link).endswith(f"{link} is a link to gone, where nothing is.")


@pytest.mark.parametrize("explain", [no_folder, nothing_there])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("https://example.org/cat.png", "An address is not read"),
        ("s3://cats/", "An address is not read"),
        ("-", "The standard input is not read"),
        ("c:", "has no 'c:'"),
    ],
)
def test_what_is_no_path(tmp_path, monkeypatch, explain, given, said):
    monkeypatch.chdir(tmp_path)
    assert said in explain(Path(given))


@pytest.mark.parametrize("said", ["It failed", "It failed.\n", "Did it fail?", "It failed!"])
def test_a_sentence_has_one_mark_at_its_end(said):
    assert sentence(ValueError(said)) == said.strip() + ("." if said == "It failed" else "")


def test_a_long_text_is_quoted_without_its_middle():
    assert quoted("blocks.0") == "'blocks.0'"
    long = quoted("|".join(f"blocks.{at}" for at in range(300)))
    assert len(long) < 250
    assert long.startswith("'blocks.0|")
    assert long.endswith("blocks.299'")
