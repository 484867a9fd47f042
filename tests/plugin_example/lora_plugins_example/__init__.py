"""A plugin for lora_plugins: LoRA on `torch.nn.Bilinear`, and factors that start orthogonal."""

from collections.abc import Mapping

from torch import Tensor, nn

from lora_plugins import ConfigError, InitContext, InitPlugin, RowMajorPlugin, hookimpl


class BilinearPlugin(RowMajorPlugin):
    """`torch.nn.Bilinear`: y = x1ᵀ W x2 + b, with W of shape (out, in1, in2)."""

    name = "bilinear"
    module_type = nn.Bilinear


class OrthogonalInit(InitPlugin):
    """An identity whose random factor has orthogonal rows or columns. Option: `gain`, its singular values."""

    name = "orthonormal"
    options = {"gain": 1.0}  # noqa: RUF012  (read only)

    def check_options(self, options):
        """Refuses a gain that would leave both factors zero."""
        if options["gain"] == 0:
            raise ConfigError("init_options: gain of orthonormal is 0, so nothing would ever be trained.")

    def fill(self, context: InitContext) -> Mapping[str, Tensor]:
        """Fills one factor with an orthogonal matrix and the other with zeros."""
        random, zero = (context.B, context.A) if context.lookup else (context.A, context.B)
        nn.init.orthogonal_(random, gain=context.options["gain"], generator=context.generator)
        nn.init.zeros_(zero)
        return {}


@hookimpl
def lora_plugins_register_layers(registrar):
    """Registers the layer type."""
    registrar.add(BilinearPlugin())


@hookimpl
def lora_plugins_register_inits(registrar):
    """Registers the init."""
    registrar.add(OrthogonalInit())
