#!/bin/sh
# Makes the environment of the engines that benchmarks/cpu_peers.py measures: benchmarks/peers/environment.sh FOLDER
#
# Some minutes on two cores: llama.cpp is compiled here, for this very CPU, since a prebuilt one would be slower. Torch
# is the CPU wheel where the index has one; PYTHON=... names another interpreter than python3.
set -eu
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
here=$(dirname "$0")
flags="-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DCMAKE_BUILD_TYPE=Release -DLLAVA_BUILD=OFF"
[ -d "$1" ] || "${PYTHON:-python3}" -m venv "$1"
pip="$1/bin/python -m pip install --quiet --disable-pip-version-check"
$pip -r "$here/requirements.txt"
CMAKE_ARGS="$flags" $pip --no-binary llama-cpp-python llama-cpp-python==0.3.36
echo "$flags" > "$1/llama_cpp_build_flags.txt"
echo "made $1: $("$1/bin/python" --version), llama.cpp built with $flags"
