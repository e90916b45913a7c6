"""Where the recorded reference outputs and the real volumes are: ``EMJAX_SHARED``, by default ``../shared``."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = (ROOT / os.environ.get("EMJAX_SHARED", "../shared")).resolve()
