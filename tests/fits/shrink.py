"""Makes a fit as plain as it can be while its two sides still differ."""

from collections.abc import Iterator
from dataclasses import fields, replace

from tests.fits.compare import judge
from tests.fits.draw import Fit, limited


def shrink(fit: Fit, kind: str) -> Fit:
    """Returns the plainest fit that was found with the same kind of verdict."""
    for plainer in plainer_fits(fit):
        if judge(plainer).kind == kind:
            return shrink(plainer, kind)
    return fit


def plainer_fits(fit: Fit) -> Iterator[Fit]:
    """Yields the fit with one setting at its default, and with what follows from it."""
    plain = Fit()
    for field in fields(fit):
        default = getattr(plain, field.name)
        plainer = limited(replace(fit, **{field.name: default}))
        if getattr(fit, field.name) != default == getattr(plainer, field.name):
            yield plainer
