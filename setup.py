"""Packaging of auto-round. Everything that is not needed to quantize and load a model is an extra."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = "0.17.0.dev0"

EXTRAS = {
    "gguf": ["gguf>=0.17", "sentencepiece>=0.2"],
    "compressed-tensors": ["compressed-tensors>=0.15"],
    "datasets": ["datasets>=3"],
    "eval": ["lm-eval>=0.4.8"],
    "kernels": ["auto-round-lib>=0.16"],
    "vision": ["pillow>=10", "torchvision"],
    "audio": ["soundfile", "soxr", "librosa"],
    "test": [
        *("pytest>=8", "pytest-xdist>=3", "hypothesis>=6", "ruff>=0.8", "pillow>=10"),
        *("compressed-tensors>=0.15", "gguf>=0.17", "sentencepiece>=0.2"),
    ],
}


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


setup(
    name="auto-round",
    version=VERSION,
    description="Tuned low-bit weight rounding (SignRound) for large language models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["auto_round", "auto_round.*"]),
    package_data={"auto_round": ["assets/*", "assets/demo_model/*"]},
    install_requires=requirements(),
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "auto-round = auto_round.cli.main:main",
            "auto_round = auto_round.cli.main:main",
            "auto-round-best = auto_round.cli.main:main_best",
            "auto_round_best = auto_round.cli.main:main_best",
            "auto-round-light = auto_round.cli.main:main_light",
            "auto_round_light = auto_round.cli.main:main_light",
            "auto-round-rtn = auto_round.cli.main:main_rtn",
            "auto_round_rtn = auto_round.cli.main:main_rtn",
            "auto-round-opt-rtn = auto_round.cli.main:main_opt_rtn",
            "auto_round_opt_rtn = auto_round.cli.main:main_opt_rtn",
            "auto-round-eval = auto_round.cli.main:main_eval",
            "auto_round_eval = auto_round.cli.main:main_eval",
        ]
    },
)
