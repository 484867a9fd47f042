"""What the tests of training share."""

from lora_plugins.integrations.lightning import LoraCLI
from tests.integrations.lightning.toys import CONFIG, loader, lora, trainer


def fit(tmp_path, module, config=CONFIG, **options):
    run = trainer(tmp_path, [lora(config)], **options)
    run.fit(module, loader())
    return run


def lora_b(module, adapter=""):
    return {name: p for name, p in module.named_parameters() if f".lora_B.{adapter}" in name}


def learned(module, adapter=""):
    """Whether there are adapters, each of which has moved from where it started."""
    found = lora_b(module, adapter).values()
    return bool(found) and all(b.any() for b in found)


def cli(cls, tmp_path, extra=()):
    arguments = {
        "seed_everything": 1,
        "model": {"class_path": "tests.integrations.lightning.toys.Classifier"},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}},
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
        },
        **dict(extra),
    }
    options = {} if cls is LoraCLI else {"subclass_mode_model": True}
    return cls(run=False, args=arguments, save_config_callback=None, **options)
