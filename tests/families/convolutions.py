"""Cases of convolutions, plain and transposed."""

from torch import nn

from .case import Case, grow

CONV = {
    "Conv1d": Case(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), ((2, 4, 9),)),
    "Conv1d-same-circular": Case(
        lambda: nn.Conv1d(4, 6, 4, dilation=2, padding="same", padding_mode="circular"), ((2, 4, 9),)
    ),
    "Conv1d-groups": Case(
        lambda: nn.Conv1d(4, 6, 3, groups=2, padding="valid", bias=False), ((2, 4, 9),), options={"rank": 3}
    ),
    "Conv1d-depthwise": Case(lambda: nn.Conv1d(4, 4, 3, groups=4, padding="same"), ((2, 4, 9),)),
    "Conv1d-unbatched": Case(lambda: nn.Conv1d(4, 6, 3), ((4, 9),), batch=None),
    "Conv1d-dora": Case(lambda: nn.Conv1d(4, 6, 3, padding=1), ((2, 4, 9),), options={"use_dora": True}),
    "Conv2d": Case(lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0)), ((2, 3, 7, 6),)),
    "Conv2d-1x1": Case(lambda: nn.Conv2d(3, 5, 1, bias=False), ((2, 3, 4, 4),)),
    "Conv2d-same-reflect": Case(
        lambda: nn.Conv2d(3, 5, (3, 4), padding="same", dilation=(1, 2), padding_mode="reflect"),
        ((2, 3, 8, 8),),
    ),
    "Conv2d-replicate": Case(
        lambda: nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="replicate"), ((2, 3, 6, 6),)
    ),
    "Conv2d-circular-groups": Case(
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2), ((2, 4, 6, 6),)
    ),
    "Conv2d-groups": Case(
        lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2), ((2, 4, 6, 6),), options={"rank": 3}
    ),
    "Conv2d-groups-dora": Case(
        lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), ((2, 4, 7, 7),), options={"use_dora": True}
    ),
    "Conv2d-groups-rslora": Case(
        lambda: nn.Conv2d(4, 6, 3, groups=2), ((2, 4, 6, 6),), options={"use_rslora": True}
    ),
    "Conv2d-depthwise": Case(
        lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), ((2, 6, 5, 5),), options={"rank": 5}
    ),
    "Conv2d-depthwise-twice": Case(
        lambda: nn.Conv2d(3, 6, 3, groups=3, stride=2, padding=1, padding_mode="reflect"), ((2, 3, 6, 6),)
    ),
    "Conv2d-depthwise-dora": Case(
        lambda: nn.Conv2d(6, 6, 3, groups=6), ((2, 6, 5, 5),), options={"use_dora": True}
    ),
    "Conv2d-one-channel": Case(lambda: nn.Conv2d(1, 5, 3), ((2, 1, 5, 5),)),
    "Conv2d-unbatched": Case(lambda: nn.Conv2d(4, 6, 3, groups=2), ((4, 6, 6),), batch=None),
    "Conv2d-unbatched-dora": Case(
        lambda: nn.Conv2d(4, 6, 3), ((4, 6, 6),), batch=None, options={"use_dora": True}
    ),
    "Conv3d": Case(lambda: nn.Conv3d(2, 4, (1, 3, 2), stride=(1, 2, 1)), ((2, 2, 3, 6, 5),)),
    "Conv3d-same": Case(
        lambda: nn.Conv3d(2, 4, 3, padding="same", padding_mode="replicate"), ((2, 2, 3, 4, 4),)
    ),
    "Conv3d-groups": Case(
        lambda: nn.Conv3d(4, 6, 2, groups=2, padding=1, padding_mode="circular", bias=False),
        ((2, 4, 3, 4, 3),),
    ),
    "Conv3d-depthwise": Case(lambda: nn.Conv3d(3, 3, 3, groups=3, padding=1), ((2, 3, 3, 4, 3),)),
    "Conv3d-unbatched-dora": Case(
        lambda: nn.Conv3d(2, 4, 2), ((2, 3, 4, 3),), batch=None, options={"use_dora": True}
    ),
}

TRANSPOSED = {
    "ConvTranspose1d": Case(
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), ((2, 4, 5),)
    ),
    "ConvTranspose1d-groups": Case(
        lambda: nn.ConvTranspose1d(6, 9, 4, groups=3, dilation=2, bias=False), ((2, 6, 5),)
    ),
    "ConvTranspose1d-unbatched": Case(lambda: nn.ConvTranspose1d(4, 6, 3), ((4, 5),), batch=None),
    "ConvTranspose2d": Case(
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), output_padding=(1, 0)), ((2, 4, 3, 4),)
    ),
    "ConvTranspose2d-groups": Case(
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1),
        ((2, 4, 4, 4),),
        options={"use_rslora": True},
    ),
    "ConvTranspose2d-depthwise": Case(
        lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), ((2, 4, 3, 3),), options={"rank": 1}
    ),
    "ConvTranspose2d-output-size": Case(
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), ((2, 4, 3, 4),), grow
    ),
    "ConvTranspose2d-unbatched": Case(
        lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), ((4, 3, 3),), batch=None
    ),
    "ConvTranspose3d": Case(
        lambda: nn.ConvTranspose3d(2, 4, (1, 3, 2), stride=2, output_padding=(0, 1, 1)), ((2, 2, 2, 3, 2),)
    ),
    "ConvTranspose3d-groups": Case(
        lambda: nn.ConvTranspose3d(4, 6, 2, groups=2, dilation=(1, 2, 1)), ((2, 4, 2, 2, 2),)
    ),
}
