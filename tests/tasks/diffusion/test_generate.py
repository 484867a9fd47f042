"""`lora-plugins generate`: from adapters, a checkpoint and a merged pipeline, with seeds, weights and a comparison."""

import json
import shlex
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lora_plugins import LoraConfig
from lora_plugins.cli.main import main
from lora_plugins.files import MANIFEST
from lora_plugins.integrations.diffusers import LoraPipeline, Sampling, load_pipeline, sample
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks import PicturesDataModule, SavePipeline, TextToImageTask
from lora_plugins.tasks.training import PROVENANCE_KEY
from tests.integrations.diffusers.pipelines import build

SIZE = ["--steps=2", "--guidance=2", "--height=16", "--width=16", "--device=cpu"]
SAMPLING = Sampling(steps=2, guidance=2.0, height=16, width=16)
PROMPT = "a sks dog"


@pytest.fixture
def base(tmp_path):
    build("Stable Diffusion").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def data(picture_folder):
    return PicturesDataModule(str(picture_folder((16, 16))), prompt=PROMPT, resolution=16)


def saving_to(folder):
    return LoraCallback(LoraConfig(r=2), target="parts", print_plan=False, save_adapter_to=str(folder))


@pytest.fixture
def run(tmp_path, base, data, trainer):
    """A folder with what a fit leaves: base, adapter, checkpoint and the merged pipeline."""
    task = TextToImageTask(base, lr=5e-2, train_text_encoder=True)
    callbacks = [saving_to(tmp_path / "adapter"), SavePipeline(str(tmp_path / "merged"))]
    fit = trainer(max_epochs=4, callbacks=callbacks, enable_checkpointing=True)
    fit.fit(task, data)
    (tmp_path / "next").write_text("\n".join(task.next_commands(fit).values()))
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    checkpoint.rename(tmp_path / "run.ckpt")
    return tmp_path


@pytest.fixture
def taught(tmp_path, base, data, trainer):
    """Trains an adapter of a task with some arguments, and returns its folder."""

    def teach(name, **arguments):
        folder = tmp_path / name
        trainer(callbacks=[saving_to(folder)]).fit(TextToImageTask(base, lr=1e-2, **arguments), data)
        return folder

    return teach


def test_next_command_takes_any_prompt(tmp_path, base, picture_folder, trainer):
    task = TextToImageTask(base, lr=1e-3)
    data = PicturesDataModule(str(picture_folder((16, 16))), prompt="a {cat} of 'his' {0}", resolution=16)
    fit = trainer(callbacks=[saving_to(tmp_path / "adapter")])
    fit.fit(task, data)
    (command,) = task.next_commands(fit).values()
    assert shlex.split(command)[-2:] == ["--prompt", "a {cat} of 'his' {0}"]


def drawn(run, *arguments, name="out"):
    """The pictures that the command leaves, by name."""
    folder = run / name
    code = main(["generate", "--prompt", PROMPT, f"--out={folder}", *SIZE, *map(str, arguments)])
    assert code == 0
    return {path.stem: Image.open(path).copy() for path in sorted(folder.glob("*.png"))}


def bytes_of(pictures):
    return [picture.tobytes() for name, picture in pictures.items() if name != "sheet"]


def expected(pipe, seeds, prompt=PROMPT):
    return [picture.tobytes() for picture in sample(pipe, [prompt] * len(seeds), seeds, SAMPLING)]


def test_from_an_adapter_that_says_its_base(run):
    found = drawn(run, "--adapter", run / "adapter", "--seed=5", "--pictures=2")
    assert list(found) == ["1-seed-5", "1-seed-6", "sheet"]
    pipe = load_pipeline(run / "base")
    base = expected(pipe, [5, 6])
    LoraPipeline.load_adapter(pipe, run / "adapter")
    assert bytes_of(found) == expected(pipe, [5, 6]) != base


def test_an_adapter_draws_what_it_was_trained_to_predict(tmp_path, base, taught):
    adapter = taught("adapter", prediction="v_prediction")
    pipe = load_pipeline(base)
    LoraPipeline.load_adapter(pipe, adapter)
    of_the_base = expected(pipe, [0])
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")
    assert bytes_of(drawn(tmp_path, "--adapter", adapter, "--pictures=1")) == expected(pipe, [0]) != of_the_base


@pytest.mark.parametrize("told", [{"prediction": "epsilon"}, {}], ids=["said", "of the base"])
def test_adapters_with_two_predictions_are_not_drawn_at_once(tmp_path, taught, capsys, told):
    one, other = taught("one", prediction="v_prediction"), taught("other", **told)
    command = ["generate", "--prompt=a", f"--out={tmp_path / 'out'}", f"--adapter={one}", f"--adapter={other}"]
    assert main(command) == 1
    assert "were trained to predict epsilon and v_prediction" in capsys.readouterr().err


def test_adapters_whose_base_says_what_one_was_told_are_drawn_at_once(tmp_path, taught):
    adapters = [taught("one", prediction="epsilon"), taught("other")]
    assert drawn(tmp_path, *(f"--adapter={adapter}" for adapter in adapters))


def test_the_revision_that_an_adapter_says_is_the_one_that_is_read(tmp_path, base, taught, capsys):
    manifest = taught("adapter") / MANIFEST
    said = json.loads(manifest.read_text())
    said[PROVENANCE_KEY]["arguments"]["revision"] = "old"
    manifest.write_text(json.dumps(said))
    command = ["generate", "--prompt=a", f"--out={tmp_path / 'out'}", f"--adapter={manifest.parent}"]
    assert main(command) == 1
    assert f"revision is 'old', and {base} is a folder" in capsys.readouterr().err


def test_the_command_that_a_fit_names_draws(run):
    program, *arguments = shlex.split((run / "next").read_text())
    assert program == "lora-plugins"
    assert main([*arguments, f"--out={run / 'named'}", *SIZE]) == 0
    assert bytes_of(drawn(run, "--adapter", run / "adapter")) == [
        Image.open(path).tobytes() for path in sorted((run / "named").glob("1-*.png"))
    ]


def test_an_adapter_a_checkpoint_and_the_merged_pipeline_draw_the_same(run):
    ways = [("--adapter", run / "adapter"), ("--checkpoint", run / "run.ckpt"), ("--model", run / "merged")]
    pictures = [bytes_of(drawn(run, *way, name=str(number))) for number, way in enumerate(ways)]
    assert pictures[0] == pictures[1]
    for one, other in zip(pictures[0], pictures[2], strict=True):  # merging rounds
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 1


def test_several_adapters_with_weights(run):
    pipe = load_pipeline(run / "base")
    lora = LoraPipeline.load_adapter(pipe, run / "adapter", "first")
    lora.save_adapter(run / "second.safetensors", "first", format="diffusers")
    lora.save_adapter(run / "third.safetensors", "first", format="kohya")
    files = ["--adapter", run / "second.safetensors", "--adapter", run / "third.safetensors"]
    half = ["--weight=0.75", "--weight=0.25"]
    found = drawn(run, "--model", run / "base", *files, *half, "--pictures=1")
    (one,) = bytes_of(found)
    (other,) = expected(pipe, [0])
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 1  # the sum of three quarters and one


@pytest.mark.parametrize("way", ["adapter", pytest.param("checkpoint", marks=pytest.mark.slow)])
def test_a_comparison_sheet(run, way):
    given = {"adapter": ("--adapter", run / "adapter"), "checkpoint": ("--checkpoint", run / "run.ckpt")}[way]
    found = drawn(run, *given, "--compare", "--pictures=1", "--prompt", "a cat")
    assert list(found) == ["adapter-1-seed-0", "adapter-2-seed-0", "base-1-seed-0", "base-2-seed-0", "sheet"]
    pipe = load_pipeline(run / "base")
    assert found["base-1-seed-0"].tobytes() == expected(pipe, [0])[0]
    assert found["base-2-seed-0"].tobytes() != found["adapter-2-seed-0"].tobytes()
    assert found["sheet"].height > 4 * 48


def test_bad_input_is_named(run, capsys):
    adapter, base = ["--adapter", str(run / "adapter")], ["--model", str(run / "base")]
    other = run / "other"
    pipe = build("Stable Diffusion")
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1.5)
    pipe.save_pretrained(other)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, run / "strange.ckpt")
    factors = {"unet.nowhere.lora_A.weight": torch.zeros(2, 3), "unet.nowhere.lora_B.weight": torch.zeros(3, 2)}
    save_file(factors, run / "strange.safetensors")
    strange = ["--adapter", str(run / "strange.safetensors")]
    shutil.copytree(run / "adapter", run / "masks")
    manifest = json.loads((run / "masks" / MANIFEST).read_text())
    manifest[PROVENANCE_KEY] = {
        "class": "shop.Masks",
        "arguments": {"model": {"architecture": "x"}},
        "target": "network",
    }
    (run / "masks" / MANIFEST).write_text(json.dumps(manifest))
    cases = {
        "A prompt is empty": ["--prompt", " ", *base],
        "no adapter says which it is of. Give --model": ["--prompt", "a"],
        "one was trained by Masks, which names no pipeline": ["--prompt", "a", "--adapter", str(run / "masks")],
        "give one --weight for each": ["--prompt", "a", *adapter, "--weight=1", "--weight=2"],
        "leave out --model and --adapter": ["--prompt", "a", *base, "--checkpoint", "x.ckpt"],
        "A checkpoint has its model and its adapter": ["--prompt", "a", *adapter, "--checkpoint", "x.ckpt"],
        "There is no checkpoint": ["--prompt", "a", "--checkpoint", "x.ckpt"],
        "is no checkpoint of a TextToImageTask": ["--prompt", "a", "--checkpoint", str(run / "strange.ckpt")],
        "there is none: give --adapter": ["--prompt", "a", *base, "--compare"],
        "There is no folder": ["--prompt", "a", "--model", "nowhere"],
        "base": ["--prompt", "a", *adapter, "--model", str(other)],
        f"The adapter is {run / 'strange.safetensors'}.": ["--prompt", "a", *base, *adapter, *strange],
        "Unknown dtype 'half'": ["--prompt", "a", *base, "--dtype", "half"],
        "argument --pictures: '0' is not a whole number of at least 1": ["--prompt", "a", *base, "--pictures", "0"],
        "nowhere does not exist": ["--prompt", "a", "--adapter", "nowhere"],
        "--device is 'cuda:77', which torch cannot use here": ["--prompt", "a", *base, "--device", "cuda:77"],
        "run.ckpt, which is a file. Name a folder": ["--prompt", "a", *base, f"--out={run / 'run.ckpt'}"],
        "divisible by 8 but are 20": ["--prompt", "a", *base, "--height=20", "--width=16"],
        "height is 16 and width is None": ["--prompt", "a", *base, "--height=16"],
    }
    for message, arguments in cases.items():
        assert main(["generate", f"--out={run / 'bad'}", *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not (run / "bad").exists()
