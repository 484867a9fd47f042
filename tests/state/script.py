"""Writes a case as a plain script that needs nothing of the judge but the model and the third party's plugins."""

from collections.abc import Callable

from tests.state.checks import DivergenceError
from tests.state.rules import Step
from tests.state.shrink import Case
from tests.state.spec import Spec

_HEADER = """\
import copy, pickle, tempfile
import torch
from lora_plugins import LoraConfig, LoraModel
from tests.state.checks import loss_of
from tests.state.plugins import registry
from tests.state.zoo import batch, build

folder, blocks = tempfile.mkdtemp(), {blocks!r}
torch.manual_seed({seed})
model = build(blocks, {dtype}, seed={seed})
x, tokens = batch({dtype}, {seed})
contexts, kept = [], {{}}
"""

_LINES: dict[str, Callable[..., str]] = {
    "add": lambda name, spec, **_: f"lora = LoraModel(model, {_config(spec)}, {name!r}, registry=registry())",
    "look": lambda spec: f"LoraModel.plan(model, {_config(spec)}, registry=registry())",
    "set": lambda names, trainable=True, weights=None: (
        f"lora.set_adapter({list(names)!r}, weights={weights}, trainable={trainable})"
    ),
    "delete": lambda name: f"lora.delete_adapter({name!r})",
    "merge": lambda names, max_error=0.1: f"lora.merge_adapter({names!r}, max_error={max_error})",
    "unmerge": lambda: "lora.unmerge_adapter()",
    "unload": lambda dequantize=None: f"lora.unload(dequantize={dequantize})",
    "merge_and_unload": lambda max_error=0.1, dequantize=False: (
        f"lora.merge_and_unload(max_error={max_error}, dequantize={dequantize})"
    ),
    "disable": lambda: "contexts.append(lora.disable_adapter()); contexts[-1].__enter__()",
    "mixed": lambda rows: f"contexts.append(lora.mixed_batch({list(rows)!r})); contexts[-1].__enter__()",
    "close": lambda failing=False: (
        f"contexts.pop().__exit__({'KeyError, KeyError(), None' if failing else 'None, None, None'})"
    ),
    "broken_forward": lambda module: f"# a forward that a forward hook of {module!r} stops by an exception",
    "lay_out": lambda channels_last: (
        f"model.to(memory_format=torch.{'channels_last' if channels_last else 'contiguous_format'})"
    ),
    "mode": lambda training: f"model.train({training})",
    "cast": lambda dtype, way="data": (
        ("" if way == "data" else f"torch.__future__.set_{way}_module_params_on_conversion(True)\n")
        + f"model.to(torch.{dtype}); x = x.to(torch.{dtype})"
    ),
    "scramble": lambda name, seed: (
        f"generator, named = torch.Generator().manual_seed({seed}), dict(model.named_parameters())\n"
        "own = sorted(key for key, p in named.items() if p.requires_grad and 'lora_' not in key)\n"
        "with torch.no_grad():\n"
        f"    for key in (*(key for key in named if key.endswith('.{name}')), *own):\n"
        "        values = torch.randn(named[key].shape, generator=generator) * 0.5\n"
        "        named[key].copy_(values + (1 if 'gate' in key or 'magnitude' in key else 0))"
    ),
    "train_step": lambda: (
        "if parameters := [p for p in model.parameters() if p.requires_grad]:\n"
        "    loss_of(model(x, tokens)).backward()\n"
        "    largest = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)\n"
        "    torch.optim.SGD(parameters, lr=0.05 / (1 + largest)).step()\n"
        "    model.zero_grad()"
    ),
    "forward": lambda of_input=True: (
        f"input = x.clone().requires_grad_({of_input}); loss = loss_of(model(input, tokens))"
    ),
    "backward": lambda: "loss.backward()  # then read `.grad` of what was trained at the forward, and of `input`",
    "combine": lambda adapters, weights, name, way="cat": (
        f"lora.add_weighted_adapter({list(adapters)!r}, {list(weights)!r}, {name!r}, {way!r})"
    ),
    "save": lambda slot, name: f"lora.save_adapter(folder + '/{slot}', {name!r})",
    "load": lambda slot, name: (
        f"lora = LoraModel.load_adapter(model, folder + '/{slot}', {name!r}, registry=registry())"
    ),
    "move": lambda slot: (
        f"# a new model with the base of slot {slot}\n"
        f"lora = LoraModel.load_adapter(model, folder + '/{slot}', registry=registry())"
    ),
    "swap": lambda slot, name: f"lora.swap_adapter({name!r}, folder + '/{slot}')",
    "load_base": lambda seed, assign=False: (
        "base = "
        + ("copy.deepcopy(model)" if seed is None else f"build(blocks, x.dtype, seed={seed})")
        + ".state_dict()  # where an adapter has a head or biases of its own, the base's in their place\n"
        + "base = {key: tensor for key, tensor in base.items() if 'lora_' not in key}\n"
        + f"model.load_state_dict(base, assign={assign})"
    ),
    "snap": lambda: "kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}",
    "load_own": lambda assign=False: (
        "own = kept if kept.keys() == model.state_dict().keys() else copy.deepcopy(model.state_dict())\n"
        f"model.load_state_dict(own, assign={assign})"
    ),
    "copy": lambda way, keep: (
        f"other = {'copy.deepcopy(model)' if way == 'deepcopy' else 'pickle.loads(pickle.dumps(model))'}"
        + ("\nmodel, lora = other, LoraModel(other, registry=registry())" if keep == "copy" else "")
    ),
}


def script(case: Case, step: Step, divergence: DivergenceError) -> str:
    """Returns the source of a script."""
    lines = [_HEADER.format(blocks=case.blocks, dtype=case.dtype, seed=case.seed)]
    lines += [_LINES[step.kind](**step.arguments) for step in case.steps]
    lines += [f"# After {step.kind}: {divergence}"]
    return "\n".join(lines) + "\n"


def _config(spec: Spec) -> str:
    return f"LoraConfig({', '.join(f'{key}={value!r}' for key, value in spec.arguments().items())})"
