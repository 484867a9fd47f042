"""Functions under `torch.compile`, in one graph that takes operators as often as expected."""

import torch

EQUAL = {"rtol": 1e-13, "atol": 1e-13}


class Graphs:
    """A backend that keeps its graphs; they run operation by operation, so that random numbers are those of eager mode.

    Attributes:
        found: The graphs.
    """

    def __init__(self) -> None:
        self.found: list[torch.fx.GraphModule] = []

    def __call__(self, graph, inputs):
        self.found.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    @property
    def operators(self) -> int:
        """How often the graphs call an operator of this project."""
        called = [str(node.target) for graph in self.found for node in graph.graph.nodes]
        return sum(target.startswith("lora_plugins.") for target in called)


def compiled(function, expected: int = 1):
    """Compiles without breaks, and tells whether operators were taken as often as expected."""
    graphs = Graphs()
    run = torch.compile(function, backend=graphs, fullgraph=True)

    def checked(*inputs):
        output = run(*inputs)
        assert graphs.operators == expected
        return output

    return checked


def both(function, inputs, needed=None, dtype=None, expected=1, loss=lambda output: output.sin().sum()):
    """Output and gradients, compiled and eager, with the same random numbers.

    Args:
        function: What is computed.
        inputs: Its tensors.
        needed: Which of them have a gradient; None for all.
        dtype: Of autocast; None for none.
        expected: How often a graph takes an operator.
        loss: Of the output.
    """
    found = []
    wanted = [tensor for i, tensor in enumerate(inputs) if needed is None or i in needed]
    for run in (compiled(function, expected), function):
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            output = run(*inputs)
        found.append([output, *torch.autograd.grad(loss(output), wanted)])
    return found
