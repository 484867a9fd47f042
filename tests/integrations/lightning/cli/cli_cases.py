"""What the tests of the commands share."""

TOYS = "tests.integrations.lightning.toys"


def checkpoint(tmp_path) -> str:
    return str(next((tmp_path / "checkpoints").glob("*.ckpt")))
