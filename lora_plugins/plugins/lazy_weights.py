"""The weights that a branch is handed where some of them are stored: made dense when they are asked for."""

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor


class LazyWeights(Mapping[str, Tensor]):
    """A mapping of attribute names to weights, of which single rows can be had."""

    @abstractmethod
    def rows(self, name: str, index: Tensor) -> Tensor:
        """Returns rows of a weight, for any shape of indices, without making the others dense.

        Args:
            name: Attribute name of the weight.
            index: Numbers of rows.
        """
