"""What GPUs have, by their makers' data sheets. Knows no models.

Memory is the data sheet's, in 10^9 bytes; the speeds are dense (without structured sparsity), in 10^12 operations a
second: 16-bit matrix products that are summed in fp32, and plain fp32, which PyTorch uses for fp32 unless TF32 is
switched on.

Sources, all by NVIDIA: "H100 Tensor Core GPU", "H200 Tensor Core GPU", "A100 Tensor Core GPU", "A10 Tensor Core GPU",
"L4 Tensor Core GPU", "L40S GPU", "T4 Tensor Core GPU", "V100 Tensor Core GPU" and "RTX A6000" (data sheets); for the
GeForce cards "Ada GPU Architecture" v2.1 and "Ampere GA102 GPU Architecture" v2.1 (white papers). Where a data sheet
gives a speed with sparsity only, half of it is the dense one.
"""

import difflib
from dataclasses import dataclass

from heliostat.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU: memory in bytes, peak floating-point operations a second."""

    memory: float
    flops_16: float
    flops_32: float
    bf16: bool = True


def _gpu(gigabytes: float, tera_16: float, tera_32: float, *, bf16: bool = True) -> Gpu:
    return Gpu(gigabytes * 1e9, tera_16 * 1e12, tera_32 * 1e12, bf16)


GPUS = {
    "H200": _gpu(141, 989, 67),
    "H100-80GB": _gpu(80, 989, 67),
    "H100-PCIE": _gpu(80, 756, 51),
    "A100-80GB": _gpu(80, 312, 19.5),
    "A100-40GB": _gpu(40, 312, 19.5),
    "L40S": _gpu(48, 362, 91.6),
    "A6000": _gpu(48, 154.8, 38.7),
    "L4": _gpu(24, 121, 30.3),
    "A10": _gpu(24, 125, 31.2),
    "RTX4090": _gpu(24, 165.2, 82.6),
    "RTX3090": _gpu(24, 71, 35.6),
    "V100-32GB": _gpu(32, 125, 15.7, bf16=False),
    "V100-16GB": _gpu(16, 125, 15.7, bf16=False),
    "T4": _gpu(16, 65, 8.1, bf16=False),
}


def find(name: str) -> Gpu:
    """The GPU of that name, in capitals or not.

    Raises:
        ConfigError: there is none; the message lists them.
    """
    by_lower = {known.lower(): gpu for known, gpu in GPUS.items()}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    near = difflib.get_close_matches(name.upper(), GPUS, n=1)
    guess = f" did you mean {near[0]}?" if near else ""
    raise ConfigError(f"--gpu {name}: is not known;{guess} There are cpu, {', '.join(GPUS)}")
