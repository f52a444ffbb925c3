#!/usr/bin/env python
"""bn-det leakage, from a clone."""

from bn_det.cli.main import script

if __name__ == "__main__":
    script("leakage")
