"""Notes on errors of a run that say what about adapters may have caused them."""

import re
from traceback import extract_tb

_MERGED = (
    "The adapter was saved and merged before this, in on_fit_end of the LoraCallback, and the module has no A and B "
    "any more. A callback behind it, as every ModelCheckpoint is, loads values of the training there: let it do so in "
    "on_train_end, which comes before; or give the LoraCallback merge_on_fit_end=False, and merge after fit, by "
    "LoraModel(module).merge_and_unload()."
)

_OF_PLAIN_NETWORKS = ("Unexpected key(s)", ".lora_A")
"""Words of the error that torch raises where a network that is not adapted is to take the state of one that is."""

_NO_GRADIENT = (
    "If it is the gradient of a parameter: the base is frozen, and the `grad` of a frozen parameter is None. Leave "
    "those out (`if p.grad is not None`), or name their modules in modules_to_save to train them in full."
)

_READS_GRADIENT = re.compile(r"\bgrad(?:s|ients?)?\b|\bgrad_")
"""What a line has that does something with gradients; `no_grad` and `grader` are none."""

_OF_TORCH = {
    "non-leaf Tensor": (
        "The weight of an adapted layer, as in AdamW([self.head.weight]), is computed from the base and the adapter. "
        "Give the optimizer self.head.parameters(), or name the layer in modules_to_save to train it in full."
    ),
    # A gradient with respect to a tensor that is frozen, or on no way to the loss.
    "differentiated Tensor": (
        "If the gradient is one with respect to the weight of a layer, as in the adaptive weight of an adversarial "
        "loss (VQGAN): an adapted layer computes its weight anew at each reading, and that of a layer left out is "
        "frozen. Name that layer in modules_to_save, so that its weight is trained in full. If it is one with respect "
        "to all parameters of a block, as in the gradient checkpointing of ldm and guided-diffusion: turn that off, or "
        "hand it only the parameters that require a gradient."
    ),
    "does not require grad and does not have a grad_fn": (
        "Nothing that this loss depends on is trained. A head, or a network with a loss of its own, such as a "
        "discriminator, is frozen unless target_modules or modules_to_save name it. If the loss depends on adapters: "
        "the module may compute them under torch.no_grad(), or detach what they give; and gradient checkpointing that "
        "is reentrant drops their gradients where its input needs none: pass use_reentrant=False to "
        "torch.utils.checkpoint."
    ),
    "in more than one parameter group": (
        "If the module gives its optimizer a part that it has kept frozen so far: A and B of it are there from the "
        "start, and the base stays frozen. Leave that step out."
    ),
}
"""What may have caused an error of torch, by words of it."""


def explain_merged_module(error: BaseException) -> None:
    """Adds a note to an error about keys of an adapter, which a merged module does not have any more."""
    if ".lora_" in str(error):
        _add(_MERGED, error)


def explain_plain_network(error: BaseException) -> None:
    """Adds a note to an error of a network or a table without A and B that was handed those of an adapted one."""
    if all(word in str(error) for word in _OF_PLAIN_NETWORKS):
        _add(
            "If an adapted network gives its state to another one, such as the target network of a DQN or an average, "
            "adapt that one too: let `target` hold both, and name the layers of both in target_modules.",
            error,
        )
    elif isinstance(error, KeyError) and ".lora_" in str(error):
        _add(
            "A table by the names of parameters, as an average of the module keeps one, has no A and B if it was made "
            "before there were adapters. Make it in on_fit_start.",
            error,
        )


def explain_error_of_torch(error: BaseException) -> None:
    """Adds notes to an error of torch about a parameter that an optimizer does not take, or a missing gradient."""
    said = f"{error} {error.__context__}"  # which the module may have caught
    for words, note in _OF_TORCH.items():
        if words in said:
            _add(note, error)


def explain_missing_gradient(error: BaseException) -> None:
    """Adds a note to an error about a None where a line does something with gradients."""
    if isinstance(error, AttributeError | TypeError) and "NoneType" in str(error):
        lines = (frame.line or "" for frame in extract_tb(error.__traceback__))
        if any(map(_READS_GRADIENT.search, lines)):
            _add(_NO_GRADIENT, error)


def _add(note: str, error: BaseException) -> None:
    """Adds a note once, however many callbacks see the error."""
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)
