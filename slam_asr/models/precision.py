"""Devices and number formats: which ones this machine has, and which ones a computation should use."""

import re

import torch

from slam_asr.errors import ConfigurationError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device() -> torch.device:
    """Return the GPU if this machine has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processes_here(key: str, requested: int) -> int:
    """Return the number of processes for this machine: the requested number, or one per GPU.

    Args:
        key: key of the number in the recipe, for the error message.
        requested: the number; 0 requests one process per GPU, or a single one without a GPU.

    Raises:
        ConfigurationError: this machine has GPUs, but fewer than the requested processes.
    """
    gpus = torch.cuda.device_count()
    if gpus and requested > gpus:
        raise ConfigurationError(
            f"{key} is {requested} but this machine has {gpus} GPU{'s' * (gpus > 1)}: lower it, "
            "or set it to 0 to use them all."
        )
    return requested or max(1, gpus)


def explain_precision(precision: str, device: torch.device) -> str:
    """Describe the precision, the device and the reason for the precision, for the log at start-up.

    Raises:
        ConfigurationError: the device cannot compute in this precision.
    """
    if device.type == "cpu" and precision == "fp16":
        raise ConfigurationError(
            "Precision fp16 needs a GPU; on this CPU choose bf16 or fp32 "
            "(for training, --training.precision bf16)."
        )
    cpu_use = "faster than bf16 on CPUs without matrix units for it"
    use = cpu_use if device.type == "cpu" else "for comparisons"
    reasons = {
        "bf16": "half of fp32's memory and its full range; in training, the master weights are in fp32",
        "fp16": "for GPUs without bf16; in training, with loss scaling and fp32 master weights",
        "fp32": f"as the recipe requests; {use}",
    }
    return f"{precision} on {device.type} ({reasons[precision]})"


def encoder_precision(feature_dtype: str, on_gpu: bool) -> str:
    """Return the precision in which a frozen encoder computes features that are saved as `feature_dtype`.

    On a CPU the precision is always fp32, which is also faster there: on one core with AVX-512 and bf16
    instructions, Whisper tiny took 0.35 s per window in fp32 and 0.55 s in bf16.
    """
    if not on_gpu or feature_dtype == "fp32":
        return "fp32"
    return {"fp8": "bf16"}.get(feature_dtype, feature_dtype)


PEAKS = {
    **{"H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "A100": 312},
    **{"L40S": 362, "L4": 121, "A10": 125, "V100": 125, "T4": 65},
}
"""Dense TFLOP/s of GPUs in half precision, from NVIDIA's data sheets.

A key is a word of the device's name. If a GPU exists as SXM and as PCIe card, the number is that of SXM: an
H100 PCIe has 756.
"""


def peak_flops(device: torch.device) -> float | None:
    """Return a GPU's nominal floating-point operations per second in half precision; None if not known."""
    if device.type != "cuda":
        return None
    # Complete words are compared, because L4 is also a part of L40S, and A10 is a part of A100.
    words = re.split(r"[^A-Za-z0-9]+", torch.cuda.get_device_name(device))
    return next((1e12 * PEAKS[word] for word in words if word in PEAKS), None)
