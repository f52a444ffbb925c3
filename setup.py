"""Installation of bn_det."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "bn_det/version.py").read_text())[1]

# What the commands need, the import names of which bn_det/cli/main.py has.
TOOLS = [
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
]

setup(
    name="bn_det",
    version=version,
    description="The batch in BatchNorm as a choice, in object detectors",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["batch normalization", "object detection", "pytorch", "detectron2", "torchvision"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=["bn_det", "bn_det.*"]), "bn_det.configs"],
    package_dir={"bn_det.configs": "configs"},
    package_data={
        "bn_det": ["py.typed"],
        "bn_det.configs": ["README.md", "**/*.yaml", "**/*.py"],
    },
    entry_points={"console_scripts": ["bn-det = bn_det.cli.main:main"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.4"],
    extras_require={
        "tools": TOOLS,
        "nf": ["timm>=1.0"],
        "test": [
            *TOOLS,
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-tabulate",
            "types-tqdm",
            "timm>=1.0",
            "onnx",
            "onnxscript",
            "onnxruntime",
        ],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        # Not on PyPI; see docs/hosts.md for how to install it.
        "detectron2": [
            "detectron2 @ git+https://github.com/facebookresearch/detectron2.git",
            "setuptools<81",
        ],
    },
)
