#!/usr/bin/env python
"""bn-det report, from a clone."""

from bn_det.cli.main import script

if __name__ == "__main__":
    script("report")
