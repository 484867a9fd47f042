"""All cases by id."""

from tests.modules import (
    anomalib_cases,
    forecasting_cases,
    lightly_cases,
    other_cases,
    routine_cases,
    terratorch_cases,
    torchgeo_cases,
    uq_box_cases,
)

ROOMS = (
    torchgeo_cases,
    anomalib_cases,
    uq_box_cases,
    routine_cases,
    forecasting_cases,
    terratorch_cases,
    lightly_cases,
    other_cases,
)
CASES = {case.id: case for room in ROOMS for case in room.CASES}
