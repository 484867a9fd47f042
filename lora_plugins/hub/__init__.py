"""Adapters on the Hugging Face Hub: found by `hf://owner/name`, and pushed with a model card.

huggingface_hub, the extra `hub`, is imported where it is used.
"""

from lora_plugins.hub.download import located
from lora_plugins.hub.model_card import CardContent, model_card
from lora_plugins.hub.upload import push

__all__ = ["CardContent", "located", "model_card", "push"]
