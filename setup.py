from setuptools import find_packages, setup

setup(
    name="flow_grpo",
    version="0.1.0",
    description="Online reinforcement learning for flow-matching image models",
    license="MIT",
    python_requires=">=3.11,<3.14",  # those that the tests ran on
    packages=find_packages(include=["flow_grpo*", "config*", "dataset"]),
    package_data={
        "flow_grpo.evaluation": ["protocols/*.toml"],
        "flow_grpo.rewards.judges": ["templates/*.txt"],
        "flow_grpo.report": ["*.j2", "page.css"],
    },
    install_requires=[
        "torch>=2.11",
        "diffusers>=0.42.1",
        "transformers>=5.17",
        "accelerate>=1.15",
        "peft>=0.21",
        "ml-collections>=1.1",
        "numpy>=1.26",
        "scipy>=1.11",
        "pillow>=10",
        "requests>=2.32",
        "safetensors>=0.8",
        "sentencepiece>=0.2",
        "protobuf>=5",
        "tensorboard>=2.17",
        "tqdm>=4.66",
        "jinja2>=3.1",
        "matplotlib>=3.8",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19"],
        "wandb": ["wandb>=0.20"],
        "rewards": ["httpx>=0.27", "tenacity>=9"],
        "ocr": ["rapidocr>=3.2", "onnxruntime>=1.17", "rapidfuzz>=3.9"],
        "paddleocr": ["paddleocr>=2.9", "paddlepaddle>=2.6", "rapidfuzz>=3.9"],
        "server": ["fastapi>=0.115", "uvicorn>=0.30"],
        "8bit": ["bitsandbytes>=0.45"],
        "dev": ["pytest>=8", "pytest-xdist>=3.5", "ruff>=0.14", "pyarrow>=15"],
    },
)
