import gc
import weakref

import pytest
import torch

from lora_plugins.utils import without_hooks_of_others


class TestWithoutHooksOfOthers:
    def test_hooks_around_see_nothing(self):
        seen, x = [], torch.randn(3, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(seen.append, lambda _: x), without_hooks_of_others():
            output = x.sin()
        (found,) = torch.autograd.grad(output.sum(), x)
        assert not seen
        torch.testing.assert_close(found, x.detach().cos())

    def test_a_saved_output_is_freed_without_a_backward(self):
        x = torch.randn(3, requires_grad=True)
        with without_hooks_of_others():
            output = weakref.ref(x.sigmoid())
        gc.collect()
        assert output() is None

    def test_a_change_in_place_is_refused(self):
        x, factor = torch.randn(3, requires_grad=True), torch.randn(3)
        with without_hooks_of_others():
            output = x * factor
        factor.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()

    def test_hooks_may_be_forbidden(self):
        with torch.autograd.graph.disable_saved_tensors_hooks("forbidden"), without_hooks_of_others():
            torch.randn(3, requires_grad=True).sin().sum().backward()
