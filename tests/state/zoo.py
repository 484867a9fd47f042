"""Small models of parallel blocks, one for each way in which a layer can hold a weight or share it.

Every block reads the same input and gives an output of its own, so that an error of rounding stays one layer deep and
a wrong layer is told by its name. What the reference has to know of a layer is written down here by hand, as `Site`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

ROWS = 3
"""Size of a batch, and so the number of names that `mixed_batch` gets."""


@dataclass(frozen=True)
class Site:
    """A layer that can be adapted.

    Args:
        name: Its full name.
        columns: Whether its weight has the inputs first.
        outputs: Whether each row of its matrix is an output, as variants need them.
        tensors: The attributes that the whole layer's updates go to, with the part each is called by, if any.
        parts: Tensor, first row and end of each part of `fused_parts`.
        biases: What `bias="lora_only"` trains.
        lookup: Whether rows of the weight are looked up by index.
        mixes: Whether rows of a batch may have adapters of their own today; more may in time. Not where it shares its
            weight with a layer of another type.
        drops: Whether it honors dropout; likewise.
        read: Whether its weight is read without calling the layer, where dropout is refused in the backward only.
        computed: Whether the weight is the product of weight norm.
    """

    name: str
    columns: bool = False
    outputs: bool = True
    tensors: Mapping[str, str] = field(default_factory=lambda: {"": "weight"})
    parts: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)
    biases: tuple[str, ...] = ("bias",)
    lookup: bool = False
    mixes: bool = True
    drops: bool = True
    read: bool = False
    computed: bool = False


class Block(nn.Module):
    """A block of the zoo; `sites` are relative to its name."""

    sites: Sequence[Site] = ()
    saves: Sequence[str] = ()
    """What `modules_to_save` may name, relative to the block; an empty name is the block itself."""


class LinearBlock(Block):
    sites = (Site("proj"),)
    saves = ("proj",)

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 3)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.proj(x.view(-1, 3, 4))


class FusedBlock(Block):
    sites = (Site("qkv", parts={"q": ("weight", 0, 2), "k": ("weight", 2, 4), "v": ("weight", 4, 6)}, biases=()),)

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 6, bias=False)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.qkv(x.view(-1, 3, 4))


class Doubled(nn.Linear):
    """A subclass whose forward no plugin knows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class DoubledBlock(Block):
    sites = (Site("proj", mixes=False, drops=False),)

    def __init__(self) -> None:
        super().__init__()
        self.proj = Doubled(4, 2)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.proj(x.view(-1, 3, 4))


class ReadBlock(Block):
    """Hands the weight to torch's function past the layer's forward, as BEiT and Swin do."""

    sites = (Site("proj"),)

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 2)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return F.linear(x.view(-1, 3, 4), self.proj.weight, self.proj.bias)


class ComputedBlock(Block):
    """A weight that weight norm computes."""

    sites = (Site("proj", mixes=False, drops=False, computed=True),)

    def __init__(self) -> None:
        super().__init__()
        self.proj = parametrizations.weight_norm(nn.Linear(4, 2))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.proj(x.view(-1, 3, 4))


class ConvBlock(Block):
    sites = (Site("conv"),)
    saves = ("conv",)

    def __init__(self, conv: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.conv, self.shape = conv, shape

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.conv(x.view(-1, *self.shape))


class TransposedBlock(ConvBlock):
    sites = (Site("conv", columns=True, outputs=False, mixes=False),)


class CenteredConv(nn.Conv1d):
    """A layer that is adapted and has running statistics, as a norm has."""

    def __init__(self) -> None:
        super().__init__(2, 3, 3)
        self.register_buffer("running_mean", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.running_mean
        if self.training:
            mean = x.mean((0, 2))
            with torch.no_grad():
                self.running_mean.lerp_(mean.detach(), 0.1)
        return super().forward(x - mean[:, None])


class CenteredBlock(ConvBlock):
    sites = (Site("conv", mixes=False, drops=False),)

    def __init__(self) -> None:
        super().__init__(CenteredConv(), (2, 6))


class EmbeddingBlock(Block):
    sites = (Site("embed", columns=True, biases=(), lookup=True, drops=False),)
    saves = ("embed",)

    def __init__(self, **options: int | bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4, **options)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.embed(tokens)


class AttentionBlock(Block):
    sites = (
        Site(
            "mha",
            tensors={"": "in_proj_weight"},
            parts={part: ("in_proj_weight", 4 * i, 4 * i + 4) for i, part in enumerate("qkv")},
            biases=("in_proj_bias",),
        ),
        Site("mha.out_proj", mixes=False, read=True),
    )

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        x = x.view(-1, 3, 4)
        return self.mha(x, x, x, need_weights=False)[0]


class CrossBlock(Block):
    """Attention with a projection of its own for query, key and value."""

    sites = (
        Site(
            "mha",
            tensors={part: f"{part}_proj_weight" for part in "qkv"},
            parts={"q": ("q_proj_weight", 0, 4), "k": ("k_proj_weight", 0, 4), "v": ("v_proj_weight", 0, 4)},
            biases=("in_proj_bias",),
            mixes=False,
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(4, 2, kdim=2, vdim=2, batch_first=True)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        other = x.view(-1, 6, 2)
        return self.mha(x.view(-1, 3, 4), other, other, need_weights=False)[0]


class RecurrentBlock(Block):
    """A layer whose kernel reads all of its weights from a list."""

    sites = (
        Site(
            "lstm",
            tensors={part: f"weight_{part}" for part in ("ih_l0", "hh_l0")},
            biases=("bias_ih_l0", "bias_hh_l0"),
            mixes=False,
            drops=False,
        ),
    )
    saves = ("lstm",)

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.lstm(x.view(-1, 3, 4))[0]


class GatedBlock(Block):
    """Gated recurrent units of two layers and both directions, whose weights are not alike."""

    sites = (
        Site(
            "gru",
            tensors={
                f"{kind}_l{layer}{way}": f"weight_{kind}_l{layer}{way}"
                for layer in range(2)
                for way in ("", "_reverse")
                for kind in ("ih", "hh")
            },
            biases=tuple(
                f"bias_{kind}_l{layer}{way}" for layer in range(2) for way in ("", "_reverse") for kind in ("ih", "hh")
            ),
            mixes=False,
            drops=False,
        ),
    )
    saves = ("gru",)

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 2, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.gru(x.view(-1, 3, 4))[0]


class CellBlock(Block):
    """A recurrent layer of one step, without biases."""

    sites = (Site("cell", tensors={"ih": "weight_ih", "hh": "weight_hh"}, biases=(), mixes=False, drops=False),)

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(4, 3, bias=False)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.cell(x[:, :4], torch.tanh(x[:, 4:7]))


class ExtendedBlock(Block):
    """Attention with all options: a key and a value that are parameters, and others of zeros."""

    sites = (
        Site(
            "mha",
            tensors={"": "in_proj_weight"},
            parts={part: ("in_proj_weight", 4 * i, 4 * i + 4) for i, part in enumerate("qkv")},
            biases=("in_proj_bias",),
            mixes=False,
        ),
        Site("mha.out_proj", mixes=False, read=True),
    )
    saves = ("mha.out_proj",)

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        x = x.view(-1, 3, 4).transpose(0, 1)
        mask = torch.ones(3, 3, dtype=torch.bool, device=x.device).triu(1)
        return self.mha(x, x, x, attn_mask=mask)[0].transpose(0, 1)


class TiedBlock(Block):
    """Two layers with one weight."""

    sites = (Site("a"), Site("b"))
    saves = ("b",)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x.view(-1, 3, 4))))


class TokensBlock(Block):
    """An embedding and the output layer that shares its weight."""

    sites = (
        Site("embed", columns=True, biases=(), lookup=True, drops=False),
        Site("out", biases=()),
    )
    saves = ("embed", "out")

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(tokens)))


class TwiceBlock(Block):
    """One layer under two names."""

    sites = (Site("first"),)
    saves = ("again",)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.again(torch.tanh(self.first(x.view(-1, 3, 4))))


class NormBlock(Block):
    """Running statistics between two layers. The large eps keeps small variances from magnifying rounding.

    Nothing has a kink, where rounding decides about a gradient.
    """

    sites = (Site("inner"), Site("outer"))
    saves = ("norm",)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(4, eps=0.5)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.outer(F.gelu(self.norm(self.inner(x.view(-1, 3, 4)).mT).mT))


class GroupBlock(Block):
    """Norms without statistics, whose output a low-memory branch may compute again."""

    sites = (Site("conv"), Site("proj"))
    saves = ("layer",)

    def __init__(self) -> None:
        super().__init__()
        self.group, self.conv = nn.GroupNorm(1, 2, eps=0.5), nn.Conv1d(2, 2, 3, padding=1)
        self.layer, self.proj = nn.LayerNorm(6, eps=0.5), nn.Linear(6, 2)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.proj(self.layer(self.conv(self.group(x.view(-1, 2, 6)))))


class HeadBlock(Block):
    """What `modules_to_save` is for: a head with statistics of its own."""

    sites = (Site("body"),)
    saves = ("head", "head.out", "head.norm")

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.ModuleDict({"norm": nn.BatchNorm1d(4, eps=0.5), "out": nn.Linear(4, 2)})

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.head["out"](self.head["norm"](torch.tanh(self.body(x.view(-1, 3, 4))).mT).mT)


class BilinearBlock(Block):
    """A layer type that a third party's plugin serves."""

    sites = (Site("form", mixes=False),)

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(3, 4, 2)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.form(x[:, :3], x[:, 3:7])


BLOCKS = {
    "linear": LinearBlock,
    "fused": FusedBlock,
    "doubled": DoubledBlock,
    "read": ReadBlock,
    "computed": ComputedBlock,
    "conv1d": lambda: ConvBlock(nn.Conv1d(2, 4, 3, padding=1, groups=2), (2, 6)),
    "conv2d": lambda: ConvBlock(nn.Conv2d(3, 4, 2, stride=2, padding=1), (3, 2, 2)),
    "depthwise": lambda: ConvBlock(nn.Conv2d(3, 3, 3, padding=1, groups=3), (3, 2, 2)),
    "circular": lambda: ConvBlock(nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular", bias=False), (3, 2, 2)),
    "transposed": lambda: TransposedBlock(nn.ConvTranspose1d(2, 4, 3, stride=2, groups=2), (2, 6)),
    "transposed2d": lambda: TransposedBlock(
        nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1, dilation=2), (3, 2, 2)
    ),
    "centered": CenteredBlock,
    "embedding": lambda: EmbeddingBlock(padding_idx=0),
    "frequency": lambda: EmbeddingBlock(scale_grad_by_freq=True),
    "attention": AttentionBlock,
    "cross": CrossBlock,
    "recurrent": RecurrentBlock,
    "recurrent_gated": GatedBlock,
    "recurrent_cell": CellBlock,
    "attention_extended": ExtendedBlock,
    "tied": TiedBlock,
    "tokens": TokensBlock,
    "twice": TwiceBlock,
    "norms": NormBlock,
    "groups": GroupBlock,
    "head": HeadBlock,
    "bilinear": BilinearBlock,
}
"""The blocks by name."""


class Zoo(nn.Module):
    """Blocks side by side."""

    def __init__(self, blocks: Sequence[str]) -> None:
        super().__init__()
        for name in blocks:
            self.add_module(name, BLOCKS[name]())

    def forward(self, x: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return {name: block(x, tokens) for name, block in self.named_children()}


def build(blocks: Sequence[str], dtype: torch.dtype = torch.float64, seed: int = 0) -> Zoo:
    """Makes a model with random weights and statistics, some of whose parameters are frozen by the user."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Zoo(blocks)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        for parameter in model.parameters():
            parameter.requires_grad_(bool(torch.rand(()) < 0.8))
    return model.to(dtype).eval()


def sites(model: Zoo) -> dict[str, Site]:
    """What is known of the layers of a model, by full name and in its order."""
    found = {}
    for block, module in model.named_children():
        for site in module.sites:
            facts = {key: getattr(site, key) for key in site.__dataclass_fields__}
            found[f"{block}.{site.name}"] = Site(**facts | {"name": f"{block}.{site.name}"})
    return found


def saves(model: Zoo) -> list[str]:
    """What `modules_to_save` may name in a model."""
    return [f"{block}.{name}" for block, module in model.named_children() for name in module.saves]


def batch(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An input of a zoo; tokens include the padding index."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 12, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 5, (ROWS, 3), generator=generator)
    tokens[0, 0] = 0
    return x.to(dtype), tokens
