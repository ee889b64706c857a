# SPDX-License-Identifier: Apache-2.0
"""`python -m r2dllm_ext` is `r2dllm`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
