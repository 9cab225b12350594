"""Names of the encoders and the sizes of image they take. Configuration reads this, so nothing here imports torch."""

import difflib
import re

_NAMES = """
alexnet
convnext_base convnext_large convnext_small convnext_tiny
densenet121 densenet161 densenet169 densenet201
efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7
efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s
googlenet
inception_v3
maxvit_t
mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3
mobilenet_v2 mobilenet_v3_large mobilenet_v3_small
regnet_x_16gf regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf
regnet_y_128gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf regnet_y_8gf
resnet101 resnet152 resnet18 resnet34 resnet50
resnext101_32x8d resnext101_64x4d resnext50_32x4d
shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0
squeezenet1_0 squeezenet1_1
swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t
vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn
vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32
wide_resnet101_2 wide_resnet50_2
"""

TORCHVISION_NAMES = tuple(_NAMES.split())
"""Every classifier of torchvision, by the name that torchvision gives it."""

TIMM_PREFIX = "timm:"
"""What a name of timm's begins with here."""

# Sides in pixels, by the beginning of the name. Networks not listed take any side that a configuration may ask for.
_MULTIPLE_OF_PX = {"maxvit_t": 224, "vit_b_16": 16, "vit_b_32": 32, "vit_h_14": 14, "vit_l_16": 16, "vit_l_32": 32}
_SMALLEST_PX = {"alexnet": 63, "inception_v3": 75}


def check_arch(arch: str) -> str:
    """Return the name of an encoder if there can be one of that name. Whether timm has it is known only where it is built.

    Raises
    ------
    ValueError
        It is neither torchvision's nor `timm:NAME`.
    """
    if arch in TORCHVISION_NAMES or re.fullmatch(re.escape(TIMM_PREFIX) + r"\w[\w.-]*", arch, re.ASCII):
        return arch
    close = difflib.get_close_matches(arch, TORCHVISION_NAMES, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"got {arch!r}, expected a classifier of torchvision, resnet34 for instance, or {TIMM_PREFIX}NAME{hint}")


def check_input_size(arch: str, input_size_px: int) -> None:
    """Check that an encoder takes images of this size.

    Raises
    ------
    ValueError
        It does not; the message names both and says which sizes it takes.
    """
    smallest, step = _SMALLEST_PX.get(arch, 1), _MULTIPLE_OF_PX.get(arch, 1)
    if input_size_px < smallest:
        raise ValueError(f"input_size_px {input_size_px} is too small for arch {arch}: it takes {smallest} px or more")
    if input_size_px % step:
        raise ValueError(f"input_size_px {input_size_px} does not fit arch {arch}: it takes multiples of {step} px")
