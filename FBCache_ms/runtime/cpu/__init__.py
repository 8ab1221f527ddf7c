"""What MindSpore's CPU backend lacks, put in its place; nothing here is imported on Ascend."""

from ...models.mindones import by_known_author
from . import encoders, flux, flux2, kernels, qwenimage, stand_ins

STAND_INS = stand_ins.STAND_INS + flux.STAND_INS + flux2.STAND_INS + qwenimage.STAND_INS + encoders.STAND_INS
FUSED_STAND_INS = stand_ins.FUSED_STAND_INS + flux.FUSED_STAND_INS


def install():
    """Puts every stand-in in its place, but not in that of a function of the user's; to do so again changes nothing."""
    for owner, name, stand_in in STAND_INS + (FUSED_STAND_INS if kernels.KERNELS_FILE else ()):
        if callable(stand_in):
            # MindSpore's parser looks some methods up again by the function's own name.
            stand_in.__name__ = name
            if not by_known_author(getattr(owner, name)):
                continue
        setattr(owner, name, stand_in)
