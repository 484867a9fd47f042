"""Callbacks that show what a fit has done: a table, pictures, TensorBoard, an HTML report.

They read what a task logs and predicts, and change nothing in its training.
"""

from lora_plugins.tasks.reporting.before_after import BeforeAfter
from lora_plugins.tasks.reporting.html_report import HtmlReport
from lora_plugins.tasks.reporting.prediction_picture import PredictionPicture, draw_predictions
from lora_plugins.tasks.reporting.tensorboard_images import TensorBoardImages

__all__ = [
    "BeforeAfter",
    "HtmlReport",
    "PredictionPicture",
    "TensorBoardImages",
    "draw_predictions",
]
