"""Checks of Python, the locked libraries, the GPU's architecture and precision."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from sdxl_lora.cli.doctor.context import RunContext
from sdxl_lora.config import Params, Precision
from sdxl_lora.reproducibility.checklist import Check, failed, passed, warned
from sdxl_lora.runtime.environment import NUMERICAL_LIBRARIES, installed_version

_LOCK_FILE = Path("requirements.lock")
_PYTHONS = ((3, 11), (3, 14))
"""The first supported version, and the first unsupported one after it."""
_NATIVE_BF16 = 8  # compute capability, Ampere
_OPTIONAL = {"triton", "xformers"}
_MAX_SHOWN = 4  # packages that a check names


def check_python(_: RunContext, version: tuple[int, ...] = sys.version_info[:3]) -> Iterator[Check]:
    """Check that this Python is supported."""
    text, (first, last) = ".".join(map(str, version)), _PYTHONS
    if first <= version[:2] < last:
        yield passed("python", text)
    else:
        yield failed("python", f"{text} is not 3.11, 3.12 or 3.13", "`make setup PYTHON=python3.12`")


def check_libraries(_: RunContext, lock: Path = _LOCK_FILE) -> Iterator[Check]:
    """Check that the numerical libraries have the versions of the lock."""
    pinned = pinned_versions(lock.read_text(encoding="utf-8"))
    installed = {name: installed_version(name) for name in NUMERICAL_LIBRARIES if name in pinned}
    if missing := [name for name, version in installed.items() if version is None and name not in _OPTIONAL]:
        yield failed("libraries", f"not installed: {', '.join(missing)}", "`make setup`")
    others = [
        f"{name} {version} (lock: {pinned[name]})"
        for name, version in installed.items()
        if version is not None and version.partition("+")[0] != pinned[name]
    ]
    if others:
        rest = f" and {len(others) - _MAX_SHOWN} more" if len(others) > _MAX_SHOWN else ""
        yield warned(
            "libraries",
            f"{', '.join(others[:_MAX_SHOWN])}{rest}: results may round differently",
            "`make setup` installs the locked versions",
        )
    elif not missing:
        yield passed("libraries", f"{len(installed)} numerical libraries match {lock}")


def pinned_versions(lock: str) -> dict[str, str]:
    """Return the version of each package in a lock, by name."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)(?:\[.*\])?==(\S+)", lock, re.MULTILINE))


def check_gpu(context: RunContext) -> Iterator[Check]:
    """Check that there is a GPU if the recipe needs one, and that PyTorch has kernels for it."""
    if context.device.type != "cuda":
        if context.has_its_gpu:
            yield passed("gpu", "no GPU, and this recipe does not need one")
        else:
            found = f"training.vram_gib is {context.params.training.vram_gib:g} and PyTorch finds no GPU"
            remedy = "run on a machine with a GPU, or `make recipe NAME=demo`, which does not need one"
            yield failed("gpu", found, remedy)
        return
    name = torch.cuda.get_device_name(context.device)
    capability, kernels = torch.cuda.get_device_capability(context.device), torch.cuda.get_arch_list()
    architecture = f"sm_{capability[0]}{capability[1]}"
    if has_kernels(capability, kernels):
        yield passed("gpu", f"{name}, {architecture}")
    else:
        built = f"PyTorch {torch.__version__} is built for {', '.join(kernels)}"
        remedy = "install a PyTorch built for this GPU, or use another GPU"
        yield failed("gpu", f"{name} is {architecture}, {built}", remedy)


def has_kernels(capability: tuple[int, int], kernels: Sequence[str]) -> bool:
    """Return whether a GPU runs at least one of the architectures that PyTorch was built for.

    Machine code (`sm_86`) runs on GPUs of the same major version with the same or a higher minor version,
    intermediate code (`compute_90`) on all GPUs with the same or a higher version (CUDA C++ Programming
    Guide, "Application Compatibility").
    """
    for kernel in kernels:
        kind, _, version = kernel.partition("_")
        digits = re.sub(r"\D", "", version)
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False


def check_precision(context: RunContext) -> Iterator[Check]:
    """Check that the device supports the precisions of the params."""
    precisions = _precisions_of(context.params)
    cuda = context.device.type == "cuda"
    halves = [key for key, precision in precisions.items() if precision == "fp16"]
    if halves and not cuda:
        yield failed(
            "precision",
            f"{', '.join(halves)}: fp16, which needs a GPU",
            "set them to fp32, or run on a machine with a GPU",
        )
        return
    wanted = [key for key, precision in precisions.items() if precision == "bf16"]
    native = cuda and torch.cuda.get_device_capability(context.device)[0] >= _NATIVE_BF16
    if wanted and not native:
        yield warned(
            "precision",
            f"{', '.join(wanted)}: bf16 is emulated on this device, which is slow",
            "set them to fp16 or fp32",
        )
    else:
        used = ", ".join(sorted(set(precisions.values())))
        yield passed("precision", f"{used}; bf16 is {'native' if native else 'not native'} on this device")


def _precisions_of(params: Params) -> Mapping[str, Precision]:
    """Return the precisions that stages compute in, by params key."""
    return {
        "encoding.vae_precision": params.encoding.vae_precision,
        "encoding.text_precision": params.encoding.text_precision,
        "training.precision": params.training.precision,
        "sampling.precision": params.sampling.precision,
        "evaluation.precision": params.evaluation.precision,
    }
