"""The pipeline that is shipped."""

from importlib.resources import files
from pathlib import Path

from lora_plugins.tasks.errors import unknown

PACKAGE = "package:"
INDEX = "model_index.json"


def pipeline_source(model: str) -> str:
    """The folder or name on the Hub that `model` stands for: itself, or for `package:NAME` a folder of this package.

    Raises:
        ConfigError: If no pipeline of that name is shipped.
    """
    if not model.startswith(PACKAGE):
        return model
    weights = Path(str(files("lora_plugins.tasks") / "weights"))
    shipped = sorted(path.parent.name for path in weights.glob(f"*/{INDEX}"))
    name = model.removeprefix(PACKAGE)
    if name not in shipped:
        raise unknown("packaged pipeline", name, shipped)
    return str(weights / name)
