"""lightly: self-supervision as its documentation puts it together, of its heads, losses and memory banks."""

import copy

import torch
from lightning.pytorch import LightningModule
from torch import nn

from tests.modules.case import Case
from tests.modules.data import image, loader

FEATURES = 16


def _backbone() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, FEATURES, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class _Method(LightningModule):
    """A backbone and a head, an optimizer over all of it, and a loss of two views."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _backbone()
        self.build()

    def training_step(self, batch, _):
        loss = self.loss_of(*batch[0])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


class BarlowTwins(_Method):
    def build(self):
        from lightly import loss
        from lightly.models.modules import heads

        self.projection_head = heads.BarlowTwinsProjectionHead(FEATURES, 16, 16)
        self.criterion = loss.BarlowTwinsLoss()

    def loss_of(self, first, second):
        return self.criterion(*(self.projection_head(self.backbone(view)) for view in (first, second)))


class VICReg(BarlowTwins):
    def build(self):
        from lightly import loss
        from lightly.models.modules import heads

        self.projection_head = heads.VICRegProjectionHead(FEATURES, 16, 16, num_layers=2)
        self.criterion = loss.VICRegLoss()


class DCL(BarlowTwins):
    def build(self):
        from lightly import loss
        from lightly.models.modules import heads

        self.projection_head = heads.SimCLRProjectionHead(FEATURES, 16, 8)
        self.criterion = loss.DCLLoss()


class SimSiam(_Method):
    def build(self):
        from lightly import loss
        from lightly.models.modules import heads

        self.projection_head = heads.SimSiamProjectionHead(FEATURES, 16, 16)
        self.prediction_head = heads.SimSiamPredictionHead(16, 8, 16)
        self.criterion = loss.NegativeCosineSimilarity()

    def loss_of(self, first, second):
        z = [self.projection_head(self.backbone(view)) for view in (first, second)]
        p = [self.prediction_head(each) for each in z]
        return 0.5 * (self.criterion(p[0], z[1].detach()) + self.criterion(p[1], z[0].detach()))


class NNCLR(_Method):
    """With a memory bank, which is a buffer."""

    def build(self):
        from lightly import loss
        from lightly.models import modules
        from lightly.models.modules import heads

        self.projection_head = heads.NNCLRProjectionHead(FEATURES, 16, 8)
        self.prediction_head = heads.NNCLRPredictionHead(8, 16, 8)
        self.memory_bank = modules.NNMemoryBankModule(size=(16, 8))
        self.criterion = loss.NTXentLoss()

    def loss_of(self, first, second):
        z = [self.projection_head(self.backbone(view)) for view in (first, second)]
        p = [self.prediction_head(each) for each in z]
        near = [self.memory_bank(z[0].detach(), update=False), self.memory_bank(z[1].detach(), update=True)]
        return 0.5 * (self.criterion(near[0], p[1]) + self.criterion(near[1], p[0]))


class MoCo(_Method):
    """With momentum encoders, and a memory bank in the loss."""

    def build(self):
        from lightly import loss
        from lightly.models import utils
        from lightly.models.modules import heads

        self.projection_head = heads.MoCoProjectionHead(FEATURES, 16, 8)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        utils.deactivate_requires_grad(self.backbone_momentum)
        utils.deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = loss.NTXentLoss(memory_bank_size=(16, 8))

    def loss_of(self, first, second):
        from lightly.models import utils

        utils.update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        utils.update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
        query = self.projection_head(self.backbone(first))
        key = self.projection_head_momentum(self.backbone_momentum(second)).detach()
        return self.criterion(query, key)


class BYOL(_Method):
    def build(self):
        from lightly import loss
        from lightly.models import utils
        from lightly.models.modules import heads

        self.projection_head = heads.BYOLProjectionHead(FEATURES, 16, 8)
        self.prediction_head = heads.BYOLPredictionHead(8, 16, 8)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        utils.deactivate_requires_grad(self.backbone_momentum)
        utils.deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = loss.NegativeCosineSimilarity()

    def loss_of(self, first, second):
        from lightly.models import utils

        utils.update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        utils.update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
        p = [self.prediction_head(self.projection_head(self.backbone(view))) for view in (first, second)]
        z = [self.projection_head_momentum(self.backbone_momentum(view)).detach() for view in (first, second)]
        return 0.5 * (self.criterion(p[0], z[1]) + self.criterion(p[1], z[0]))


class DINO(_Method):
    def build(self):
        from lightly import loss
        from lightly.models import utils
        from lightly.models.modules import heads

        self.student_head = heads.DINOProjectionHead(FEATURES, 16, 8, 16, freeze_last_layer=1)
        self.teacher_backbone = copy.deepcopy(self.backbone)
        self.teacher_head = heads.DINOProjectionHead(FEATURES, 16, 8, 16)
        utils.deactivate_requires_grad(self.teacher_backbone)
        utils.deactivate_requires_grad(self.teacher_head)
        self.criterion = loss.DINOLoss(output_dim=16, warmup_teacher_temp_epochs=1)

    def loss_of(self, first, second):
        from lightly.models import utils

        utils.update_momentum(self.backbone, self.teacher_backbone, m=0.9)
        utils.update_momentum(self.student_head, self.teacher_head, m=0.9)
        teacher = [self.teacher_head(self.teacher_backbone(view)).detach() for view in (first, second)]
        student = [self.student_head(self.backbone(view)) for view in (first, second)]
        return self.criterion(teacher, student, epoch=self.current_epoch)

    def on_after_backward(self):
        self.student_head.cancel_last_layer_gradients(current_epoch=self.current_epoch)


class SwaV(_Method):
    def build(self):
        from lightly import loss
        from lightly.models.modules import heads

        self.projection_head = heads.SwaVProjectionHead(FEATURES, 16, 8)
        self.prototypes = heads.SwaVPrototypes(8, n_prototypes=8)
        self.criterion = loss.SwaVLoss()

    def loss_of(self, first, second):
        self.prototypes.normalize()
        normalize = nn.functional.normalize
        outputs = [normalize(self.projection_head(self.backbone(view)), dim=1) for view in (first, second)]
        return self.criterion([self.prototypes(each) for each in outputs], [])


class TiCo(BYOL):
    def build(self):
        from lightly import loss
        from lightly.models.modules import heads

        super().build()
        self.projection_head = heads.TiCoProjectionHead(FEATURES, 16, 8)
        self.projection_head_momentum = copy.deepcopy(self.projection_head).requires_grad_(False)
        del self.prediction_head
        self.criterion = loss.TiCoLoss()

    def loss_of(self, first, second):
        from lightly.models import utils

        utils.update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        utils.update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
        z = self.projection_head(self.backbone(first))
        return self.criterion(z, self.projection_head_momentum(self.backbone_momentum(second)).detach())


def _views():
    def collate(items):
        return [[torch.stack(views) for views in zip(*items, strict=True)]]

    return loader(lambda at: (image(size=32), image(size=32)), collate=collate)


MOMENTUM = ("backbone_momentum", "projection_head_momentum")
OF = {
    MoCo: MOMENTUM,
    BYOL: MOMENTUM,
    TiCo: MOMENTUM,
    DINO: ("teacher_backbone", "teacher_head"),
}
CONFIGS = {SwaV: {"modules_to_save": ["prototypes"]}}
CASES = [
    Case("lightly", cls.__name__, cls, _views, config=CONFIGS.get(cls, {}), by_hand=OF.get(cls, ()))
    for cls in (BarlowTwins, VICReg, DCL, SimSiam, NNCLR, MoCo, BYOL, DINO, SwaV, TiCo)
]
