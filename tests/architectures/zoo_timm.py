"""Architectures of timm, small."""

from __future__ import annotations

from typing import Any

from torch import nn

from .architecture import Architecture, images


def timm_model(name: str, size: int = 32, **options: Any) -> dict[str, Any]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=5, **options)

    return {"build": build, "batch": images(size)}


def _mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer  # create_model makes it in one width, 18 million weights

    return MlpMixer(num_classes=5, img_size=64, patch_size=32, num_blocks=8, embed_dim=64)


_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
_SWIN = {
    "img_size": 64,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
}

TIMM = {
    "vit": Architecture(**timm_model("vit_tiny_patch16_224", 16, **_VIT), quick=True),
    "deit3": Architecture(**timm_model("deit3_small_patch16_224", 16, **_VIT)),
    "vit_siglip": Architecture(**timm_model("vit_base_patch16_siglip_224", 16, **_VIT)),
    "vit_dinov3": Architecture(**timm_model("vit_small_patch16_dinov3", 16, **_VIT)),
    "vit_relpos": Architecture(**timm_model("vit_relpos_small_patch16_224", 16, **_VIT)),
    "beit": Architecture(**timm_model("beit_base_patch16_224", 16, **_VIT), quick=True),
    "beitv2": Architecture(**timm_model("beitv2_base_patch16_224", 16, **_VIT)),
    "eva02": Architecture(**timm_model("eva02_tiny_patch14_224", 16, **_VIT), quick=True),
    "eva02_base": Architecture(**timm_model("eva02_base_patch14_224", 16, **_VIT)),
    "swin": Architecture(**timm_model("swin_tiny_patch4_window7_224", 64, **_SWIN)),
    "swinv2": Architecture(**timm_model("swinv2_tiny_window8_256", 64, **_SWIN), quick=True),
    "maxvit": Architecture(
        **timm_model("maxvit_pico_rw_256", 64, img_size=64, embed_dim=(32, 64), depths=(1, 1), stem_width=16)
    ),
    "coatnet": Architecture(
        **timm_model(
            "coatnet_pico_rw_224",
            64,
            img_size=64,
            embed_dim=(32, 32, 64, 64),
            depths=(1, 1, 1, 1),
            stem_width=16,
        )
    ),
    "convnext": Architecture(
        **timm_model("convnext_atto", 64, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)), quick=True
    ),
    "convnextv2": Architecture(
        **timm_model("convnextv2_atto", 64, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
    ),
    "resnet": Architecture(**timm_model("resnet10t", 64)),
    "resnext": Architecture(**timm_model("resnext26ts", 64)),
    "resnetv2_stdconv": Architecture(
        **timm_model("resnetv2_50x1_bit", 48, channels=(128, 128, 256, 256), stem_chs=32), quick=True
    ),
    "nfnet": Architecture(**timm_model("nfnet_l0", 64), large=True),
    "efficientnet": Architecture(**timm_model("efficientnet_b0", 64)),
    "tf_efficientnet": Architecture(**timm_model("tf_efficientnet_lite0", 64)),
    "mobilenetv3": Architecture(**timm_model("mobilenetv3_small_050", 64), quick=True),
    "mobilenetv4_hybrid": Architecture(
        **timm_model("mobilenetv4_hybrid_medium", 64),
        tolerances={
            "autocast": (3.0, "1.4 times over eight draws; 1×1 layers round weight and update apart")
        },
    ),
    "regnet": Architecture(**timm_model("regnety_002", 64)),
    "densenet": Architecture(**timm_model("densenet121", 64, block_config=(2, 2, 2, 2))),
    "repvgg": Architecture(**timm_model("repvgg_a0", 64), large=True),
    "hrnet": Architecture(**timm_model("hrnet_w18_small", 64), large=True),
    "mixer": Architecture(_mixer, images(64), quick=True),
    "gmlp": Architecture(**timm_model("gmlp_s16_224", img_size=32)),
    "convmixer": Architecture(**timm_model("convmixer_768_32")),
    "hybrid": Architecture(
        **timm_model("vit_tiny_r_s16_p8_224", 64, img_size=64, embed_dim=32, depth=2, num_heads=2)
    ),
    "hiera": Architecture(**timm_model("hiera_tiny_224", 64, img_size=64, embed_dim=16, stages=(1, 1, 1, 1))),
    "levit": Architecture(
        **timm_model(
            "levit_128s", 64, img_size=64, embed_dim=(32, 48, 64), depth=(1, 1, 1), num_heads=(2, 2, 2)
        )
    ),
    "xcit": Architecture(**timm_model("xcit_nano_12_p16_224", img_size=32, depth=2, cls_attn_layers=1)),
    "cait": Architecture(**timm_model("cait_xxs24_224", img_size=32, embed_dim=32, depth=2, num_heads=2)),
    "davit": Architecture(
        **timm_model("davit_tiny", 64, depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 2))
    ),
    "edgenext": Architecture(
        **timm_model("edgenext_xx_small", 64),
        tolerances={"autocast": (3.0, "weight and update are rounded apart, then divided by small norms")},
    ),
    "mobilevit": Architecture(**timm_model("mobilevit_xxs", 64)),
    "pvt_v2": Architecture(**timm_model("pvt_v2_b0", 64, depths=(1, 1, 1, 1))),
    "poolformer": Architecture(**timm_model("poolformer_s12", 64), large=True),
    "mvitv2": Architecture(**timm_model("mvitv2_tiny", 64, img_size=64), large=True),
    "fastvit": Architecture(**timm_model("fastvit_t8", 64)),
    "focalnet": Architecture(**timm_model("focalnet_tiny_srf", 64), large=True),
    "caformer": Architecture(**timm_model("caformer_s18", 64), large=True),
    "vgg": Architecture(**timm_model("vgg11", 32), large=True),
}
