"""Stand-ins for Qwen-Image's rotary embedding; see stand_ins.py."""

from mindone.diffusers.models import embeddings

from .flux import apply_rotary_emb

STAND_INS = ((embeddings, "apply_rotary_emb", apply_rotary_emb),)
"""As in stand_ins.py."""
