"""Requests, how they are sampled, steered and read, and the loop that runs them."""

from typing import TYPE_CHECKING

from ..kernels.lazy_imports import lazy_package

if TYPE_CHECKING:
    from .branches import run_branches as run_branches
    from .branches import shared_prefix as shared_prefix
    from .engine import Engine as Engine
    from .files import WriteError as WriteError
    from .files import check_outputs as check_outputs
    from .files import check_writable as check_writable
    from .files import json_text as json_text
    from .files import replacing as replacing
    from .files import write_json as write_json
    from .fingerprint import fingerprint as fingerprint
    from .fingerprint import model_fingerprint as model_fingerprint
    from .lens_spec import LensSpec as LensSpec
    from .plan import GPUS as GPUS
    from .plan import Gpu as Gpu
    from .plan import Plan as Plan
    from .plan import available_bytes as available_bytes
    from .plan import check_fits as check_fits
    from .plan import device_memory_bytes as device_memory_bytes
    from .plan import fewest_ranks as fewest_ranks
    from .plan import plan as plan
    from .request import FinishReason as FinishReason
    from .request import Generation as Generation
    from .request import OnProgress as OnProgress
    from .request import OnToken as OnToken
    from .request import Prompt as Prompt
    from .request import Request as Request
    from .sampling import Sampling as Sampling
    from .steering import Steering as Steering
    from .vector_fields import Origin as Origin
    from .vectors import SteeringVectors as SteeringVectors

lazy_package(__name__)
