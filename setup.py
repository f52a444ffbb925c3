"""Installation of bn_det."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "bn_det/version.py").read_text())[1]

setup(
    name="bn_det",
    version=version,
    description="The batch in BatchNorm as a choice, in object detectors",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["bn_det", "bn_det.*"]),
    entry_points={"console_scripts": ["bn-det = bn_det.cli.main:main"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.4",
        "torchvision",
        "fvcore",
        "yacs",
        "pyyaml",
        "numpy",
        "pillow",
        "scipy>=1.15",
        "opencv-python",
        "pycocotools",
        "tabulate",
        "tensorboard",
        "tqdm",
        "matplotlib",
    ],
    extras_require={
        "nf": ["timm>=1.0"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "timm>=1.0",
            "onnx",
            "onnxscript",
            "onnxruntime",
        ],
        # Not on PyPI; see the README for how to install it.
        "detectron2": [
            "detectron2 @ git+https://github.com/facebookresearch/detectron2.git",
            "setuptools<81",
        ],
    },
)
