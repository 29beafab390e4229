"""Arithmetic by name, and which of it this machine can do."""

import re

import torch

from slam_asr.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processes_here(key: str, wanted: int) -> int:
    """Processes on this machine: those that the recipe asks for, or one a GPU.

    Args:
        key: of the recipe, to name in a complaint.
        wanted: its value.

    Raises:
        UserError: more than there are GPUs.
    """
    there = torch.cuda.device_count()
    if there and wanted > there:
        raise UserError(
            f"{key} is {wanted} but this machine has {there} GPUs: lower it, or leave it at 0 to use them all."
        )
    return wanted or max(1, there)


def explain_precision(precision: str, device: torch.device) -> str:
    """Why this precision runs here, for the lines at start-up.

    Raises:
        UserError: the device cannot compute in it.
    """
    if device.type == "cpu" and precision == "fp16":
        raise UserError(
            "Precision fp16 needs a GPU; on this CPU choose bf16 or fp32 (for training, --training.precision bf16)."
        )
    fastest = (
        "the faster one on CPUs without matrix units for bf16" if device.type == "cpu" else "for comparisons"
    )
    reasons = {
        "bf16": "half of fp32's memory and all of its range; the projector's master weights stay in fp32",
        "fp16": "for GPUs without bf16; with loss scaling, and the projector's master weights in fp32",
        "fp32": f"as the recipe asks: {fastest}",
    }
    return f"{precision} on {device.type} ({reasons[precision]})"


def encoder_precision(stored: str, on_gpu: bool) -> str:
    """Arithmetic of a frozen encoder whose output is stored as `stored`.

    On a CPU fp32 is the faster one as well: Whisper tiny took 0.35 s of one core a window in fp32
    and 0.55 s in bf16 (AVX-512 with bf16 instructions).
    """
    return "fp32" if not on_gpu or stored == "fp32" else {"fp8": "bf16"}.get(stored, stored)


PEAKS = {
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "V100": 125,
    "T4": 65,
}
"""Dense TFLOP/s in half precision of GPUs, as NVIDIA gives them, by a word of their name."""


def peak_flops(device: torch.device) -> float | None:
    """Floating-point operations a second that a device is sold with in half precision; None for one that is not known."""
    if device.type != "cuda":
        return None
    words = re.split(r"[^A-Za-z0-9]+", torch.cuda.get_device_name(device))
    return next((1e12 * PEAKS[word] for word in words if word in PEAKS), None)
