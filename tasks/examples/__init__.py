"""The embedded examples: handwritten digits that need no download, the weights shipped for them, a comparison.

Functions named `..._main` are commands of `python -m lora_plugins.tasks`.
"""

from lora_plugins.tasks.examples.comparison import METHODS
from lora_plugins.tasks.examples.comparison import main as compare_main
from lora_plugins.tasks.examples.comparison import run as run_comparison
from lora_plugins.tasks.examples.diffusion_pretraining import main as pretrain_diffusion_main
from lora_plugins.tasks.examples.digit_pictures import DigitPicturesDataModule
from lora_plugins.tasks.examples.digit_reader import DigitReader
from lora_plugins.tasks.examples.digits import DigitsDataModule
from lora_plugins.tasks.examples.dreambooth_comparison import main as compare_dreambooth_main
from lora_plugins.tasks.examples.dreambooth_comparison import run_dreambooth
from lora_plugins.tasks.examples.handwritten_digits import load_digit_splits
from lora_plugins.tasks.examples.pretraining import DIGITS, RECIPES, architecture, pretrain
from lora_plugins.tasks.examples.pretraining import main as pretrain_main
from lora_plugins.tasks.examples.read_digits import ReadDigits
from lora_plugins.tasks.examples.scenes import DigitScenesDataModule

__all__ = [
    "DIGITS",
    "METHODS",
    "RECIPES",
    "DigitPicturesDataModule",
    "DigitReader",
    "DigitScenesDataModule",
    "DigitsDataModule",
    "ReadDigits",
    "architecture",
    "compare_dreambooth_main",
    "compare_main",
    "load_digit_splits",
    "pretrain",
    "pretrain_diffusion_main",
    "pretrain_main",
    "run_comparison",
    "run_dreambooth",
]
