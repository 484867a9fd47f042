"""lightning-uq-box: regression and classification with uncertainties, by many methods."""

import torch
from lightning.pytorch import LightningDataModule
from torch import nn

from tests.modules.case import Case
from tests.modules.data import loader


def _network(outputs: int = 1, dropout: bool = False):
    layers = [nn.Linear(4, 32), nn.ReLU(), *([nn.Dropout(0.2)] if dropout else []), nn.Linear(32, 32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, outputs))


def _convolutions(outputs: int):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, outputs, 1))


def _zigzag(outputs: int = 1):
    return nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, outputs))


def _numbers(at: int):
    return {"input": torch.randn(4), "target": torch.randn(1)}


def _classes(at: int):
    return {"input": torch.randn(4), "target": torch.tensor(at % 3)}


def _masks(at: int):
    return {"input": torch.rand(3, 16, 16), "target": torch.randint(0, 3, (16, 16))}


def _fields(at: int):
    return {"input": torch.rand(3, 16, 16), "target": torch.rand(1, 16, 16)}


def _data_module(make):
    made = loader(make)
    return LightningDataModule.from_datasets(made.dataset, made.dataset, batch_size=4, num_workers=0)


SPECTRAL = "spectral norm computes its weights, which fit cannot merge and take back; it says so, and how to merge"
UNFITTED = "the class cannot be validated before it is fitted, without the callback neither"


def _card(task: str, outputs: int):
    def arguments():
        from lightning_uq_box.models import ConditionalGuidedLinearModel

        guidance = ConditionalGuidedLinearModel(
            5, x_dim=4, y_dim=outputs, n_hidden=[16, 16], cat_x=True, cat_y_pred=True
        )
        return {"cond_mean_model": _network(outputs), "guidance_model": guidance, "n_steps": 5, "ema_update_every": 1}

    return arguments


def _with_dropout(outputs: int):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.2), nn.Conv2d(8, outputs, 1))


def _card_classes():
    return {**_card("classification", 3)(), "n_z_samples": 2}


def _case(name, make, arguments, batches=loader, **expected):
    def build():
        from lightning_uq_box import uq_methods

        return getattr(uq_methods, name)(**arguments())

    return Case(
        "lightning-uq-box",
        name,
        build,
        lambda: batches(make),
        arguments=arguments,
        sums_up=("Coverage",),
        expected=expected,
    )


CASES = [
    _case("DeterministicRegression", _numbers, lambda: {"model": _network(), "loss_fn": nn.MSELoss()}),
    _case("DeterministicClassification", _classes, lambda: {"model": _network(3), "loss_fn": nn.CrossEntropyLoss()}),
    _case("DeterministicSegmentation", _masks, lambda: {"model": _convolutions(3), "loss_fn": nn.CrossEntropyLoss()}),
    _case("DeterministicPixelRegression", _fields, lambda: {"model": _convolutions(1), "loss_fn": nn.MSELoss()}),
    _case("MVERegression", _numbers, lambda: {"model": _network(2), "burnin_epochs": 1}),
    _case("DER", _numbers, lambda: {"model": _network(4)}),
    _case("QuantileRegression", _numbers, lambda: {"model": _network(3)}),
    _case(
        "MCDropoutRegression",
        _numbers,
        lambda: {"model": _network(2, dropout=True), "num_mc_samples": 3, "loss_fn": nn.MSELoss(), "burnin_epochs": 2},
    ),
    _case(
        "MCDropoutClassification",
        _classes,
        lambda: {"model": _network(3, dropout=True), "num_mc_samples": 3, "loss_fn": nn.CrossEntropyLoss()},
    ),
    _case(
        "SNGPRegression",
        _numbers,
        lambda: {
            "feature_extractor": _network(8),
            "loss_fn": nn.MSELoss(),
            "num_gp_features": 8,
            "num_random_features": 16,
            "input_size": 8,
        },
        batches=_data_module,
        merge=SPECTRAL,
    ),
    _case(
        "BNN_VI_ELBO_Regression",
        _numbers,
        lambda: {
            "model": _network(2),
            "criterion": nn.MSELoss(),
            "burnin_epochs": 2,
            "num_mc_samples_train": 2,
            "num_mc_samples_test": 2,
            "stochastic_module_names": [-1],
        },
        batches=_data_module,
        validate=UNFITTED,
    ),
    _case("CARDRegression", _numbers, _card("regression", 1)),
    _case("ZigZagRegression", _numbers, lambda: {"model": _zigzag(), "loss_fn": nn.MSELoss()}),
    _case(
        "MasksemblesRegression",
        _numbers,
        lambda: {"model": _network(1), "loss_fn": nn.MSELoss(), "num_estimators": 4, "scale": 2.0},
    ),
    _case("QuantilePxRegression", _fields, lambda: {"model": _convolutions(3)}),
    _case("DERPxRegression", _fields, lambda: {"model": _convolutions(4)}),
    _case("MVEPxRegression", _fields, lambda: {"model": _convolutions(2)}),
    _case(
        "MCDropoutSegmentation",
        _masks,
        lambda: {"model": _with_dropout(3), "num_mc_samples": 3, "loss_fn": nn.CrossEntropyLoss()},
    ),
    _case(
        "MCDropoutPxRegression",
        _fields,
        lambda: {"model": _with_dropout(2), "num_mc_samples": 3, "loss_fn": nn.MSELoss(), "burnin_epochs": 2},
    ),
    _case(
        "DensityLayerModelRegression",
        _numbers,
        lambda: {"model": _network(1), "stochastic_module_names": [-1], "loss_fn": nn.MSELoss()},
    ),
    _case(
        "SGLDRegression",
        _numbers,
        lambda: {
            "model": _network(1),
            "loss_fn": nn.MSELoss(),
            "lr": 0.01,
            "weight_decay": 0.0,
            "noise_factor": 0.1,
            "burnin_epochs": 1,
            "n_sgld_samples": 2,
        },
    ),
    _case(
        "BNN_VI_Regression",
        _numbers,
        lambda: {
            "model": _network(1),
            "n_mc_samples_train": 2,
            "n_mc_samples_test": 2,
            "stochastic_module_names": [-1],
        },
        batches=_data_module,
        validate=UNFITTED,
    ),
    _case(
        "ProbUNet",
        _masks,
        lambda: {
            "model": _convolutions(3),
            "latent_dim": 2,
            "num_filters": [4, 8],
            "num_convs_per_block": 1,
            "num_convs_fcomb": 2,
            "fcomb_filter_size": 4,
        },
    ),
    _case("CARDClassification", _classes, _card_classes),
    _case(
        "MasksemblesClassification",
        _classes,
        lambda: {"model": _network(3), "loss_fn": nn.CrossEntropyLoss(), "num_estimators": 4, "scale": 2.0},
    ),
    _case("ZigZagClassification", _classes, lambda: {"model": _zigzag(3), "loss_fn": nn.CrossEntropyLoss()}),
    _case(
        "SNGPClassification",
        _classes,
        lambda: {
            "feature_extractor": _network(8),
            "loss_fn": nn.CrossEntropyLoss(),
            "num_targets": 3,
            "num_gp_features": 8,
            "num_random_features": 16,
            "input_size": 8,
        },
        batches=_data_module,
        merge=SPECTRAL,
    ),
]
