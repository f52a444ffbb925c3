"""Say in one line whether Detectron2's tests ran: python .ci/detectron2_tests.py JUNIT_XML"""

from __future__ import annotations

import importlib.util
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter


def main() -> None:
    outcomes = Counter()
    for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
        # A file that is skipped as a whole is a case named after it, without a class.
        name = f"{case.get('classname')} {case.get('name')}"
        if "tests.d2" in name:
            outcomes["skipped" if case.find("skipped") is not None else "ran"] += 1
    ran, skipped = outcomes["ran"], outcomes["skipped"]
    installed = importlib.util.find_spec("detectron2") is not None
    if installed and (skipped or not ran):
        sys.exit(f"Detectron2 is installed, but of tests/d2 {ran} ran and {skipped} were skipped")
    if installed:
        print(f"Detectron2's tests ran: {ran} of tests/d2")
    else:
        print("Detectron2's tests were skipped: it is not installed")


if __name__ == "__main__":
    main()
