"""The report of a fit."""

import json
import math
import shlex

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lora_plugins import ConfigError, LoraConfig
from lora_plugins.cli.main import main
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks import (
    HtmlReport,
    ImageClassificationTask,
    MaskFolderDataModule,
    PredictionPicture,
    SemanticSegmentationTask,
    TensorBoardImages,
    warmup_cosine,
)
from lora_plugins.tasks.pages import read_run

from ..browser import browser_page, needs_browser
from ..conftest import digits, noise, scenes, tiny_segformer, tiny_vit, write_image


def lora(folder, target="network", **options):
    return LoraCallback(LoraConfig(r=2), target=target, save_adapter_to=str(folder / "a"), print_plan=False, **options)


@pytest.fixture
def report(trainer, tmp_path):
    """The report of a fit of masks, with LoRA."""
    path = tmp_path / "report.html"
    run = trainer(callbacks=[lora(tmp_path), HtmlReport(str(path), samples=2)], num_sanity_val_steps=-1, max_epochs=2)
    run.fit(SemanticSegmentationTask(tiny_segformer(), ignore_index=255), datamodule=scenes())
    return path


class OwnRate(torch.optim.Optimizer):
    """Has no learning rate in its groups, as A2Grad and AliG of pytorch_optimizer."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad, alpha=0.01)
        return loss


class TestReport:
    def test_it_holds_all_and_needs_nothing_beside_it(self, report):
        text = report.read_text()
        headings = ("Mean IoU", "IoU of each class", "Loss", "What is taken for what", "Examples", "What was trained")
        facts = ("learning rate", "seed", "torch", "DigitScenesDataModule", "peak memory", "LoRA, r=2", "q_proj")
        for part in (*headings, *facts, "before training", "adapter"):
            assert part in text
        assert "http" not in text
        assert text.count("data:image/png;base64,") == 3 * 3  # image, truth and prediction of all three scenes

    @pytest.mark.parametrize("options", [{"max_epochs": 0}, {"limit_val_batches": 0}], ids=str)
    def test_where_nothing_was_validated_there_is_none(self, options, trainer, tmp_path):
        run = trainer(callbacks=[lora(tmp_path), HtmlReport(str(tmp_path / "r.html"))], **options)
        with pytest.warns(UserWarning, match="There is no report: this fit validated nothing"):
            run.fit(ImageClassificationTask(tiny_vit()), datamodule=digits())
        assert not (tmp_path / "r.html").exists()
        assert (tmp_path / "a").exists()

    @pytest.mark.parametrize(
        ("options", "measured", "steps"),
        [({"max_epochs": 3, "check_val_every_n_epoch": 2}, 4, 6), ({"max_epochs": 2, "max_steps": 3}, 2, 3)],
        ids=["an epoch later", "within an epoch"],
    )
    def test_metrics_of_earlier_weights_are_told(self, options, measured, steps, trainer, tmp_path):
        path = tmp_path / "report.html"
        run = trainer(callbacks=[lora(tmp_path), HtmlReport(str(path))], **options)
        with pytest.warns(UserWarning, match=f"of step {measured}, the last .* went on to step {steps}"):
            run.fit(SemanticSegmentationTask(tiny_segformer(), ignore_index=255), datamodule=scenes())
        assert read_run(path).facts["Training"]["metrics"] == f"of step {measured}"

    def test_rates_and_schedule_are_named(self, trainer, tmp_path):
        path = tmp_path / "r.html"
        task = SemanticSegmentationTask(tiny_segformer(), lr=1e-3, lr_scheduler=warmup_cosine)
        callbacks = [lora(tmp_path, heads_lr_ratio=3.0), HtmlReport(str(path))]
        trainer(callbacks=callbacks, num_sanity_val_steps=-1, max_epochs=1).fit(task, datamodule=scenes())
        facts = read_run(path).facts["Training"]
        assert facts["learning rate"] == "0.001 (A, B), 0.003 (head)"
        assert facts["schedule"] == "warmup_cosine"

    def test_an_optimizer_without_a_rate_is_told(self, trainer, tmp_path):
        run = trainer(callbacks=[lora(tmp_path), HtmlReport(str(tmp_path / "r.html"))])
        run.fit(ImageClassificationTask(tiny_vit(), optimizer=OwnRate), datamodule=digits())
        facts = read_run(tmp_path / "r.html").facts["Training"]
        assert (facts["optimizer"], facts["learning rate"]) == ("OwnRate", "found by the optimizer")

    def test_all_adapters_are_among_the_files(self, trainer, tmp_path):
        places = [str(tmp_path / name) for name in "ab"]
        adapted = LoraCallback(LoraConfig(r=2), target="network", save_adapter_to=places, print_plan=False)
        run = trainer(callbacks=[adapted, HtmlReport(str(tmp_path / "r.html"))])
        run.fit(ImageClassificationTask(tiny_vit()), datamodule=digits())
        found, titles = read_run(tmp_path / "r.html"), ["adapter", "adapter 2"]
        assert found.facts["Files"] == dict(zip(titles, places, strict=True))
        assert [*found.costs.sizes] == titles

    def test_its_numbers_are_those_of_the_fit(self, trainer, tmp_path):
        path, task, data = tmp_path / "r.html", SemanticSegmentationTask(tiny_segformer()), scenes()
        (before,) = trainer().validate(task, datamodule=data, verbose=False)
        fit = trainer(callbacks=[HtmlReport(str(path))], num_sanity_val_steps=-1, max_epochs=2)
        fit.fit(task, datamodule=data)
        run = read_run(path)
        for name, metric in run.metrics.items():
            assert metric.before == pytest.approx(before[f"val/{name}"])
            assert metric.after == pytest.approx(float(fit.callback_metrics[f"val/{name}"]))
        assert next(iter(run.metrics)) == "mean_iou"
        for result in run.classes:
            for value, metrics in ((result.before, before), (result.after, fit.callback_metrics)):
                logged = float(metrics[f"val/iou/{result.name}"])
                assert value == (None if math.isnan(logged) else pytest.approx(logged))
        assert torch.equal(torch.tensor(run.confusion), task.confusion["val"])
        assert sum(result.train for result in run.classes) == 4 * 64 * 64
        assert (run.method, run.costs.trained, run.costs.total) == ("full fine-tuning", *[run.costs.total] * 2)

    @needs_browser
    def test_a_browser_shows_it(self, report, tmp_path):
        with browser_page(tmp_path) as page:
            page.open(report.as_uri())
            assert page.run("document.querySelectorAll('.curve').length") == 4
            assert page.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert page.problems == []

    def test_classes_of_the_plan_are_grouped(self, report):
        run = read_run(report)
        assert any(row.count > 1 and "0-3" in row.name for row in run.plan)
        assert run.trained == {"decode_head": 13}  # all of it is new


class TestNextSteps:
    @pytest.fixture
    def base(self, tmp_path):
        """A file of weights that are not random."""
        file = tmp_path / "base.safetensors"
        save_file(SemanticSegmentationTask(tiny_segformer()).network.state_dict(), file)
        return str(file)

    def steps(self, trainer, folder, weights, **files):
        callback = LoraCallback(LoraConfig(r=2), target="network", print_plan=False, **files)
        task = SemanticSegmentationTask(tiny_segformer(weights=weights))
        trainer(callbacks=[callback, HtmlReport(str(folder / "r.html"))]).fit(task, datamodule=scenes())
        return list(read_run(folder / "r.html").next_steps.values())

    @pytest.mark.parametrize("file", ["save_adapter_to", "export_to"], ids=["adapter", "merged"])
    def test_they_can_be_pasted(self, trainer, tmp_path, base, monkeypatch, capsys, file):
        monkeypatch.chdir(tmp_path)
        predict, _, python = self.steps(trainer, tmp_path, base, **{file: "a file of a run.safetensors"})
        write_image(tmp_path / "IMAGES" / "a.png", noise())
        assert main(shlex.split(predict)[1:]) == 0, capsys.readouterr().err
        assert (tmp_path / "OUT" / "masks" / "a.png").is_file()
        exec(python)
        assert "ground" in capsys.readouterr().out

    def test_a_random_base_cannot_be_had_again(self, trainer, tmp_path):
        files = {"save_adapter_to": str(tmp_path / "a"), "export_to": str(tmp_path / "m.safetensors")}
        assert self.steps(trainer, tmp_path, "none", save_adapter_to=files["save_adapter_to"]) == []
        predict, *_ = self.steps(trainer, tmp_path, "none", **files)
        assert "m.safetensors" in predict


class TestHistory:
    def test_curves_have_a_point_an_epoch(self, trainer, tmp_path):
        """A task logs its metrics of the train split after the callbacks' turn."""
        path = tmp_path / "r.html"
        trainer(callbacks=[HtmlReport(str(path))], max_epochs=3).fit(
            ImageClassificationTask(tiny_vit()), datamodule=digits()
        )
        for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):
            assert [epoch for epoch, _ in read_run(path).history[name]] == [1, 2, 3]

    def test_validations_within_an_epoch_have_their_place(self, trainer, tmp_path):
        path = tmp_path / "r.html"
        fit = trainer(callbacks=[HtmlReport(str(path))], val_check_interval=0.5, num_sanity_val_steps=-1)
        fit.fit(SemanticSegmentationTask(tiny_segformer()), datamodule=scenes())
        assert [epoch for epoch, _ in read_run(path).history["val/loss"]] == [0, 0.5, 1]

    @pytest.mark.parametrize("steps", [0, 1], ids=["none", "a part of the split"])
    def test_without_a_whole_check_there_is_no_before(self, trainer, tmp_path, steps):
        path = tmp_path / "r.html"
        trainer(callbacks=[HtmlReport(str(path))], num_sanity_val_steps=steps).fit(
            SemanticSegmentationTask(tiny_segformer()), datamodule=scenes()
        )
        run = read_run(path)
        assert {metric.before for metric in run.metrics.values()} == {None}
        assert {result.before for result in run.classes} == {None}
        assert "num_sanity_val_steps" in path.read_text()

    @pytest.mark.parametrize("first", [True, False], ids=["before the report", "after it"])
    def test_the_best_weights_have_their_own_numbers(self, trainer, tmp_path, first):
        """A rate that ruins what was learned: the first epoch is the best."""
        path, best = tmp_path / "r.html", ModelCheckpoint(tmp_path, monitor="val/loss")
        task = ImageClassificationTask(tiny_vit(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
        adapter = lora(tmp_path, merge_source="best")
        callbacks = [adapter, best, HtmlReport(str(path))] if first else [HtmlReport(str(path)), adapter, best]
        trainer(callbacks=callbacks, max_epochs=4, enable_checkpointing=True).fit(task, datamodule=digits())
        run = read_run(path)
        losses = [value for _, value in run.history["val/loss"]]
        assert run.metrics["loss"].after == pytest.approx(min(losses))
        right = sum(run.confusion[i][i] for i in range(3)) / sum(map(sum, run.confusion))
        assert run.metrics["accuracy"].after == pytest.approx(right)
        assert run.costs.sizes["adapter"] > 0

    @pytest.mark.filterwarnings("ignore:Checkpoint directory")  # not empty, as it is that of the run that is resumed
    @pytest.mark.parametrize("resumes", [False, True], ids=["from the base", "resumed"])
    def test_what_was_before_is_told(self, resumes, trainer, tmp_path):
        path = tmp_path / "report.html"

        def fit(epochs, **resumed):
            torch.manual_seed(0)  # of the base, which is random
            stored, report = ModelCheckpoint(tmp_path), HtmlReport(str(path))
            options = {"max_epochs": epochs, "num_sanity_val_steps": -1, "enable_checkpointing": True}
            run = trainer(callbacks=[lora(tmp_path), stored, report], **options)
            run.fit(ImageClassificationTask(tiny_vit()), datamodule=digits(), **resumed)
            return stored.best_model_path, run.global_step

        half, steps = fit(1)
        if resumes:
            fit(2, ckpt_path=half)
        assert ("the weights that the run was resumed with" in path.read_text()) is resumes
        assert ("the base model with its new head" in path.read_text()) is not resumes
        assert read_run(path).facts["Training"].get("resumed") == (f"at step {steps}" if resumes else None)

    @pytest.mark.filterwarnings("ignore:Checkpoint directory")  # not empty, as it is that of the run that is resumed
    def test_the_best_weights_of_a_run_that_is_resumed_have_no_numbers_of_another_epoch(self, trainer, tmp_path):
        """The highest loss is taken for the best, which no later epoch has."""

        def fit(epochs, **resumed):
            best = ModelCheckpoint(tmp_path, monitor="val/loss", mode="max")
            report = HtmlReport(str(tmp_path / "r.html"))
            torch.manual_seed(0)  # of the base, which is random
            task = ImageClassificationTask(tiny_vit(), lr=1e-2)
            callbacks = [lora(tmp_path, merge_source="best"), best, report]
            run = trainer(callbacks=callbacks, max_epochs=epochs, enable_checkpointing=True)
            run.fit(task, datamodule=digits(), **resumed)
            return best.best_model_path

        stored = fit(1)
        with pytest.warns(UserWarning, match="no metrics after training: the best weights.*of the run that it resumed"):
            assert fit(3, ckpt_path=stored) == stored
        run = read_run(tmp_path / "r.html")
        assert {metric.after for metric in run.metrics.values()} == {None}
        assert sum(map(sum, run.confusion)) > 0


def test_a_report_of_labels(trainer, tmp_path):
    path = tmp_path / "r.html"
    trainer(callbacks=[HtmlReport(str(path))]).fit(ImageClassificationTask(tiny_vit()), datamodule=digits())
    assert "only mistakes" in path.read_text()
    assert json.loads((tmp_path / "r.json").read_text())["class_metric"] == "recall"


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_samples_are_judged_in_the_precision_of_the_fit(precision, trainer, tmp_path):
    files = [str(tmp_path / name) for name in ("report.html", "masks.png", "merged.safetensors")]
    last = lora(tmp_path, export_to=files[2])
    run = trainer(callbacks=[last, HtmlReport(files[0]), PredictionPicture(files[1])], precision=precision)
    run.fit(task := SemanticSegmentationTask(tiny_segformer(), lr=0.05), datamodule=scenes())
    confusion = torch.tensor(read_run(tmp_path / "report.json").confusion)
    assert torch.equal(confusion, task.confusion["val"])
    assert all((tmp_path / name).exists() for name in files)


def test_all_pictures_are_predicted_in_mixed_precision(trainer, tmp_path):
    """As the metrics beside them are."""
    mixed, task = [], SemanticSegmentationTask(tiny_segformer())
    task.network.register_forward_hook(lambda *_: mixed.append(torch.is_autocast_enabled("cpu")))
    callbacks = [HtmlReport(str(tmp_path / "r.html")), PredictionPicture(str(tmp_path / "r.png")), TensorBoardImages()]
    run = trainer(callbacks=callbacks, precision="bf16-mixed", logger=TensorBoardLogger(tmp_path))
    run.fit(task, datamodule=scenes())
    assert all(mixed)


class Noticing(Dataset):
    """Samples that know in which precision they are made."""

    def __init__(self):
        self.made = set()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        self.made.add((torch.get_default_dtype(), torch.is_autocast_enabled("cpu")))
        return torch.rand(3, 32, 32), torch.full((32, 32), index % 2)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_samples_are_made_in_the_precision_that_they_have_in_the_fit(precision, trainer, tmp_path):
    data = Noticing()
    callbacks = [HtmlReport(str(tmp_path / "r.html")), PredictionPicture(str(tmp_path / "r.png"))]
    run = trainer(callbacks=callbacks, precision=precision)
    run.fit(SemanticSegmentationTask(tiny_segformer()), DataLoader(data, 2), DataLoader(data, 2))
    assert data.made == {(torch.float32, False)}


def test_images_keep_their_aspect_and_ignored_pixels_are_in_the_key(trainer, tmp_path, mask_folders):
    path, size = tmp_path / "r.html", (32, 64)
    data = MaskFolderDataModule(str(mask_folders), classes=["a", "b", "c"], image_size=size, batch_size=2)
    task = SemanticSegmentationTask(tiny_segformer(3), ignore_index=255)
    trainer(callbacks=[HtmlReport(str(path))]).fit(task, datamodule=data)
    assert "aspect-ratio: 64 / 32" in path.read_text()
    assert "void (not counted)" in path.read_text()
    assert read_run(path).data == "data"


class Endless(IterableDataset):
    """Samples that come one after another."""

    def __iter__(self):
        for i in range(6):
            yield torch.rand(3, 16, 16), i % 3


@pytest.mark.parametrize(
    "held", [lambda each: each, lambda each: [each], lambda each: {"val": each}], ids=["alone", "list", "dict"]
)
def test_data_without_a_module_or_a_length(trainer, tmp_path, held):
    path, samples = tmp_path / "r.html", [(torch.rand(3, 16, 16), i % 3) for i in range(4)]
    fit = trainer(callbacks=[HtmlReport(str(path))], max_epochs=2, num_sanity_val_steps=-1)
    fit.fit(ImageClassificationTask(tiny_vit()), DataLoader(Endless(), 2), held(DataLoader(samples, 2)))
    run = read_run(path)
    assert [epoch for epoch, _ in run.history["val/loss"]] == [0, 1, 2]
    assert [(result.train, result.val) for result in run.classes] == [(2, 2), (2, 1), (2, 1)]
    assert run.facts["Data"] == {"val": "4 images"}
    assert "sample 0" in path.read_text()


class Stripes(IterableDataset):
    """Images with masks that come one after another."""

    def __iter__(self):
        for i in range(4):
            yield torch.rand(3, 32, 32), torch.full((32, 32), i % 3)


class Batches:
    """Batches that come from no DataLoader."""

    def __iter__(self):
        for _ in range(2):
            yield torch.rand(3, 3, 16, 16), torch.arange(3)


def test_of_batches_without_a_data_set_there_are_numbers_and_no_samples(trainer, tmp_path):
    path = tmp_path / "r.html"
    fit = trainer(callbacks=[HtmlReport(str(path)), TensorBoardImages()], logger=TensorBoardLogger(tmp_path))
    fit.fit(ImageClassificationTask(tiny_vit()), Batches(), Batches())
    assert sum(map(sum, read_run(path).confusion)) == 6
    assert "Examples from the val split" not in path.read_text()


@pytest.mark.filterwarnings("ignore:Total length of")  # Lightning notices that there is nothing, too
@pytest.mark.parametrize("val", [[], DataLoader([])], ids=["no loader", "no sample"])
def test_of_no_val_data_there_is_no_report(trainer, tmp_path, val):
    fit = trainer(callbacks=[HtmlReport(str(tmp_path / "r.html"))])
    with pytest.warns(UserWarning, match="There is no report: this fit validated nothing"):
        fit.fit(ImageClassificationTask(tiny_vit()), Batches(), val)


def test_of_a_stream_there_are_numbers_and_no_samples(trainer, tmp_path):
    path = tmp_path / "r.html"
    callbacks = [HtmlReport(str(path)), PredictionPicture(str(tmp_path / "r.png")), TensorBoardImages()]
    fit = trainer(callbacks=callbacks, logger=TensorBoardLogger(tmp_path))
    with pytest.warns(UserWarning, match="no picture of predictions: samples of a stream"):
        fit.fit(SemanticSegmentationTask(tiny_segformer(3)), DataLoader(Stripes(), 2), DataLoader(Stripes(), 2))
    assert sum(map(sum, read_run(path).confusion)) == 4 * 32 * 32
    assert "Examples from the val split" not in path.read_text()


@pytest.mark.parametrize(
    ("path", "message"),
    [("report.txt", "ends in .html"), ("file/report.html", "is a file"), ("folder.html", "is a folder")],
    ids=["another kind", "below a file", "a folder"],
)
def test_a_place_that_cannot_be_written_is_refused_before_training(trainer, tmp_path, path, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ConfigError, match=message):
        trainer(callbacks=[HtmlReport(str(tmp_path / path))]).fit(
            ImageClassificationTask(tiny_vit()), datamodule=digits()
        )
