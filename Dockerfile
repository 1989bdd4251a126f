# The versions of constraints.txt, which the tests pass with on a CPU. Not built or run with a GPU yet.
#
#   docker build -t sapo_trl .
#   docker run --gpus all --ipc host -v $PWD/runs:/work/runs sapo_trl check --config qwen3-8b/sapo
#   docker run --gpus all --ipc host -v $PWD/runs:/work/runs --entrypoint accelerate sapo_trl \
#     launch --num_processes 8 -m sapo_trl train --config qwen3-8b/sapo
#
# --build-arg EXTRAS=deepspeed,vllm takes vLLM along, in the version that pip finds for this torch.
FROM python:3.11-slim
ARG EXTRAS=deepspeed
# triton and DeepSpeed compile small programs when they are first used
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/sapo_trl
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir -c constraints.txt "$(grep '^torch==' constraints.txt)"
COPY configs configs
COPY sapo_trl sapo_trl
RUN pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]"
WORKDIR /work
ENTRYPOINT ["sapo-trl"]
