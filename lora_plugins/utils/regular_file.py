"""Files that can be read to their end."""

from pathlib import Path


def check_regular(path: Path) -> None:
    """Checks that a path is no pipe, device or socket, which may never end; links are followed.

    Raises:
        OSError: If it is one. What is not there at all is left to whoever opens it.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(f"{path} is not a regular file")
