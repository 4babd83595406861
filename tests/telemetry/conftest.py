"""Settings of the telemetry tests: they run attention kernels in Triton's interpreter."""

import importlib.util

if importlib.util.find_spec("triton") is not None:
    from ..interpreter import patch_once

    patch_once()
