"""Whether a task, its data and its checkpoints mean the same classes by the same labels."""

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_info

from lora_plugins import ConfigError
from lora_plugins.errors import counted, listing
from lora_plugins.tasks.data import VisionDataModule


def check_class_names(names: Sequence[str], num_classes: int) -> None:
    """Checks that the names of a task's classes are one for each.

    Raises:
        ConfigError: If they are not.
    """
    different = {*names}
    if not len(names) == len(different) == num_classes:
        raise ConfigError(f"{len(different)} different class_names ({', '.join(names)}) for num_classes={num_classes}.")


def check_data(data: VisionDataModule, own: Sequence[str] | None, num_classes: int, ignore_index: int) -> None:
    """Checks that data have the classes of a task; tells of those with another name there.

    Raises:
        ConfigError: If they do not agree, so that a label would be that of another class or of none.
    """
    names = data.class_names
    if len(names) != num_classes:
        raise ConfigError(
            f"The data has {counted(len(names), 'class', 'classes')} ({', '.join(names)}), the model "
            f"num_classes={num_classes}. Set `model.num_classes` to {len(names)}."
        )
    if data.ignore_index not in (None, ignore_index):
        raise ConfigError(
            f"The data has ignore_index={data.ignore_index}, the task {ignore_index}: labels that the data does not "
            f"count would be trained on. Set `ignore_index` of the task to {data.ignore_index}."
        )
    if own is not None:
        _check_places(names, own)


def _check_places(names: Sequence[str], own: Sequence[str]) -> None:
    renamed = {theirs: ours for theirs, ours in zip(names, own, strict=True) if theirs != ours}
    if {*renamed} & {*renamed.values()}:
        raise ConfigError(
            f"The data has the classes {', '.join(names)}, in this order, and the task {', '.join(own)}: labels "
            "would stand for other classes. Give `class_names` of the task in the order of the data, or none to a new "
            "task; or the data (`classes`) in the order of the task."
        )
    if renamed:
        names_here = f"{listing(renamed, 3)} are {listing(renamed.values(), 3)}"
        rank_zero_info(f"Classes of the data have other names in the task (`class_names`): {names_here}.")


def check_checkpoint(names: Sequence[str], own: Sequence[str]) -> None:
    """Checks that the classes of a checkpoint are those of the task: another order would be another label.

    Raises:
        ConfigError: If they are not.
    """
    if [*names] != [*own]:
        raise ConfigError(
            f"The checkpoint is of the classes {', '.join(names)}, and here they are {', '.join(own)}. Take the data "
            "that it was trained on; or, if they are the same in this order under other names, set `class_names` of "
            "the task to those of the file."
        )
