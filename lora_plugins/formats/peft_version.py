"""The version of PEFT that wrote a config, which says it since PEFT 0.18."""

from packaging.version import InvalidVersion, Version


def version_of(said: object) -> Version | None:
    """Returns the version that a config names as its `peft_version`; None if that is not a version.

    A version that is not a release ends with its commit: `0.20.1.dev0@0a1b2c3`.
    """
    try:
        return Version(str(said).partition("@")[0])
    except InvalidVersion:
        return None
