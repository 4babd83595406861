"""Telemetry of the attention kernels is told by Triton's interpreter."""

import importlib.util

if importlib.util.find_spec("triton") is not None:
    from ..interpreter import patch_once

    patch_once()
