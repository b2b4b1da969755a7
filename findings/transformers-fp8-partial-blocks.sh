#!/usr/bin/env bash
# transformers 5.24.0 with accelerate 1.15.0 and torch 2.13.0, on a CPU: a block-FP8 checkpoint whose matrices are not
# whole multiples of weight_block_size is dequantised with the wrong scales, without a word.
#
# Published checkpoints (DeepSeek-V3 and its kin) have one scale per 128 x 128 block, and a smaller last block where a
# dim is not a multiple of 128. With FineGrainedFP8Config(dequantize=True), transformers spreads the scales evenly
# instead: its block has rows / number of scales rows. Seen here, with codes of 1.0 and the scales 1 and 2, so that
# every weight should be the scale of its block:
#   192 rows, 2 scales:    rows 96 to 127 are 2, and should be 1
#   192 columns, 2 scales: columns 96 to 127 are 2, and should be 1
#   256 rows, 2 scales:    right
# The loading report names nothing. A reader who multiplies the codes by the scales of their blocks finds 1.
#
# Fails (exit code 1) once the weights come out right, or wrong in another way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 numpy
cat >"$folder/look.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

BLOCK = 128
folder = Path(sys.argv[1])
# q_proj is 192 x 256, o_proj 256 x 192, gate_proj 256 x 256.
config = LlamaConfig(
    hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
    head_dim=48, vocab_size=64, dtype="bfloat16",
)
tensors = {}
for name, weight in LlamaForCausalLM(config).to(torch.bfloat16).state_dict().items():
    tensors[name] = weight.clone()
    if name.endswith("_proj.weight"):
        rows, columns = (-(-size // BLOCK) for size in weight.shape)
        tensors[name] = torch.ones(weight.shape).to(torch.float8_e4m3fn)
        # Blocks count up from 1 along rows and along columns.
        tensors[name + "_scale_inv"] = torch.arange(rows)[:, None] + torch.arange(columns)[None, :] + 1.0
config.save_pretrained(folder)
stated = json.loads((folder / "config.json").read_text())
stated["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
stated["architectures"] = ["LlamaForCausalLM"]
(folder / "config.json").write_text(json.dumps(stated))
save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
)
attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
q, o, gate = (layer.weight.detach().float() for layer in (attention.q_proj, attention.o_proj, mlp.gate_proj))


def right(size):
    return torch.arange(size) // BLOCK + 1.0


def wrong(found, expected):
    places = (found != expected).nonzero().flatten().tolist()
    return f"{places[0]} to {places[-1]}, {len(places)} in all" if places else "none"


report = {
    "rows of q_proj (192, 256)": wrong(q[:, 0], right(192)),
    "columns of o_proj (256, 192)": wrong(o[0], right(192)),
    "rows of gate_proj (256, 256)": wrong(gate[:, 0], right(256)),
}
for what, places in report.items():
    print(f"wrong {what}: {places}")
seen = ["96 to 127, 32 in all", "96 to 127, 32 in all", "none"]
sys.exit(list(report.values()) != seen)
PYTHON
if (cd "$folder" && "$folder/venv/bin/python" look.py "$folder"); then
    echo "As described: blocks are rows / number of scales, not weight_block_size."
else
    echo "Not as described: see above." >&2
    exit 1
fi
