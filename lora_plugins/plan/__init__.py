"""The plan of an adapter: every decision about a model, made and checked before anything is touched.

One walk over the model (`survey`) gives frozen records (`sites`), and the plan is a function of them.
"""

from lora_plugins.plan.groups import LayerGroup
from lora_plugins.plan.named import named_plugins
from lora_plugins.plan.new_layers import forgotten_layers
from lora_plugins.plan.parameter_counts import parameter_counts
from lora_plugins.plan.patterns import exact_expression, exact_pattern, is_risky, matches, shortest_ends
from lora_plugins.plan.plan import Plan
from lora_plugins.plan.planner import make_plan, weights_to_store
from lora_plugins.plan.renamings import current_name, former_names
from lora_plugins.plan.targets import LeftOut

__all__ = [
    "LayerGroup",
    "LeftOut",
    "Plan",
    "current_name",
    "exact_expression",
    "exact_pattern",
    "forgotten_layers",
    "former_names",
    "is_risky",
    "make_plan",
    "matches",
    "named_plugins",
    "parameter_counts",
    "shortest_ends",
    "weights_to_store",
]
