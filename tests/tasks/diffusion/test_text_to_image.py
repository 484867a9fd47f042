"""The task: every family on two batches, what is cached, what is trained, and a run that is interrupted."""

import copy
import errno
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from lora_plugins import ConfigError, LoraConfig, LoraModel, TargetError
from lora_plugins.integrations.diffusers import LoraPipeline, Sampling, load_pipeline, parts_of
from lora_plugins.integrations.lightning import AdapterFile, LoraCallback
from lora_plugins.tasks import ClassPictures, PicturesDataModule, SamplePictures, SavePipeline, TextToImageTask
from tests.integrations.diffusers.pipelines import PIPELINES, build
from tests.slow import slow_but

from ..conftest import noise, write_image

SAMPLING = Sampling(steps=1, guidance=2.0, height=16, width=16)

FAST = ("Stable Diffusion", "Flux")
families = pytest.mark.parametrize("name", slow_but(PIPELINES, FAST))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each pipeline, made when it is asked for."""
    root = tmp_path_factory.mktemp("pipelines")

    def folder(name="Stable Diffusion"):
        path = root / name
        if not path.exists():
            build(name).save_pretrained(path)
        return str(path)

    return folder


@pytest.fixture
def pictures(picture_folder):
    """Makes a data module of four pictures."""
    root = str(picture_folder((16, 16), (16, 16), (20, 16), (16, 24)))

    def make(**changes):
        return PicturesDataModule(root, **{"prompt": "a sks dog", "resolution": 16, "batch_size": 2, **changes})

    return make


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def fit(task, data, *callbacks, lora=True, epochs=1, ckpt_path=None, config=None, **trainer):
    """Fits, and returns the losses of all steps."""
    seed_everything(0, verbose=False)
    losses = Losses()
    adapt = LoraCallback(config or LoraConfig(r=2, alpha=4), target="parts", print_plan=False) if lora is True else lora
    callbacks = [*([adapt] if adapt else []), losses, *callbacks]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False} if not any("Checkpoint" in type(c).__name__ for c in callbacks) else {}
    Trainer(max_epochs=epochs, callbacks=callbacks, **{**quiet, **trainer}).fit(task, data, ckpt_path=ckpt_path)
    return losses.values


@families
@pytest.mark.parametrize(
    "text_encoder", [pytest.param(False, marks=pytest.mark.slow), True], ids=["denoiser", "with text encoders"]
)
def test_every_family_is_trained_on_two_batches(name, text_encoder, folders, pictures, tmp_path):
    """The audit of LoraCallback holds: every factor has a gradient and moves."""
    task = TextToImageTask(folders(name), train_text_encoder=text_encoder, lr=1e-2)
    file = AdapterFile(str(tmp_path / "file.safetensors"), "diffusers")
    lora = LoraCallback(
        LoraConfig(r=2), target="parts", print_plan=False, save_adapter_to=[str(tmp_path / "own"), file]
    )
    first = fit(task, pictures(), lora=lora)
    assert len(first) == 2
    assert all(loss < 20 for loss in first)
    pipe = load_pipeline(folders(name))
    for path in (tmp_path / "own", tmp_path / "file.safetensors"):
        handle = LoraPipeline.load_adapter(pipe, path)
        assert {layer.name.partition(".")[0] for layer in handle.plans["default"].layers} == (
            {task.family.denoiser, *(task.family.text_encoders if text_encoder else ())}
        )
        handle.unload()


@families
def test_what_is_cached_changes_no_loss(name, folders, pictures):
    cached, anew = (fit(TextToImageTask(folders(name), cache=on), pictures(), epochs=2) for on in (True, False))
    # Anew, pictures are encoded in batches, which changes last bits.
    assert cached == pytest.approx(anew, rel=1e-4)


@pytest.mark.parametrize("changed", ["pictures", "text encoder"])
def test_a_second_fit_reads_what_is_there_then(folders, pictures, changed):
    task, data = TextToImageTask(folders(), lr=0), pictures()
    first = fit(task, data, lora=None)
    if changed == "pictures":
        for path in data.root.iterdir():
            write_image(path, noise(16, 16, seed=1))
    else:
        for parameter in task.pipe.text_encoder.parameters():
            parameter.data.mul_(2)
    anew = TextToImageTask(folders(), lr=0)
    anew.parts.load_state_dict(task.parts.state_dict())
    second = fit(task, pictures(), lora=None)
    assert second == fit(anew, pictures(), lora=None)
    assert second != first


def test_latents_are_what_the_pipeline_undoes_before_it_decodes(folders, pictures, tmp_path):
    """Pipelines of Stable Diffusion XL can have a mean and a deviation for each channel of their latents."""
    mean, deviation = [0.5, -0.2, 0.1, 0.0], [2.0, 0.5, 1.0, 4.0]
    pipe, data = build("Stable Diffusion XL"), pictures()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))

    def found(**of_channels):
        pipe.vae.register_to_config(**of_channels)
        pipe.save_pretrained(tmp_path)
        torch.manual_seed(0)
        return TextToImageTask(str(tmp_path)).latents_of(batch)

    plain = found() / pipe.vae.config.scaling_factor
    scaled = found(latents_mean=mean, latents_std=deviation) / pipe.vae.config.scaling_factor
    undone = scaled * torch.tensor(deviation).view(1, -1, 1, 1) + torch.tensor(mean).view(1, -1, 1, 1)
    torch.testing.assert_close(undone, plain)


def test_an_autoencoder_that_overflows_in_half_precision_is_upcast(pictures, tmp_path):
    pipe = build("Stable Diffusion XL")
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(1e6).clamp_(-6e4, 6e4)
    assert pipe.vae.config.force_upcast
    pipe.to(torch.float16).save_pretrained(tmp_path)
    task = TextToImageTask(str(tmp_path), dtype="float16")
    data = pictures()
    data.setup("fit")
    assert bool(task.latents_of(next(iter(data.train_dataloader()))).isfinite().all())
    assert {parameter.dtype for parameter in task.pipe.vae.parameters()} == {torch.float16}


def test_gradient_checkpointing_changes_no_loss(folders, pictures):
    arguments = {"train_text_encoder": True, "lr": 1e-2}
    kept, again = (
        fit(TextToImageTask(folders(), gradient_checkpointing=on, **arguments), pictures(), epochs=2)
        for on in (False, True)
    )
    assert kept == pytest.approx(again, rel=1e-5)


@pytest.mark.parametrize("name", ["Stable Diffusion", pytest.param("Flux", marks=pytest.mark.slow)])
def test_a_fit_learns(name, folders, pictures):
    """On one picture with the same noise in each step."""

    class SameNoise(Callback):
        def on_train_batch_start(self, *_):
            torch.manual_seed(0)

    task = TextToImageTask(folders(name), lr=1e-2, layers=("attention", "feed_forward"))
    losses = fit(task, pictures(batch_size=4), SameNoise(), epochs=25)
    assert losses[-1] < 0.9 * losses[0]


def test_the_loss_is_that_of_the_subject_and_of_the_class(folders, pictures, picture_folder):
    others = picture_folder((16, 16), name="class")
    (others / "0.txt").write_text("a dog")
    asked = ClassPictures(str(others), ["a dog"], count=1, generate=False)

    class Logged(Callback):
        def on_train_end(self, trainer, pl_module):
            self.values = {name: float(value) for name, value in trainer.callback_metrics.items()}

    logged = Logged()
    fit(TextToImageTask(folders(), prior_weight=0.5), pictures(batch_size=4, class_pictures=asked), logged)
    values = logged.values
    assert values["train/loss"] == pytest.approx(values["train/subject_loss"] + 0.5 * values["train/class_loss"])


def test_class_pictures_are_those_of_the_base_model(folders, pictures, tmp_path):
    asked = ClassPictures(str(tmp_path / "class"), ["a dog"], count=2, sampling=SAMPLING)
    fit(TextToImageTask(folders(), lr=1e-2), pictures(class_pictures=asked))
    first = [path.read_bytes() for path in asked.present()]
    for path in asked.present():
        path.unlink()
    asked.draw_missing(load_pipeline(folders()))
    assert [path.read_bytes() for path in asked.present()] == first


@pytest.mark.parametrize("text_encoder", [False, True], ids=["denoiser", "with text encoders"])
@pytest.mark.filterwarnings("ignore:.*module.s. in eval mode:UserWarning")
def test_without_lora_the_parts_are_trained_in_full(text_encoder, folders, pictures):
    task = TextToImageTask(folders(), train_text_encoder=text_encoder, lr=1e-3)
    before = {name: tensor.clone() for name, tensor in task.parts.state_dict().items()}
    fit(task, pictures(), lora=None)
    changed = {
        name.partition(".")[0] for name, tensor in task.parts.state_dict().items() if not tensor.equal(before[name])
    }
    assert changed == ({"unet", "text_encoder"} if text_encoder else {"unet"})
    assert not any(name.startswith("vae") for name in task.state_dict())


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # as meant, to compare the two
def test_interrupted_and_resumed_is_straight_bit_for_bit(folders, pictures, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(epochs, folder, resumed=None):
        others = ClassPictures(str(tmp_path / "class"), ["a dog", "a cat"], count=3, sampling=SAMPLING)
        task = TextToImageTask(folders(), train_text_encoder=True, lr=1e-2, offset_noise=0.1)
        data = pictures(class_pictures=others, batch_size=3, random_flip=True)
        lora = LoraCallback(
            LoraConfig(r=2, dropout=0.1), target="parts", print_plan=False, save_adapter_to=str(tmp_path / folder)
        )
        saver = ModelCheckpoint(tmp_path / f"{folder}-checkpoints", filename="{epoch}", save_top_k=-1)
        samples = SamplePictures(str(tmp_path / "samples"), ["a sks dog"], 1, SAMPLING)
        fit(task, data, saver, samples, lora=lora, epochs=epochs, ckpt_path=resumed)

    run(3, "straight")
    run(1, "interrupted")
    run(3, "resumed", tmp_path / "interrupted-checkpoints" / "epoch=0.ckpt")
    straight, resumed = (load_pipeline(folders()) for _ in range(2))
    tensors = [
        LoraPipeline.load_adapter(pipe, tmp_path / folder).pack("default").tensors
        for pipe, folder in ((straight, "straight"), (resumed, "resumed"))
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    size = (tmp_path / "straight-checkpoints" / "epoch=0.ckpt").stat().st_size
    assert size < sum(file.stat().st_size for file in Path(folders()).rglob("*.safetensors"))


def test_a_checkpoint_is_loaded_without_a_trainer(folders, pictures, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    task = TextToImageTask(folders(), lr=1e-2, layers=["attention", "convolutions"])
    saver = ModelCheckpoint(tmp_path / "checkpoints", filename="last")
    fit(
        task,
        pictures(),
        saver,
        lora=LoraCallback(LoraConfig(r=2), target="parts", print_plan=False, merge_on_fit_end=False),
    )
    again = TextToImageTask.load_from_checkpoint(
        tmp_path / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True
    )
    first, second = (LoraModel(each.parts).pack("default").tensors for each in (task, again))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_average_is_what_is_saved(folders, pictures, tmp_path):
    adapters = []
    for ema in (0.0, 0.9):
        folder = tmp_path / str(ema)
        lora = LoraCallback(LoraConfig(r=2), target="parts", print_plan=False, save_adapter_to=str(folder))
        fit(TextToImageTask(folders(), lr=1e-2, ema=ema), pictures(), lora=lora, epochs=3)
        adapters.append(LoraPipeline.load_adapter(load_pipeline(folders()), folder).pack("default").tensors)
    norms = [sum(float(t.norm()) for name, t in each.items() if name.endswith("lora_B")) for each in adapters]
    assert 0 < norms[1] < norms[0]


def test_a_task_is_copied_and_pickled(folders):
    task = TextToImageTask(folders())
    for copied in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert parts_of(copied.pipe) is copied.parts
        assert copied.pipe.unet is copied.parts["unet"] is not task.parts["unet"]


@pytest.mark.parametrize("dtype", slow_but(["bfloat16", "float16"], ["bfloat16"]))
def test_a_base_in_half_precision(dtype, folders, pictures):
    task = TextToImageTask(folders(), dtype=dtype, lr=1e-2)
    losses = fit(task, pictures(), epochs=1)
    assert losses[0] == pytest.approx(fit(TextToImageTask(folders(), lr=1e-2), pictures())[0], rel=0.1)


def test_prediction_is_set_in_the_scheduler_too(folders):
    assert TextToImageTask(folders()).pipe.scheduler.config.prediction_type == "epsilon"
    task = TextToImageTask(folders(), prediction="v_prediction", min_snr_gamma=5.0)
    assert task.pipe.scheduler.config.prediction_type == "v_prediction"
    assert task.objective.velocity
    assert TextToImageTask(folders("Stable Diffusion 2")).objective.velocity


def test_samples_and_report_are_left(folders, pictures, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    samples = SamplePictures(str(tmp_path / "out"), ["a sks dog", "a cat"], 2, SAMPLING, every=2)
    merged, logger = SavePipeline(str(tmp_path / "merged")), TensorBoardLogger(tmp_path, "logs", "run")
    fit(TextToImageTask(folders(), lr=1e-2), pictures(), samples, merged, epochs=2, logger=logger)
    events = EventAccumulator(str(tmp_path / "logs" / "run")).Reload()
    assert [event.step for event in events.Images("samples")] == [0, 4, 4]
    page = (tmp_path / "out" / "report.html").read_text()
    for text in ("Before", "Epoch 2", "After", "loss", "What was adapted", "unet.mid_block"):
        assert text in page
    assert "Epoch 1" not in page
    charts = [json.loads(chart) for chart in re.findall("data-chart='([^']+)'", page)]
    assert {chart["title"]: [at for at, _ in chart["lines"][0]["points"]] for chart in charts} == {
        "Subject loss": [1, 2],  # 0 is before training
        "Loss": [1, 2],
    }
    assert (tmp_path / "out" / "before.png").read_bytes() != (tmp_path / "out" / "after.png").read_bytes()
    assert type(load_pipeline(tmp_path / "merged")).__name__ == "StableDiffusionPipeline"


def test_a_sample_does_not_change_the_training(folders, pictures, tmp_path):
    samples = SamplePictures(str(tmp_path / "out"), ["a sks dog"], 1, SAMPLING)
    without, sampled = (
        fit(TextToImageTask(folders(), lr=1e-2), pictures(), *more, epochs=2) for more in ((), (samples,))
    )
    assert without == sampled


class Other(LightningModule):
    pass


def test_bad_input_is_named_before_anything_is_trained(folders, pictures, tmp_path):
    folder = folders()
    with pytest.raises(ConfigError, match=r"15x15 pixels do not fit .* multiples of 4"):
        fit(TextToImageTask(folder), pictures(resolution=15))
    with pytest.raises(ConfigError, match=r"text_encoder.*is not trained"):
        fit(TextToImageTask(folder), pictures(), config=LoraConfig(r=2, target_modules=["to_q", "q_proj"]))
    with pytest.raises(
        ConfigError, match="train_text_encoder is true, and the adapter trains nothing in a text encoder"
    ):
        fit(
            TextToImageTask(folder, train_text_encoder=True),
            pictures(),
            config=LoraConfig(r=2, target_modules=["to_q"]),
        )
    with pytest.raises(ConfigError, match=r"precision is bf16-true.* Set `dtype`"):
        fit(TextToImageTask(folder), pictures(), precision="bf16-true")
    with pytest.raises(TargetError, match="to_qq"):
        fit(TextToImageTask(folder), pictures(), config=LoraConfig(r=2, target_modules=["to_qq"]))
    with pytest.raises(ConfigError, match="There is no folder"):
        TextToImageTask(str(tmp_path / "no"))
    with pytest.raises(ConfigError, match=r"'digits'.*'digits_diffusion'"):
        TextToImageTask("package:digits")
    for arguments in ({"ema": 1.0}, {"dtype": "float"}, {"offset_noise": -1.0}, {"prior_weight": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(arguments))):
            TextToImageTask(folder, **arguments)
    with pytest.raises(ConfigError, match="no layers of the kind 'attentions'"):
        TextToImageTask(folder, layers=["attentions"])
    with pytest.raises(ConfigError, match="at least one text, and no empty one"):
        SamplePictures("out", ["a dog", ""])
    for callback in (SamplePictures("out", ["a dog"]), SavePipeline("out")):
        with pytest.raises(ConfigError, match="needs a TextToImageTask, and the module is of the class Other"):
            callback.setup(Trainer(logger=False, accelerator="cpu", enable_checkpointing=False), Other(), "fit")


def test_a_pipeline_is_saved_merged_or_not_at_all(folders, pictures, tmp_path):
    lora = LoraCallback(LoraConfig(r=2), target="parts", print_plan=False, merge_on_fit_end=False)
    losses = Losses()
    with pytest.raises(ConfigError, match="merge_on_fit_end"):
        fit(TextToImageTask(folders()), pictures(), SavePipeline(str(tmp_path / "merged")), losses, lora=lora)
    assert not losses.values  # told before training
    assert not (tmp_path / "merged").exists()


def test_a_pipeline_whose_writing_was_stopped_is_none(folders, pictures, tmp_path, monkeypatch):
    """Not one of parts of two fits."""
    merged = SavePipeline(str(tmp_path / "merged"))
    fit(TextToImageTask(folders()), pictures(), merged)
    task = TextToImageTask(folders())

    def stopped(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(task.pipe.unet, "save_pretrained", stopped)
    with pytest.raises(OSError, match="No space left"):
        fit(task, pictures(), merged)
    with pytest.raises(ConfigError, match="merged"):
        load_pipeline(tmp_path / "merged")


def test_the_base_is_not_replaced_by_what_is_trained_on_it(folders, pictures):
    with pytest.raises(ConfigError, match=r"which the pipeline is read from: it would be replaced\."):
        fit(TextToImageTask(folders()), pictures(), SavePipeline(folders()))


@pytest.mark.parametrize("make", [lambda folder: SamplePictures(folder, ["a sks dog"], 1, SAMPLING), SavePipeline])
def test_a_place_that_cannot_be_written_is_told_before_training(make, folders, pictures, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match=r"folder of (SamplePictures|SavePipeline) is .*out, which is a file"):
        fit(TextToImageTask(folders()), pictures(), make(str(tmp_path / "out")), max_steps=0)


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"max_steps": 0}], ids=str)
def test_where_nothing_was_trained_no_pictures_are_left(options, folders, pictures, tmp_path):
    samples = SamplePictures(str(tmp_path / "out"), ["a sks dog"], 1, SAMPLING)
    fit(TextToImageTask(folders()), pictures(), samples, **options)
    assert not (tmp_path / "out").exists()


def test_a_trial_of_the_code_writes_no_pipeline(folders, pictures, tmp_path):
    fit(TextToImageTask(folders()), pictures(), SavePipeline(str(tmp_path / "merged")), fast_dev_run=True)
    assert not (tmp_path / "merged").exists()


def test_a_pipeline_is_merged_whatever_the_order_of_the_callbacks(folders, pictures, tmp_path):
    lora = LoraCallback(LoraConfig(r=2), target="parts", print_plan=False)
    fit(TextToImageTask(folders()), pictures(), SavePipeline(str(tmp_path / "merged")), lora, lora=None)
    assert type(load_pipeline(tmp_path / "merged")).__name__ == "StableDiffusionPipeline"
