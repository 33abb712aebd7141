"""Requests, how they are sampled, steered and read, and the loop that runs them."""

import sys
from typing import TYPE_CHECKING

from ..kernels.lazy_imports import lazy_package

__all__ = ["Engine", "LensSpec", "Request", "Sampling", "Steering", "SteeringVectors"]

if TYPE_CHECKING:
    from .engine import Engine
    from .lens_spec import LensSpec
    from .request import Request
    from .sampling import Sampling
    from .steering import Steering
    from .vectors import SteeringVectors
else:
    _HOMES = {
        "Engine": ".engine",
        "LensSpec": ".lens_spec",
        "Request": ".request",
        "Sampling": ".sampling",
        "Steering": ".steering",
        "SteeringVectors": ".vectors",
    }
    sys.modules[__name__].__class__ = lazy_package(_HOMES)
