"""miles-fast: pre-train MILES."""

from pathlib import Path

from setuptools import find_packages, setup

DALI = ["nvidia-dali-cuda130>=2.4,<2.5"]
REMOTE = ["s3fs>=2025.3"]  # for s3: only; https: needs nothing
ONNX = ["onnx>=1.20", "onnxscript>=0.7", "onnxruntime>=1.23"]
SEARCH = ["faiss-cpu>=1.11", "pyarrow>=18"]  # faster search; parquet
QUACK = ['quack-kernels[cu13]>=0.6.5,<0.7; platform_system=="Linux"']  # flash-attn-4 takes any
setup(
    name="miles-fast",
    version="0.1.0",
    description="High-throughput pre-training of MILES, a dual encoder for video-text retrieval",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.13",
    # kernels/ stays at the top level without an __init__.py: Hugging Face has a package of that name.
    packages=[*find_packages(include=["miles_fast", "miles_fast.*"]), "miles_fast.kernels"],
    package_dir={"miles_fast.kernels": "kernels"},
    package_data={"miles_fast.export": ["report.css"]},
    install_requires=[
        "torch>=2.11,<2.14",
        'triton>=3.6,<3.8; platform_system=="Linux"',
        "numpy>=1.26",
        "deepspeed>=0.19.8,<0.20",
        "webdataset>=1.0.2,<1.1",
        "timm>=1.0.29,<1.1",
        "transformers>=5.17,<6",
        "av>=17.1,<19",
        "pillow",
        "pydantic>=2",
        "pyyaml",
        "safetensors>=0.8",  # the first whose save_file lets other threads run while it writes
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "dali": DALI,
        "gpu": [*DALI, *QUACK, "flash-attn-4[cu13]>=4.0.0b36,<5"],
        "onnx": ONNX,
        "remote": REMOTE,
        "search": SEARCH,
        "test": [
            *("pytest", "pytest-timeout", "pytest-xdist", "ruff", "moto[s3]>=5,<6", "flask", "flask-cors"),
            *(*REMOTE, *ONNX, *SEARCH, *QUACK),
        ],
    },
)
