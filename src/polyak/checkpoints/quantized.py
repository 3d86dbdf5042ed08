"""Refuses quantized weights: averaging their codes and their scales does not average the weights."""

import re
from collections.abc import Iterator

from polyak.checkpoints.opening import Checkpoint
from polyak.compat.words import shown
from polyak.errors import CheckpointError

# How Transformers, vLLM and torchao (weight_scale), DeepSeek (weight_scale_inv), bitsandbytes (SCB, absmax), GPTQ and
# AWQ (scales), HQQ (scale), Quanto (weight._scale) and gpt-oss (..._scales) call the scales next to the codes.
_SCALES = re.compile(r"(.+?)(?:\.(?:weight_scale(?:_inv|_2)?|SCB|scales?|absmax|_scale)|_scales)")
_CODES = (".weight", ".weight_packed", ".qweight", ".W_q", "._data", "_blocks")
_FLOAT8 = "float8"
# Of two numbers in a byte, and of exponents alone: they are no weights by themselves.
_NEVER = ("float4", "e8m0")


def require_no_codes(checkpoint: Checkpoint) -> None:
    """Raise if the weights of a checkpoint are not numbers but codes with scales next to them.

    Args:
        checkpoint: The checkpoint.

    Raises:
        CheckpointError: If it has codes.
    """
    for name, one in checkpoint.tensors.items():
        if any(word in str(one.dtype) for word in _NEVER):
            raise CheckpointError(
                f"weights must not be quantized ({shown(name)} in {shown(checkpoint.path)} is of {one.dtype}); "
                "dequantize the checkpoints first"
            )
    for scales in checkpoint.tensors:
        for codes in _codes_of(scales):
            stored = checkpoint.tensors.get(codes)
            if stored is not None and (not stored.dtype.is_floating_point or _FLOAT8 in str(stored.dtype)):
                raise CheckpointError(
                    f"weights must not be quantized ({shown(codes)} in {shown(checkpoint.path)} has codes in "
                    f"{str(stored.dtype).removeprefix('torch.')}, and their scales are in {shown(scales)}); dequantize "
                    "the checkpoints first"
                )


def _codes_of(scales: str) -> Iterator[str]:
    """Yield the names that codes may have whose scales are in a tensor; none if its name is not one of scales."""
    if match := _SCALES.fullmatch(scales):
        yield match[1]  # of bitsandbytes in 4 bits: the scales of `weight` are in `weight.absmax`
        yield from (f"{match[1]}{end}" for end in _CODES)
