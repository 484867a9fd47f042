"""An init under the name of the built-in default."""

from lora_plugins import InitPlugin, hookimpl


class OtherKaiming(InitPlugin):
    """Claims the name `kaiming`."""

    name = "kaiming"

    def fill(self, context):
        """Fills both factors with zeros."""
        context.A.zero_()
        context.B.zero_()
        return {}


@hookimpl
def lora_plugins_register_inits(registrar):
    """Registers the init."""
    registrar.add(OtherKaiming())
