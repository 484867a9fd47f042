"""One model of every module of timm: the smallest one registered, shallower and at a smaller size where it allows."""

from collections.abc import Mapping
from typing import Any

import timm
import torch

from benchmarks.exactness.cases import Case

SIZE = 64
CLASSES = 7

_D2: dict[str, Any] = {"depth": 2}
_D4: dict[str, Any] = {"depths": (1, 1, 1, 1)}
_L4: dict[str, Any] = {"layers": (1, 1, 1, 1)}
_IMG: dict[str, Any] = {"img_size": SIZE}

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "beit": ("beit_base_patch16_224", _D2 | _IMG),
    "byoanet": ("halonet_h1", {}),
    "byobnet": ("test_byobnet", {}),
    "cait": ("cait_xxs24_224", _D2 | _IMG),
    "coat": ("coat_tiny", _IMG),
    "convit": ("convit_tiny", _D2 | _IMG),
    "convmixer": ("convmixer_768_32", {}),
    "convnext": ("test_convnext", _D4),
    "cpubone": ("cpubone_nano", {}),
    "crossvit": ("crossvit_tiny_240", {}),
    "csatv2": ("csatv2", {}),
    "cspnet": ("cs3darknet_focus_s", {}),
    "cspnext": ("cspnext_tiny", _D4),
    "davit": ("davit_tiny", _D4),
    "deepseek_vit": ("deepseek_vit_412m", _D2),
    "deit": ("deit_tiny_distilled_patch16_224", _D2 | _IMG),
    "densenet": ("densenet121", {}),
    "dla": ("dla46x_c", {}),
    "dpn": ("dpn48b", {}),
    "edgenext": ("edgenext_xx_small", _D4),
    "efficientformer": ("efficientformer_l1", _D4),
    "efficientformer_v2": ("efficientformerv2_s0", _D4 | _IMG),
    "efficientnet": ("test_efficientnet", {}),
    "efficientvim": ("efficientvim_m1", {}),
    "efficientvit_mit": ("efficientvit_b0", _D4),
    "efficientvit_msra": ("efficientvit_m0", {}),
    "eva": ("eva02_tiny_patch14_224", _D2 | {"img_size": 56}),
    "fasternet": ("fasternet_t0", _D4),
    "fastvit": ("fastvit_t8", _L4),
    "focalnet": ("focalnet_tiny_srf", {}),
    "gcvit": ("gcvit_xxtiny", _IMG),
    "gemma4_vit": ("gemma4_vit_167m", _D2),
    "ghostnet": ("ghostnet_050", {}),
    "hardcorenas": ("hardcorenas_b", {}),
    "hgnet": ("hgnetv2_b0", {}),
    "hiera": ("hiera_tiny_224", _IMG),
    "hieradet_sam2": ("sam2_hiera_tiny", {}),
    "hrnet": ("hrnet_w18_small", {}),
    "iformer": ("iformer_t", {}),
    "inception_next": ("inception_next_atto", _D4),
    "inception_resnet_v2": ("inception_resnet_v2", {}),
    "inception_v3": ("inception_v3", {}),
    "inception_v4": ("inception_v4", {}),
    "lcnetv2": ("lcnetv2_small", _D4),
    "levit": ("levit_128s", _IMG),
    "lowformer": ("lowformer_b0", {}),
    "mambaout": ("test_mambaout", _D4),
    "maxxvit": ("test_maxvit", _IMG),
    "metaformer": ("poolformerv2_s12", {}),
    "mlp_mixer": ("gmlp_ti16_224", _IMG),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
    "mobilenetv5": ("mobilenetv5_base", {}),
    "mobilevit": ("mobilevit_xxs", {}),
    "mvitv2": ("mvitv2_tiny", {}),
    "naflexvit": ("naflexvit_base_patch16_gap", _D2),
    "nasnet": ("nasnetalarge", {}),
    "nest": ("nest_tiny", {"img_size": 128}),
    "nextvit": ("nextvit_small", {}),
    "nfnet": ("test_nfnet", _D4),
    "pit": ("pit_ti_224", _IMG),
    "pnasnet": ("pnasnet5large", {}),
    "pvt_v2": ("pvt_v2_b0", _D4),
    "qwen3_vit": ("qwen3_vit_88m", _D2),
    "rdnet": ("rdnet_tiny", {}),
    "regnet": ("regnety_002", {}),
    "repghost": ("repghostnet_050", {}),
    "repvit": ("repvit_m1", {}),
    "res2net": ("res2next50", _L4),
    "resnest": ("resnest14d", {}),
    "resnet": ("test_resnet", _L4),
    "resnetv2": ("resnetv2_18", _L4),
    "rexnet": ("rexnet_100", {}),
    "selecsls": ("selecsls42", {}),
    "senet": ("legacy_seresnet18", _L4),
    "sequencer": ("sequencer2d_s", _L4),
    "shvit": ("shvit_s1", {}),
    "sknet": ("skresnet18", _L4),
    "starnet": ("starnet_s050", _D4),
    "swiftformer": ("swiftformer_xs", _L4),
    "swin_transformer": ("swin_tiny_patch4_window7_224", _D4 | _IMG),
    "swin_transformer_v2": ("swinv2_tiny_window16_256", _D4 | _IMG),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", _D4 | _IMG),
    "tiny_vit": ("tiny_vit_5m_224", _D4),
    "tnt": ("tnt_s_legacy_patch16_224", _D2 | _IMG),
    "tresnet": ("tresnet_m", _L4),
    "twins": ("twins_svt_small", _D4),
    "vgg": ("vgg11", {"mlp_ratio": 0.03}),
    "visformer": ("visformer_tiny", _D2 | _IMG),
    "vision_transformer": ("test_vit", _D2 | _IMG),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", _D2 | _IMG),
    "vision_transformer_relpos": ("test_vit_relpos", _D2 | _IMG),
    "vision_transformer_sam": ("samvit_base_patch16_224", _D2),
    "vitamin": ("vitamin_small_224", _D2 | _IMG),
    "volo": ("volo_d1_224", _IMG),
    "vovnet": ("ese_vovnet19b_slim_dw", {}),
    "xception": ("legacy_xception", {}),
    "xception_aligned": ("xception41p", {}),
    "xcit": ("xcit_nano_12_p8_224", _D2),
}
"""Module of timm: name of the model, and options of its constructor."""

SIZES: Mapping[str, int] = {
    "byoanet": 256,  # its halo attention divides the size into blocks of 8 at stride 32
    "crossvit": 240,
    "deepseek_vit": 224,
    "efficientformer": 224,
    "eva": 56,
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "inception_v4": 96,
    "nasnet": 96,
    "nest": 128,
    "pnasnet": 96,
}
"""Input sizes other than `SIZE`, where the model allows none or has a stride that does not divide it."""


def timm_cases() -> list[Case]:
    """Returns the cases, named by module and model."""
    return [_case(module, *MODELS[module], SIZES.get(module, SIZE)) for module in MODELS]


def _case(module: str, model: str, options: Mapping[str, Any], size: int) -> Case:
    return Case(
        suite="timm",
        name=f"{module}: {model}",
        build=lambda: timm.create_model(model, num_classes=CLASSES, **options),
        run=lambda network: network(torch.randn(1, 3, size, size)),
    )
