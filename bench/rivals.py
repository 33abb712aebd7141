"""Other people's kernels for the same work, where they are installed: the extra `rivals`.

Liger-Kernel (norm, gated activation) and cut-cross-entropy (log-sum-exp of the head) are Triton,
quack (norm) is CuTe. All need CUDA. They are called forward only, by what their own modules use.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

Arm = Callable[[dict[str, Any]], Any]
PACKAGES = {"liger": "liger-kernel", "quack": "quack-kernels", "cce": "cut-cross-entropy"}


def versions() -> dict[str, str | None]:
    """Of each rival, None where it is not installed."""
    return {package: _version(package) for package in PACKAGES.values()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def names_of(op: str, variant: str) -> list[str]:
    """Of the rivals that do this work, installed or not."""
    return list(_LOADERS.get((op, variant), {}))


def rivals_of(op: str, variant: str) -> tuple[dict[str, Arm], dict[str, str]]:
    """(arms that can be imported here, why each other one is left out)."""
    found, left_out = {}, {}
    for name, load in _LOADERS.get((op, variant), {}).items():
        try:
            found[name] = load()
        except Exception as error:  # some import much, and fail in their own ways
            left_out[name] = f"cannot be imported: {error}"
    return found, left_out


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _liger_norm() -> Arm:
    function = _attribute("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    return lambda given: (function.apply(given["x"], given["weight"], given["eps"]),)


def _liger_residual_norm() -> Arm:
    function = _attribute("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    return lambda given: function.apply(
        given["x"], given["residual"], given["weight"], given["eps"]
    )


def _quack_norm() -> Arm:
    rmsnorm = _attribute("quack.rmsnorm", "rmsnorm")
    return lambda given: (rmsnorm(given["x"], given["weight"], eps=given["eps"]),)


def _quack_residual_norm() -> Arm:
    rmsnorm = _attribute("quack.rmsnorm", "rmsnorm")
    return lambda given: rmsnorm(
        given["x"], given["weight"], residual=given["residual"], eps=given["eps"], prenorm=True
    )


def _liger_swiglu() -> Arm:
    forward = _attribute("liger_kernel.ops.swiglu", "swiglu_fused_gate_up_forward")
    return lambda given: forward(given["gate_up"])[1]


def _cce_log_sum_exp() -> Arm:
    kernel = _attribute("cut_cross_entropy.cce_lse_forward", "cce_lse_forward_kernel")
    return lambda given: {"log_sum_exp": kernel(given["x"], given["weight"])}


_LOADERS: dict[tuple[str, str], dict[str, Callable[[], Arm]]] = {
    ("rmsnorm_steer", "norm"): {"liger": _liger_norm, "quack": _quack_norm},
    ("rmsnorm_steer", "residual"): {"liger": _liger_residual_norm, "quack": _quack_residual_norm},
    ("swiglu", ""): {"liger": _liger_swiglu},
    ("head_stats", ""): {"cce": _cce_log_sum_exp},
}
