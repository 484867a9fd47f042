"""The choice of blocks by numbers and by paths."""

import pytest

from lora_plugins import TargetError
from lora_plugins.plan.block_filter import BlockFilter

VIT = [f"blocks.{block}.{layer}" for block in range(12) for layer in ("attn.qkv", "attn.proj", "mlp.fc1")]
SWIN = [f"layers.{s}.blocks.{b}.attn.qkv" for s in range(3) for b in range(2)]
CONVNEXT = [f"stages.{s}.blocks.{b}.mlp.fc1" for s in range(2) for b in range(2)]
SEGFORMER = [f"encoder.block.{s}.{b}.attention.self.query" for s in range(2) for b in range(2)]
TOWERS = [f"model.{tower}.layers.{b}.q" for tower in ("text", "image") for b in range(2)]
RESNET = [f"layer{s}.{b}.conv1" for s in (1, 2) for b in range(2)]


@pytest.mark.parametrize(
    ("names", "blocks", "containers", "expected"),
    [
        pytest.param(VIT, 1, None, [n for n in VIT if n.startswith("blocks.1.")], id="vit, one number"),
        pytest.param(VIT, [0, 11], None, VIT[:3] + VIT[-3:], id="vit, numbers"),
        pytest.param(VIT, "blocks.1", None, [n for n in VIT if n.startswith("blocks.1.")], id="vit, path"),
        pytest.param(SWIN, ["layers.2.blocks.1"], None, ["layers.2.blocks.1.attn.qkv"], id="swin, path"),
        pytest.param(SWIN, [1], "blocks", [n for n in SWIN if "blocks.1." in n], id="swin, block 1 of each stage"),
        pytest.param(SWIN, [1], ["layers"], [n for n in SWIN if "layers.1." in n], id="swin, stage 1"),
        pytest.param(CONVNEXT, ["stages.1"], None, CONVNEXT[2:], id="convnext, stage by path"),
        pytest.param(CONVNEXT, "stages.0.blocks.1", None, [CONVNEXT[1]], id="convnext, block by path"),
        pytest.param(SEGFORMER, ["block.1.0"], None, [SEGFORMER[2]], id="segformer, block by path"),
        pytest.param(SEGFORMER, [1], None, SEGFORMER[2:], id="segformer, stage by number"),
        pytest.param(RESNET, [1], ["layer2"], ["layer2.1.conv1"], id="resnet, container of its own name"),
        pytest.param(TOWERS, [1], "text.layers", [TOWERS[1]], id="two towers, container by the end of its path"),
        pytest.param(SWIN, [1], "layers.2.blocks", [SWIN[5]], id="swin, container by its whole path"),
        pytest.param(
            SWIN, ["layers.0", "layers.1.blocks.1"], None, [SWIN[0], SWIN[1], SWIN[3]], id="swin, mixed depth"
        ),
    ],
)
def test_numbers_and_paths_choose_blocks(names, blocks, containers, expected):
    keep = BlockFilter(blocks, containers, names)
    assert [name for name in names if keep(name)] == expected


@pytest.mark.parametrize("names", [SWIN, CONVNEXT], ids=["swin", "convnext"])
def test_a_number_in_nested_containers_is_ambiguous(names):
    outer, inner = ".".join(names[0].split(".")[:1]), ".".join(names[0].split(".")[:3])
    with pytest.raises(TargetError) as caught:
        BlockFilter([1], None, names)
    for words in ("layers_to_transform", repr(outer), repr(inner), f"'{inner}.0'", "layers_pattern"):
        assert words in str(caught.value)


NESTED = [f"net.layers.{outer}.layers.{inner}" for outer in range(2) for inner in range(2)]


def test_a_number_in_nested_containers_of_one_name_is_ambiguous():
    with pytest.raises(TargetError, match=r"'net\.layers' or in 'net\.layers\.0\.layers'.*by a longer end of its path"):
        BlockFilter([1], "layers", NESTED)


@pytest.mark.parametrize(
    ("blocks", "containers", "expected"),
    [
        pytest.param([1], "net.layers", NESTED[2:], id="the outer one, by a longer end"),
        pytest.param([1], "layers.0.layers", [NESTED[1]], id="an inner one, by a longer end"),
        pytest.param(["layers.0.layers.1"], "layers", [NESTED[1]], id="by the path of a block"),
    ],
)
def test_nested_containers_of_one_name_are_told_apart(blocks, containers, expected):
    keep = BlockFilter(blocks, containers, NESTED)
    assert [name for name in NESTED if keep(name)] == expected


def test_nested_containers_that_are_both_named_count_both():
    keep = BlockFilter([1], ["layers", "blocks"], SWIN)
    assert [name for name in SWIN if keep(name)] == [SWIN[1], SWIN[2], SWIN[3], SWIN[5]]


@pytest.mark.parametrize(
    ("names", "block", "containers", "offered"),
    [
        (VIT, 12, None, "blocks.11"),
        (VIT, "blocks.12", None, "blocks.11"),
        (SWIN, "layers.3.blocks.0", None, "layers.2.blocks.1"),
        (SWIN, 2, "blocks", "layers.2.blocks.1"),
        (VIT, "locks.1", None, "blocks.1"),
    ],
)
def test_a_block_that_is_not_there_is_an_error_that_lists_what_is(names, block, containers, offered):
    with pytest.raises(TargetError, match=f"layers_to_transform.*{block!r}.*{offered}"):
        BlockFilter([0 if containers else "0", block], containers, names)


@pytest.mark.parametrize("containers", ["block", ["blocks", "block"]], ids=["alone", "beside a good one"])
def test_a_container_that_is_not_there_is_an_error_that_offers_the_near_one(containers):
    with pytest.raises(TargetError, match=r"layers_pattern: 'block'.*Did you mean 'blocks'"):
        BlockFilter([0], containers, VIT)


def test_a_number_where_no_container_has_a_usual_name_is_an_error_that_names_those_there_are():
    with pytest.raises(TargetError, match=r"layers_to_transform.*block 1 .*layers_pattern: 'layer1', 'layer2'"):
        BlockFilter([1], None, RESNET)


def test_an_unknown_path_where_no_container_has_a_usual_name_is_an_error_that_names_the_blocks():
    with pytest.raises(TargetError, match=r"no block 'layer1\.7' .*: layer1\.0, layer1\.1, layer2\.0, layer2\.1\.$"):
        BlockFilter(["layer1.7"], None, RESNET)


def test_an_unknown_container_is_an_error_that_offers_paths_as_long():
    with pytest.raises(TargetError, match=r"layers_pattern: 'texts.layers'.*Did you mean 'text.layers'"):
        BlockFilter([1], "texts.layers", TOWERS)


def test_a_digit_that_is_no_number_is_a_name():
    names = ["layers.².fc", "layers.0.fc"]
    assert [name for name in names if BlockFilter([0], None, names)(name)] == ["layers.0.fc"]
