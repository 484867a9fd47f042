"""Short flags for what is given most often, and configurations by the name of a shipped recipe."""

from collections.abc import Mapping, Sequence

from lora_plugins.integrations.lightning.cli.recipes import PREFIX, recipe_path

SHORT: Mapping[str, str] = {
    "--epochs": "--trainer.max_epochs",
    "--seed": "--seed_everything",
    "--lr": "--model.init_args.lr",
    "--batch-size": "--data.init_args.batch_size",
    "--rank": "--lora.r",
}
"""Short flags, and what each stands for."""

_CONFIG = ("--config", "-c")


def expanded(arguments: Sequence[str]) -> list[str]:
    """Returns arguments with the dotted flags that short ones stand for, and with the paths of recipes.

    Raises:
        ConfigError: If there is no recipe of a name.
    """
    found: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        is_config = (flag in _CONFIG and equals) or (bool(found) and found[-1] in _CONFIG)
        if is_config and (value or argument).startswith(PREFIX):
            path = str(recipe_path((value or argument).removeprefix(PREFIX)))
            found.append(f"{flag}={path}" if equals else path)
        else:
            found.append(f"{SHORT.get(flag, flag)}{equals}{value}")
    return found
