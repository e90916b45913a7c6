import os
import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource
import numpy as np
from emjax.training.distributed import keep_freed_memory

keep_freed_memory()
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_freed_memory_is_used_again_without_page_faults():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    output = subprocess.run([sys.executable, "-c", COUNT_FAULTS], env=environment, check=True, capture_output=True)
    # 64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB where the kernel hands out those.
    assert int(output.stdout) < 16
