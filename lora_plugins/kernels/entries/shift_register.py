"""Random numbers on a CPU, most of which follow from earlier ones by a shift register.

torch's generator makes one number at a time, which is most of the cost of dropout. Here only the first numbers come
from it. The others are `n[i] = n[i - 4423] xor n[i - 4152]` (Lewis and Payne, Journal of the ACM 20, 1973;
`x^4423 + x^271 + 1` is primitive modulo 2: Zierler, Information and Control 15, 1969). Its square says that the lags
may be doubled, so that blocks of numbers grow with what is there. Any two elements of a mask are independent; three are
not where they are just these distances apart, or a power of two times them.
"""

import torch
from torch import Tensor

from lora_plugins.kernels._kernel import Kernel
from lora_plugins.kernels.dropout import random_words

_LONG_LAG, _SHORT_LAG = 4423, 4152


def _is_cpu(count: int, generator: torch.Generator) -> bool:
    return generator.device.type == "cpu"


def shift_register_words(count: int, generator: torch.Generator) -> Tensor:
    """Returns `count` numbers of 64 bits."""
    words = torch.empty(count, dtype=torch.int64, device=generator.device)
    done = min(count, _LONG_LAG)
    words[:done] = random_words.plain(done, generator)
    long_lag, short_lag = _LONG_LAG, _SHORT_LAG
    while done < count:
        if 2 * long_lag <= done:
            long_lag, short_lag = 2 * long_lag, 2 * short_lag
        size = min(count - done, short_lag)
        long, short, new = (words[done - lag : done - lag + size] for lag in (long_lag, short_lag, 0))
        torch.bitwise_xor(long, short, out=new)
        done += size
    return words


KERNELS = (Kernel("shift_register", "random_words", lambda: "", _is_cpu, shift_register_words),)
