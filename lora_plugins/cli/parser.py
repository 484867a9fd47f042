"""The parser of all commands: what is wrong is one message, without the list of all flags."""

import argparse
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from lora_plugins.errors import ConfigError, listing, near


class Parser(argparse.ArgumentParser):
    """A parser that raises what is wrong, with a near match for a flag or a subcommand that does not exist.

    Flags are written whole: `--epoch` is a mistake for `--epochs`, and not short for it.

    Args:
        *args: Those of `argparse.ArgumentParser`.
        elsewhere: By flags that other programs have, or other commands of ours, what to write here.
        **kwargs: Those of `argparse.ArgumentParser`.
    """

    def __init__(self, *args: Any, elsewhere: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._elsewhere = elsewhere or {}

    @property
    def flags(self) -> list[str]:
        """All flags."""
        return [*self._option_string_actions]

    def error(self, message: str) -> NoReturn:
        """Raises the mistake.

        Raises:
            ConfigError: Always.
        """
        unknown = re.search(r"unrecognized arguments: (?:-- )?(\S+)", message)
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.+)\)", message)
        if unknown is not None and unknown[1].startswith("-"):
            flag = unknown[1].partition("=")[0]
            hint = self._elsewhere.get(flag) or _near_flag(flag, self.flags)
            message = f"there is no flag {flag}. {hint}"
            if flag in self.flags:
                message = f"{flag} is no flag behind --; write it before"
        elif unknown is not None:
            message = f"{unknown[1]!r} is one argument too many"
        elif choice is not None:
            message = message.replace(choice[0], f"there is no {choice[1]!r}. {near(choice[1], _words(choice[2]))}")
        elif message.startswith("the following arguments are required"):
            message = f"{message}. {self.prog} --help explains them"
        raise ConfigError(f"{self.prog.partition(' ')[2] or self.prog}: {message}")


def _near_flag(flag: str, known: Iterable[str]) -> str:
    """Returns a sentence that offers near flags; for a letter, those that begin with it."""
    begun = [name for name in known if len(flag) == len("-e") and name.startswith(f"-{flag}")]
    return f"Did you mean {listing(begun)}?" if begun else near(flag, known)


def _words(listed: str) -> list[str]:
    return re.findall(r"[^\s',]+", listed)
