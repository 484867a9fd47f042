"""The plan of an adapter: every decision about a model, made and checked before anything is touched.

One walk over the model (`survey`) gives frozen records, and the plan is a function of them.
"""

from lora_plugins.plan.patterns import exact_expression, exact_pattern
from lora_plugins.plan.plan import Plan
from lora_plugins.plan.planner import make_plan

__all__ = ["Plan", "exact_expression", "exact_pattern", "make_plan"]
