"""Pages about runs: the report of one and the comparison of several, as HTML files that need nothing beside them.

They are made from data alone, so that nothing here knows of models or takes long to import.
"""

from lora_plugins.tasks.pages.command import report_main
from lora_plugins.tasks.pages.metric_kinds import kind_of
from lora_plugins.tasks.pages.page import Example, SampleRecord, render_comparison, render_report, render_samples
from lora_plugins.tasks.pages.run_record import (
    ClassResult,
    Costs,
    Metric,
    PlanRow,
    RunRecord,
    as_stored,
    read_run,
    run_as_json,
)

__all__ = [
    "ClassResult",
    "Costs",
    "Example",
    "Metric",
    "PlanRow",
    "RunRecord",
    "SampleRecord",
    "as_stored",
    "kind_of",
    "read_run",
    "render_comparison",
    "render_report",
    "render_samples",
    "report_main",
    "run_as_json",
]
