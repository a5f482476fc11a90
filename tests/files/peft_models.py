"""Small models with random weights that are adapted here and by PEFT."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def timm_vit() -> nn.Module:
    import timm

    options = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **options)


def timm_resnet() -> nn.Module:
    import timm

    return timm.create_model("resnet10t", channels=[8, 8, 16, 16], num_classes=3)


def torchvision_resnet() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(num_classes=3)


def torchvision_vit() -> nn.Module:
    import torchvision

    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=3
    )


def wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    return Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=12, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
        )
    )  # fmt: skip


def hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16,
            patch_size=8, num_labels=3,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=32, num_labels=3,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    """Its linear layers are transformers' Conv1D, with weights of (in, out)."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=50, n_positions=32, n_embd=24, n_layer=2, n_head=2, num_labels=3, pad_token_id=0
        )
    )  # fmt: skip


class Convolutions(nn.Module):
    """One, two and three dimensions, with what PEFT carries over: strides, padding by number or "same"."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding="same")
        self.two = nn.Conv2d(6, 8, (3, 1), stride=2, padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.three = nn.Conv3d(8, 6, 2)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).unsqueeze(2).expand(-1, -1, 5, -1)  # (batch, 6, 5, time)
        x = self.point(self.two(x)).unsqueeze(2).expand(-1, -1, 3, -1, -1)
        return self.head(self.norm(self.three(x).mean((2, 3, 4))))


def images(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size)


def tokens() -> Tensor:
    return torch.randint(1, 50, (2, 9))


BATCHES: dict[Callable[[], nn.Module], Callable[[], Tensor]] = {
    timm_vit: images,
    timm_resnet: lambda: images(48),
    torchvision_resnet: lambda: images(48),
    torchvision_vit: images,
    wav2vec2: lambda: torch.randn(2, 800),
    hf_vit: images,
    bert: tokens,
    gpt2: tokens,
    Convolutions: lambda: torch.randn(2, 4, 8),
}


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of a model of any of the libraries, in eval mode."""
    with torch.no_grad():
        y = model.eval()(x)
    return y if isinstance(y, Tensor) else y.logits


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """The same base each time; biases and statistics away from their trivial values."""
    torch.manual_seed(3)
    model = build()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.add_(0.1 * torch.rand_like(tensor), alpha=1 if "var" not in name else 2)
    return model


def shaken(model: nn.Module) -> nn.Module:
    """Every trainable parameter moved, and running statistics that are not frozen."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
