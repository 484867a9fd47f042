"""What the kit says of plugins that violate its checks."""

import pytest

from lora_plugins.testing import CheckError


def assert_found(name, check):
    """Asserts that a call fails a check, and says what was expected, what came, and, if that is known, the cause."""
    with pytest.raises(CheckError, match=f"fails the check '{name}'") as caught:
        check()
    for part in ("expected:", "came:"):
        assert part in str(caught.value)
    assert ("usual cause:" in str(caught.value)) == ("PluginError:" not in str(caught.value))


def failing(checks, check):
    """The names of checks that a plugin fails; `check` runs the one of a name."""
    found = set()
    for name in checks:
        try:
            check(name)
        except CheckError:
            found.add(name)
    return found


def assert_explained(name, checks, came, cls, check):
    """Asserts that an error has the parts of what it says: the check, the plugin's class, what came, and the cause."""
    with pytest.raises(CheckError) as caught:
        check()
    error = caught.value
    assert came in error.got
    assert (error.check, error.expected) == (name, checks[name].expected)
    for part in (cls.__name__, repr(name), error.expected, error.got, error.usual_cause):
        assert part in str(error)
