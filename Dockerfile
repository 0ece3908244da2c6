# The package with everything it needs to train on NVIDIA GPUs:
#   docker build -t cola_lightning .
#   docker run --gpus all --ipc host -v $PWD/runs:/work/runs cola_lightning fit --config configs/cola_m_1b.yaml
# --ipc host, because NCCL's ranks on one node share memory through /dev/shm, of which a container has 64 MB.
FROM python:3.12-slim

# A C++ compiler for torch.compile, and ninja, with which DeepSpeed builds operators. Without git, run.json names no commit.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ ninja-build \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /work
COPY pyproject.toml README.md LICENSE ./
COPY cola_lightning cola_lightning
COPY configs configs
COPY recipes recipes
RUN pip install --no-cache-dir '.[plots,quickstart,zstd]'

ENTRYPOINT ["python", "-m", "cola_lightning"]
CMD ["--help"]
